"""Read HumanEval+ and MBPP+ in EvalPlus's own format (Liu et al. 2023, arXiv 2305.01210).

A row holds inputs instead of tests: a sample must return what the reference returns. Base inputs
come from the original benchmark; plus inputs number about 80 times as many (MBPP: 35). Rows become
problems in HumanEval's format, with `test` and `plus_test`. Inputs with answers of 12 MiB or more
(Mbpp/255 has one of 1 GB) are dropped.
"""

from pathlib import Path

from data.base import benchmarks

INPUTS = ("base_input", "plus_input", "atol", "contract", "assertion")  # besides HumanEval's fields
# Runs outside the sandbox, with the tolerances and exceptions of evalplus 0.3.1.
TEST = '''\
import contextlib, copy, gc, marshal, math
import numpy as np
from math import inf, nan

gc.disable()

def size(x):
    try:
        return len(marshal.dumps(x))
    except ValueError:  # an object such as re.Match
        return 0

reference = {{}}
exec({reference!r}, reference)

def floats(x):
    return isinstance(x, float) or (
        isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(i, float) for i in x))

def agree(out, want, given, atol):
    {exception}
    if out == want:
        return True
    atol = atol or (1e-6 if floats(want) else 0)
    if atol == 0 or type(out) is not type(want):
        return False
    if isinstance(want, (list, tuple)) and len(out) != len(want):
        return False
    return bool(np.allclose(out, want, rtol=1e-7, atol=atol))

cases = []
for given in {inputs!r}:
    with contextlib.suppress(MemoryError):
        want = reference[{name!r}](*copy.deepcopy(given))
        if size(want) < 12 << 20:
            cases.append((given, want))
        del want

def check(candidate):
    for given, want in cases:
        out = candidate(*copy.deepcopy(given))  # which it may change
        assert agree(out, want, given, {atol!r}), (given, out, want)
'''
# Problems with several right answers. AS_SETS: list order is free. AS_TRUTH: functions such as
# `check_str` return a match or None, and tests check only its truth value.
AS_SETS = "return set(out) == set(want)"
AS_TRUTH = "return (out if isinstance(out, bool) else out is not None) == (want is not None)"
EXCEPTIONS = {
    "HumanEval/32": "return abs(poly(*given, out)) <= atol",
    **dict.fromkeys(map("Mbpp/{}".format, (2, 7, 111, 140, 232, 249, 579, 769)), AS_SETS),
    **dict.fromkeys(map("Mbpp/{}".format, (737, 787, 794)), AS_TRUTH),
    "Mbpp/164": "return isinstance(out, bool)",  # EvalPlus accepts any answer
    "Mbpp/295": "if out == 0: return True",
    "Mbpp/558": "digits = [str(n).zfill(max(len(str(m)) for m in given)) for n in given]\n"
    "    if out == sum(abs(int(a) - int(b)) for a, b in zip(*digits)): return True",
    "Mbpp/581": "edge, height = given\n    slant = math.hypot(edge / 2, height)\n"
    "    if abs(out - round(edge**2 + 2 * edge * slant)) <= atol: return True",
}
# JSON has no tuples. Depths at which MBPP+'s lists are tuples: 1 = an argument, 2 = its items.
DEPTHS = {
    (1,): "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    (2,): "63 64 70 75 94 120 237 272 299 400 409 413 417 438 444 473 614 722 753 780",
    (1, 2): "259 278 401 445",
    tuple(range(1, 50)): "580 615 791",
}
TUPLES = {f"Mbpp/{n}": depths for depths, ids in DEPTHS.items() for n in ids.split()}
ARGUMENT = dict.fromkeys(map("Mbpp/{}".format, (250, 307, 405, 446, 617, 720, 763, 808)), 0)
ARGUMENT |= {"Mbpp/106": 1, "Mbpp/750": 1}  # index of the only tuple argument
# {fault: fix} for tests in the originals' formats. HumanEval/32's (v0.1.9, v0.1.10) fails the
# reference, too; others run the reference after the sample, which may have changed the input.
COPY = "__import__('copy').deepcopy(inp)"
FAULTS = {
    "_poly(*candidate(*inp), inp)": f"abs(_poly(*inp, candidate(*{COPY})))",
    "(*inp), ref_func(*inp)": f"(*{COPY}), ref_func(*inp)",
}


def mend(test: str) -> str:
    """Return the test with FAULTS fixed."""
    for fault, right in FAULTS.items():
        test = test.replace(fault, right)
    return test


def convert(path: Path, rows: list[dict]) -> list[dict]:
    """Convert the rows of `path` to HumanEval's format; pass rows already in it through, with any
    unknown fields. Raises UserError."""
    return benchmarks.convert(path, "EvalPlus's format", problem, rows)


def problem(row: dict) -> dict:
    if "plus_input" not in row:
        return row | {"test": mend(row["test"])}
    given = {kind: [arguments(row["task_id"], x) for x in row[kind]] for kind in INPUTS[:2]}
    code = row["prompt"] + row["canonical_solution"]

    def test(inputs: list) -> str:
        exception = EXCEPTIONS.get(row["task_id"], "")
        about = {"name": row["entry_point"], "atol": row["atol"], "exception": exception}
        return TEST.format(reference=code, inputs=inputs, **about)

    return {
        **{field: value for field, value in row.items() if field not in INPUTS},
        "test": test(given["base_input"]),
        "plus_test": test(given["base_input"] + given["plus_input"]),
    }


def arguments(task_id: str, given: list) -> list:
    """Return an input of `task_id` as arguments, restoring types that JSON lacks."""
    if task_id == "Mbpp/115":
        return [[set(x) if isinstance(x, list) and x else {} for x in given[0]]]
    if task_id in ("Mbpp/124", "Mbpp/252"):  # complex numbers stored as text
        return [*map(float, given[:-1]), complex(given[-1])]
    if task_id in ARGUMENT:
        return [tuple(x) if i == ARGUMENT[task_id] else x for i, x in enumerate(given)]
    return tuples(given, TUPLES.get(task_id, ()), 0)


def tuples(value, depths: tuple[int, ...], depth: int):
    if isinstance(value, dict):
        return {k: tuples(v, depths, depth + 1) for k, v in value.items()}
    if not isinstance(value, list):
        return value
    items = [tuples(x, depths, depth + 1) for x in value]
    return tuple(items) if depth in depths else items
