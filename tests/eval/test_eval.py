"""Test the evaluators on models and samples with known scores."""

import json
import math
import sys
import types

import pytest
from tiers import best

from common.config import UserError
from common.files import write_jsonl
from data.base.benchmarks import read_mbpp
from eval import humaneval, mbpp
from eval.harness import BODY
from sandbox.execute import Verdict
from sandbox.self_check import LOOP_S, SLOWEST, remembered, run_all, self_check, slowdown

TIER = best()
PROBLEMS = [
    {
        "task_id": f"T/{name}",
        "prompt": f'def {name}(a, b):\n    """{name} of a and b."""\n',
        "canonical_solution": f"    return a {op} b\n",
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(5, 3) == {answer}\n",
    }
    for name, op, answer in (("add", "+", 8), ("sub", "-", 2))
]
COMPLETE = [{"task_id": p["task_id"], "completion": "    pass"} for p in PROBLEMS]
ROWS = [
    {
        "task_id": i,
        "text": f"Write a function to add {i}.",
        "code": f"def check(x):\r\n    return x + {i}",  # two MBPP functions are named check
        "test_list": [f"assert check(1) == {i + 1}", f"assert check(0) == {i}"],
        "test_setup_code": "",
    }
    for i in (2, 3, 4, 11, 12, 511)
]


def write(path, rows):
    write_jsonl(path, rows)
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def problems(tmp_path):
    return write(tmp_path / "problems.jsonl", PROBLEMS)


@pytest.fixture
def command(monkeypatch, in_process):
    """Run a command in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr("eval.harness.slowdown", lambda **limits: 1.0)  # saves 0.3 s per call
    return lambda module, *arguments: in_process(module.main, *arguments, "--sandbox", TIER)


@pytest.fixture
def model(monkeypatch):
    """A model that answers a prompt with the next completion of the `answers` key in it."""

    def generate(prompts, **options):
        print("a library that prints")
        seen.prompts, seen.options = prompts, options
        return [next(k for key, k in seen.answers.items() if key in p).pop(0) for p in prompts]

    seen = types.SimpleNamespace(answers={}, generate=generate, fits=lambda p: len(p) <= 2000)
    generator = types.SimpleNamespace(load=lambda checkpoint, **options: seen)
    monkeypatch.setitem(sys.modules, "sample", types.SimpleNamespace(Generator=generator))
    return seen


def test_samples_with_a_known_score(command, problems, tmp_path):
    good = "    return plus(a, b)\n\ndef plus(a, b):\n    return a + b\n"  # run unchanged
    bad = "    return a * b\n"
    rows = [{"task_id": "T/add", "completion": c} for c in [good] * 3 + [bad] * 7]
    rows += [{"task_id": "T/sub", "completion": c} for c in [good] * 9 + ["    while 1: pass\n"]]
    samples, out = write(tmp_path / "samples.jsonl", rows), tmp_path / "out"
    status, stdout, _ = command(
        humaneval, "--problems", problems, "--samples", samples, "--out", out, "--json",
        "--timeout_s", "0.5",
    )  # fmt: skip
    assert status == 0
    result = json.loads(stdout)  # exactly one object
    assert json.loads((out / "results.json").read_text()) == result
    assert result["pass@1"] == pytest.approx(0.15)
    assert result["pass@10"] == pytest.approx(0.5)
    assert result["counts"] == {"passed": 3, "failed": 16, "timeout": 1}
    assert "NOT protected" in result["limits"]
    assert (result["protocol"], result["sandbox"]) == ("function body", TIER)
    written = lines(out / "samples.jsonl")
    assert [s["completion"] for s in written] == [row["completion"] for row in rows]
    assert [s["passed"] for s in written] == [True] * 3 + [False] * 17
    assert written[-1]["status"] == "timeout"
    assert "AssertionError" in written[5]["detail"]


def test_checkpoint(command, model, problems, tmp_path):
    model.answers |= {
        "def add": ["\n    return a + b\n\nadd(", "\n    return a\n"],
        "def sub": ["\n    return a - b", "\n    return a - b"],
    }
    status, stdout, _ = command(
        humaneval, "--problems", problems, "--checkpoint", "run", "--samples_per_problem", 2,
        "--temperature", 0.5, "--seed", 7, "--out", tmp_path / "out", "--json", "--strip_prompt",
    )  # fmt: skip
    result = json.loads(stdout)
    assert status == 0
    assert (result["pass@1"], result["benchmark"]) == (0.75, "T")
    assert [p[:7] for p in model.prompts] == ["def add"] * 2 + ["def sub"] * 2
    assert all(p.endswith('b."""') for p in model.prompts)
    assert (model.options["stop"], model.options["seed"]) == (BODY.stop, 7)
    assert lines(tmp_path / "out" / "samples.jsonl")[0]["completion"] == "\n    return a + b\n\n"


def test_the_temperature_is_the_best_of_other_problems(command, model, problems, tmp_path):
    def asked(sha256: str = "dev", first: str = "dev") -> tuple:
        arguments = ["--problems", problems, "--checkpoint", "run", "--samples_per_problem", "2"]
        for at, *rates in ((0.2, 0.5, 0.6), (0.8, 0.3, 0.7), (1.2, 0.1, 0.4)):
            arguments += ["--tuned", tmp_path / str(at)]
            arguments[-1].mkdir(exist_ok=True)
            result = {"problems_sha256": first if at < 1 else sha256, "config": {"temperature": at}}
            result |= zip(("pass@1", "pass@10"), rates)
            (arguments[-1] / "results.json").write_text(json.dumps(result))
        model.answers |= {"def ": ["    return a + b", "    return a"] * 2}
        return command(humaneval, *arguments, "--json")

    result = json.loads(asked()[1])
    assert model.options["temperature"] == result["config"]["temperature"] == 0.8
    assert result["pass_at"] == {"1": 0.25, "2": 0.5}
    for sha256 in ("another", None), [result["problems_sha256"]] * 2:
        assert "of one problems file other than" in asked(*sha256)[2]
    (tmp_path / "0.2/results.json").unlink()
    for more, message in ([], "no results.json"), (["--temperature", "1"], "give only one of them"):
        status, _, stderr = command(humaneval, "--problems", problems, "--samples", problems,
                                    "--tuned", tmp_path / "0.2", *more)  # fmt: skip
        assert (status, message in stderr) == (2, True)


def test_prompt_beyond_the_context_fails_and_is_counted(command, model, tmp_path):
    long = PROBLEMS[0] | {"prompt": "# long\n" * 400 + PROBLEMS[0]["prompt"]}
    problems = write(tmp_path / "problems.jsonl", [long, PROBLEMS[1]])
    model.answers |= {"def sub": ["\n    return a - b"]}
    out = tmp_path / "out"
    _, stdout, _ = command(humaneval, "--problems", problems, "--checkpoint", "x", "--out", out)
    assert "prompts too long: 1" in stdout
    assert " 50.0 %" in stdout
    assert model.prompts == [PROBLEMS[1]["prompt"]]
    assert "too long" in lines(out / "samples.jsonl")[0]["detail"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*COMPLETE, {"task_id": "T/mul", "completion": ""}], [], "3 (T/mul): no such problem"),
        ([COMPLETE[0], {"task_id": "T/sub"}], [], "(T/sub): no 'completion' or 'solution' string"),
        ([COMPLETE[0], {"task_id": "\x1b[2J"}], [], "sample 2 (\\x1b[2J): no such problem"),
        (COMPLETE[:1], [], "no sample for 1 of 2 problems, e.g. T/sub"),
        (COMPLETE[1:], ["--limit", "1"], "no sample for 1 of 1 problems, e.g. T/add"),
        (COMPLETE, ["--checkpoint", "run"], "one of --checkpoint and --samples"),
        (COMPLETE, ["--timeout_s", "0"], "--timeout_s"),
        (COMPLETE, ["--timeout_s", "nan"], "--timeout_s"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    command, problems, tmp_path, rows, options, message
):
    samples, out = write(tmp_path / "samples.jsonl", rows), tmp_path / "out"
    out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    status, stdout, stderr = command(
        humaneval, "--problems", problems, "--samples", samples, "--out", out, *options
    )
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert message in stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_samples_in_the_forms_that_others_write(command, problems, tmp_path):
    """Read whole programs, other ids, a BOM, a trailing backslash; then our own output."""
    add = "from __future__ import annotations\ndef add(a, b):\n    return a + b\n"
    rows = [
        {"task_id": "t/ADD", "solution": add, "completion": "    return 0"},
        {"task_id": "add", "completion": "    return a + b \\"},
        {"task_id": "T/add", "completion": '    raise ValueError("\ud800\x1b[2J")\n'},
        {"task_id": "T/sub", "completion": "    return a - b"},
    ]
    samples, out = tmp_path / "samples.jsonl", tmp_path / "out"
    samples.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    for limit in (0, 1, 1):
        status, stdout, stderr = command(
            humaneval, "--problems", problems, "--samples", samples, "--out", out, "--limit", limit
        )
        assert status == 0, stderr
        samples = out / "samples.jsonl"
        passed = [True, True, False, True][: 3 if limit else 4]
        assert [s["passed"] for s in lines(samples)] == passed
        assert "\x1b" not in stdout + stderr + samples.read_text()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, UserError("no score")])
def test_generated_samples_outlive_a_fault(command, model, problems, tmp_path, monkeypatch, fault):
    def fail(*_, **__):
        raise fault

    model.answers |= {"def add": ["    return a + b"], "def sub": ["    return a - b"]}
    out = tmp_path / "new" / "out"
    with monkeypatch.context() as patch:
        patch.setattr("eval.harness.run_all", fail)
        arguments = ("--problems", problems, "--out", out)
        status, _, stderr = command(humaneval, *arguments, "--checkpoint", "run")
    kept = tmp_path / "new" / "out.unscored.jsonl"
    assert status != 0
    assert f"--samples {kept}" in stderr
    assert not out.exists()
    assert "100.0 %" in command(humaneval, *arguments, "--samples", kept)[1]
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canonical_solution": "    return 7\n"}, "T/add: the reference failed AssertionError"),
        ({"canonical_solution": "    while 1: pass\n"}, "T/add: the reference timed out"),
        ({"test": "def check(candidate):\n    candidate(1, 2)\n"}, "T/add: the wrong solution"),
        ({"test": "def check(c):\n    assert not c(0, 0)\n"}, "(pass) passed"),
        (
            {"test": "def check(c):\n    try: assert c(5, 3) == 8\n    except ValueError: pass\n"},
            "(raise ValueError) passed",
        ),
    ],
)
def test_self_check_refuses(change, message):
    with pytest.raises(UserError) as e:
        self_check([PROBLEMS[0] | change, PROBLEMS[1]], timeout_s=0.2, tier=TIER)
    assert message in str(e.value)
    assert "T/sub" not in str(e.value)


def test_no_score_from_a_broken_sandbox(command, problems, tmp_path, monkeypatch):
    verdicts = [Verdict("passed", ""), Verdict("infrastructure", "no such sandbox")]
    samples, out = write(tmp_path / "samples.jsonl", COMPLETE), tmp_path / "out"
    monkeypatch.setattr("eval.harness.self_check", lambda *_, **__: {"T/add": 0.1, "T/sub": 0.1})
    monkeypatch.setattr("sandbox.self_check.run_checks", lambda programs, **limits: verdicts)
    status, _, stderr = command(
        humaneval, "--problems", problems, "--samples", samples, "--out", out
    )
    assert status == 2
    assert not out.exists()
    assert "no score, as 1 of 2" in stderr
    assert "no such sandbox" in stderr


PLUS = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def half(x):\n    """Half of x."""\n',
        "canonical_solution": "    return [i / 2 for i in x]\n",
        "entry_point": "half",
        "contract": "",
        "atol": 0,
        "base_input": [[[1, 2]]],
        "plus_input": [[[]], [[-1, 3]], [[10**30]]],
    }
]
MBPP_PLUS = [
    {
        "task_id": "Mbpp/2",
        "prompt": '"""\nWrite a function to find the common elements.\n"""',
        "canonical_solution": "\ndef common(a, b):\n    return tuple(set(a) & set(b))\n",
        "entry_point": "common",
        "contract": "",
        "assertion": "assert set(common((3, 4), (4, 5))) == {4}",
        "atol": 0,
        "base_input": [[[3, 4], [4, 5]]],
        "plus_input": [[[1, 2, 3], [3, 2]]],
    }
]
HALF = {  # {function body: (passes base tests, passes plus tests)}
    "return [i * 0.5 for i in x]": (True, True),
    "return [i * 0.5000000001 for i in x]": (True, True),  # within tolerance
    "return [abs(i) / 2 for i in x]": (True, False),
    "return tuple(i / 2 for i in x)": (False, False),
}
COMMON = {
    "return [x for x in b if (x,) in zip(a)]": (True, True),  # any order is right
    "return (a + (4,))[2:3]": (True, False),  # needs tuple arguments
    "return None": (False, False),
}


@pytest.mark.parametrize(
    ("module", "rows", "header", "bodies", "title"),
    [
        (humaneval, PLUS, "def half(x)", HALF, "HumanEval+"),
        (mbpp, MBPP_PLUS, "def common(a, b)", COMMON, "MBPP+"),
    ],
)
def test_evalplus(command, tmp_path, module, rows, header, bodies, title):
    """EvalPlus's own format, with inputs instead of tests, gives two named scores."""
    samples = [
        {"task_id": rows[0]["task_id"], "solution": f"{header}:\n    {body}\n"} for body in bodies
    ]
    files = ("--problems", write(tmp_path / "plus.jsonl", rows), "--samples",
             write(tmp_path / "samples.jsonl", samples))  # fmt: skip
    status, stdout, stderr = command(module, *files, "--out", tmp_path / "out")
    assert status == 0, stderr
    assert stdout.startswith(title)
    assert ", base tests only" in stdout
    found = lines(tmp_path / "out" / "samples.jsonl")
    assert [(s["base_passed"], s["passed"]) for s in found] == [*bodies.values()]
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    both = [sum(passed) / len(bodies) for passed in zip(*bodies.values())]
    assert [result["base"]["pass@1"], result["pass@1"]] == pytest.approx(both)


def test_evalplus_in_the_formats_of_the_originals(command, tmp_path):
    """Tests import numpy; MBPP rows also hold the base tests."""
    test = (
        "import numpy as np\n\ndef assertion(out, exp, atol):\n"
        "    assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n\n"
    )
    add = f"{test}def ref_func(a, b):\n    return a + b\n\ndef check(candidate):\n"
    add += "    for inp in [[[5], [3]]]:\n        assertion(candidate(*inp), ref_func(*inp), 0)\n"
    problems = [{**PROBLEMS[0], "task_id": "HumanEval/0", "test": add}]
    bodies = "return a + b", "a.clear(), b.clear()\n    return a"  # must not affect the reference
    samples = [{"task_id": 0, "completion": f"    {body}"} for body in bodies]
    files = [("--problems", write(tmp_path / "he.jsonl", problems), "--samples",
              write(tmp_path / "s.jsonl", samples))]  # fmt: skip
    row = {"task_id": 600, "prompt": "Add.", "code": "def add(a):\n    return math.floor(a) + 1",
           "test_imports": ["import math"], "test_list": ["assert add(1) == 2"],
           "test": f"{test}assertion(add(2), 3, 0)\n"}  # fmt: skip
    solution = [{"task_id": "Mbpp/600", "solution": "def add(a):\n    return math.ceil(2.0)"}]
    files.append(("--problems", write(tmp_path / "mbpp.jsonl", [row]), "--samples",
                  write(tmp_path / "m.jsonl", solution)))  # fmt: skip
    found = [json.loads(command(module, *arguments, "--json")[1])
             for module, arguments in zip((humaneval, mbpp), files)]  # fmt: skip
    assert [r["benchmark"] for r in found] == ["HumanEval+", "MBPP+"]
    assert (found[0]["pass@1"], found[1]["pass@1"], found[1]["base"]["pass@1"]) == (0.5, 0, 1)


@pytest.mark.parametrize(
    ("module", "rows", "message"),
    [
        (humaneval, [{**PROBLEMS[0], "stop_tokens": []}], "problem 1: unknown field 'stop_tokens'"),
        (mbpp, [{**ROWS[3], "tests": []}], "problem 1: unknown field 'tests'"),
        (humaneval, MBPP_PLUS, "use python -m eval.mbpp"),
        (humaneval, [{**PLUS[0], "base_input": 7}], "not EvalPlus's format: TypeError"),
        (humaneval, [{"task_id": "T/0"}], "KeyError('test')"),
        (humaneval, ROWS, "use python -m eval.mbpp"),
    ],
)
def test_another_benchmark_is_refused_by_name(command, tmp_path, module, rows, message):
    problems = write(tmp_path / "problems.jsonl", rows)
    samples = write(tmp_path / "samples.jsonl", COMPLETE)
    status, _, stderr = command(module, "--problems", problems, "--samples", samples)
    assert (status, message in stderr) == (2, True), stderr


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n\nprint(f(2))\n", "    return 1\n"),
        ("    a\n\n\nx = 1", "    a\n\n\n"),
        ("\n    x = 1\n\n    return x\ndef g():\n    pass", "\n    x = 1\n\n    return x"),
        ("    a\n#\n\ndef g(): pass", "    a"),
        ("\treturn 1\r\n\r\nassert f(1)", "\treturn 1\r\n\r\n"),
        ("return 1", ""),
        ("    # 1\n    # 1\n", "    # 1\n    # 1\n"),
    ],
)
def test_trim(completion, kept):
    assert BODY.trim(completion) == kept


def test_timeouts_follow_the_machine_and_the_reference(command, problems, tmp_path, monkeypatch):
    samples = write(tmp_path / "samples.jsonl", COMPLETE)
    monkeypatch.setattr("eval.harness.slowdown", lambda **limits: 3.0)
    monkeypatch.setattr("eval.harness.self_check", lambda *_, **__: {"T/add": 0.5, "T/sub": 0.1})
    arguments = ("--problems", problems, "--samples", samples, "--json", "--timeout_s", "0.4")
    result = json.loads(command(humaneval, *arguments)[1])
    assert result["slowdown"] == 3.0
    assert result["timeouts_s"] == pytest.approx([1.2, 2.0])


def test_slowdown_is_the_loops_time(monkeypatch):
    seconds = [0.2, 0.9, 0.3, 0.1, 0.5, 0.3]
    verdicts = lambda checks, **limits: [Verdict("passed", "", s) for s in seconds]  # noqa: E731
    monkeypatch.setattr("sandbox.self_check.run_checks", verdicts)
    assert slowdown(workers=2) == pytest.approx(0.3 / LOOP_S)
    seconds = [30.0] * 6
    assert slowdown(workers=2) == SLOWEST


def test_a_self_check_is_read_again_in_the_same_circumstances_alone(tmp_path, monkeypatch):
    made = []

    def ask(rows=PROBLEMS, **limits) -> bool:
        before, work = len(made), lambda: made.append(1) or {"T/add": math.inf}
        found = remembered(tmp_path / "new" / "checks.json", rows, work, **limits)
        assert found == {"T/add": math.inf}
        return len(made) > before

    assert [ask(), ask(), ask(tier="B"), ask()] == [True, False, True, True]
    for field in PROBLEMS[0]:
        assert ask([PROBLEMS[0] | {field: "x"}, PROBLEMS[1]])
    for name in ("platform.node", "sandbox.self_check.code_hash"):
        ask()
        monkeypatch.setattr(name, lambda *_: "another")
        assert ask()


def test_the_second_evaluation_runs_the_samples_alone(command, problems, tmp_path, monkeypatch):
    """Equal samples run once."""
    samples, numbers = write(tmp_path / "samples.jsonl", COMPLETE * 3), []

    def counted(checks, run=run_all, **limits):
        numbers.append(len(checks))
        return run(checks, **limits)

    monkeypatch.setattr("sandbox.self_check.run_all", counted)
    monkeypatch.setattr("eval.harness.run_all", counted)
    arguments = ("--problems", problems, "--samples", samples, "--self_check", tmp_path / "checks")
    assert [command(humaneval, *arguments)[0] for _ in range(2)] == [0, 0]
    assert numbers == [8, 2, 2]  # 2 problems x (1 reference + 3 wrong ones)


SHOT = (
    "[BEGIN]\ndef check(x):\n    return x + 4\n[DONE]\n\nYou are an expert Python programmer, and "
)
TASK = """here is your task: Write a function to add 11. Your code should pass these tests:

assert check(1) == 12
assert check(0) == 11
[BEGIN]
"""


@pytest.mark.parametrize(("protocol", "asked"), [
    ("docstring", '"""\nWrite a function to add 11.\nassert check(1) == 12\n"""\n'),
    ("three-shot", SHOT + TASK)])  # fmt: skip
def test_mbpp(command, model, tmp_path, protocol, asked):
    path = write(tmp_path / "mbpp.jsonl", ROWS)
    answer = "\ndef check(x):\n    return x + 11\n"
    model.answers |= {"add 11": [answer], "add 12": [answer]}
    status, stdout, stderr = command(
        mbpp, "--problems", path, "--checkpoint", "run", "--protocol", protocol, "--json"
    )
    assert status == 0, stderr
    result = json.loads(stdout)
    assert (result["protocol"], result["benchmark"]) == (protocol, "MBPP")
    assert (result["problems"], result["pass@1"]) == (2, 0.5)
    assert model.prompts[0].endswith(asked)


def test_mbpp_files_that_are_none(command, tmp_path):
    for rows, options, message in [
        (PROBLEMS, [], "not MBPP"),
        (ROWS[2:], ["--protocol", "three-shot"], "lacks task_id (2, 3, 4)"),
        (ROWS[:3], [], "no problems"),
        (ROWS, ["--protocol", "other"], "want docstring or three-shot"),
    ]:
        path = write(tmp_path / "mbpp.jsonl", rows)
        _, _, stderr = command(mbpp, "--problems", path, "--checkpoint", "run", *options)
        assert message in stderr


def test_benchmark_files_are_read_whole(shared_eval):
    for file, name, tests in (("mbpp.jsonl", "MBPP", 500),
                              ("sanitized-mbpp.json", "MBPP sanitized", 257)):  # fmt: skip
        found, rows = read_mbpp(shared_eval / file)
        assert (found, sum(row.id in mbpp.TEST_IDS for row in rows)) == (name, tests)
        assert mbpp.three_shots(file, rows).count("[DONE]") == 3
