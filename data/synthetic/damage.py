"""Damage exercise solutions, each with one small error typical of language models.

CodeExercises, written by a model, has errors, and phi-1 still learned from it (arXiv 2306.11644,
section 2.2); `python -m data.exercises --damage_frac 0.5` measures the effect. Each damaged body is
run first: it must end, mostly without an exception, and give a wrong result.
"""

import ast
import contextlib
import copy
import functools
import itertools
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace

from tqdm import tqdm

from data.synthetic.families import Task
from data.synthetic.forms import POOL, Exercise, fill, pool, results

BUDGET = 20_000  # trace events per input; beyond that, a body counts as endless
BIG_BITS = 10_000  # a larger int in a local variable counts as endless, too
LOOK_EVERY = 8  # lines between these checks, which are slow
TRIES = 8  # errors to try per solution before keeping it intact
OPERATORS = {  # {node: (operator, replacements ...)}
    ast.Lt: ("<", "<=", ">"),
    ast.LtE: ("<=", "<", ">="),
    ast.Gt: (">", ">=", "<"),
    ast.GtE: (">=", ">", "<="),
    ast.Eq: ("==", "!=", ">="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "sorted": "list"}
NAMES |= {"upper": "lower", "lower": "upper", "isupper": "islower", "islower": "isupper"}
NAMES |= {"startswith": "endswith", "endswith": "startswith", "isdigit": "isalpha"}
NAMES |= {"isalpha": "isdigit", "append": "extend", "values": "keys"}


def damage(
    exercises: list[Exercise], frac: float, seed: int, allowed: Callable[[Task, str], bool]
) -> list[Exercise]:
    """Return the exercises, a share `frac` with a wrong solution that `allowed(task, body)`.

    Damage fewer if too few exercises have a suitable error.
    """
    exercises, rng = [*exercises], random.Random(f"damage {seed}")
    wanted = round(frac * len(exercises))
    order = rng.sample(range(len(exercises)), len(exercises)) if wanted else []
    for i in tqdm(order, "damage", disable=None):
        if not wanted:
            break
        task = exercises[i].task
        bodies = damaged_bodies(task.body)
        for wrong in rng.sample(bodies, len(bodies))[:TRIES]:
            if is_wrong(task, wrong) and allowed(task, wrong):
                exercises[i] = replace(exercises[i], wrong=wrong)
                wanted -= 1
                break
    return exercises


@functools.cache
def damaged_bodies(body: str) -> list[str]:
    """Return variants of `body` with one error each, all of which parse."""
    source = fill(body, ("_a_", "_b_", "_c_")).replace("$f", "_f_")
    changed = (source[:i] + new + source[j:] for i, j, new in damages(source))
    return [*dict.fromkeys(re.sub(r"\b_([abcf])_\b", r"$\1", text) for text in changed)]


def damages(source: str) -> Iterator[tuple[int, int, str]]:
    """Yield (i, j, new): replacing source[i:j] by `new` adds one error and still parses.

    Yields nothing for non-ASCII source. Raises SyntaxError.
    """
    if not source.isascii():  # ast counts bytes
        return
    starts = [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
    begin = lambda node: starts[node.lineno - 1] + node.col_offset  # noqa: E731
    end = lambda node: starts[node.end_lineno - 1] + node.end_col_offset  # noqa: E731
    for node in ast.walk(ast.parse(source)):
        for i, j, new in edits(node, source, begin, end):
            with contextlib.suppress(SyntaxError):
                ast.parse(source[:i] + new + source[j:])
                yield i, j, new


def edits(node, source: str, begin, end) -> Iterator[tuple[int, int, str]]:
    """Yield replacements (start, end, new text) in `source` that damage `node`."""

    def operator(left, op, right):
        old, *others = OPERATORS.get(type(op), ("",))
        between = source[end(left) : begin(right)]
        return [(end(left), begin(right), between.replace(old, new, 1)) for new in others]

    match node:
        case ast.Compare(left, ops, rights):
            for a, op, b in zip([left, *rights], ops, rights):
                yield from operator(a, op, b)
        case ast.BinOp(left, op, right):
            yield from operator(left, op, right)
        case ast.AugAssign(target, op, value):
            yield from operator(target, op, value)
        case ast.BoolOp(op, [*_, left, right]):
            yield from operator(left, op, right)
            yield begin(left), begin(right), ""  # a dropped condition
            yield end(left), end(right), ""
        case ast.comprehension(iter=source_, ifs=[*_, last]):
            yield end(source_), end(last), ""
        case ast.UnaryOp(ast.Not(), operand):
            yield begin(node), begin(operand), ""
        case ast.IfExp(body=a, orelse=b) | ast.If(body=[a], orelse=[b]):
            middle = source[end(a) : begin(b)]
            if isinstance(node, ast.If) or begin(a) < begin(b):
                swapped = source[begin(b) : end(b)] + middle + source[begin(a) : end(a)]
                yield begin(a), end(b), swapped
        case ast.Constant(bool()):
            yield begin(node), end(node), str(not node.value)
        case ast.Constant(int()):
            yield begin(node), end(node), str(node.value + 1)
            if node.value:
                yield begin(node), end(node), str(node.value - 1)
        case ast.Constant(str()) if len(node.value) > 1:
            yield end(node) - 2, end(node) - 1, ""
        case ast.Name(id=name) if name in NAMES:
            yield begin(node), end(node), NAMES[name]
        case ast.Attribute(attr=name) if name in NAMES:
            yield end(node) - len(name), end(node), NAMES[name]
        case ast.Call(args=[*_, last], keywords=[ast.keyword(arg="reverse")]):
            yield end(last), end(node) - 1, ""
        case ast.Break():
            yield begin(node), end(node), "continue"
        case ast.Return(value) if value:
            yield begin(node), begin(value), ""  # a missing return
            if re.search(r"\n    .*\n$", source[: begin(node)]):
                yield begin(node), begin(node), "    "  # a return inside the loop


class Endless(Exception):
    pass


@functools.cache
def is_wrong(task: Task, wrong: str) -> bool:
    """Return whether this body ends on every pool input, raises on at most half of them, and
    differs from the oracle on at least one."""
    arguments = ("_a_", "_b_", "_c_")[: len(task.args.split())]
    source = textwrap.indent(fill(wrong.replace("$f", "f"), arguments), "    ")
    namespace, steps, lines, wrongs, failures = {}, 0, 0, 0, 0
    exec(f"def f({', '.join(arguments)}):\n{source}\n", namespace)
    code = namespace["f"].__code__

    def trace(frame, event, value):
        nonlocal steps, lines
        steps += 1
        if event != "line":  # Python ignores exceptions raised on closing a generator
            return trace
        if steps > BUDGET:
            raise Endless
        if frame.f_code is code:
            lines += 1
            if lines % LOOK_EVERY == 0:
                for v in frame.f_locals.values():
                    if isinstance(v, int) and v.bit_length() > BIG_BITS:
                        raise Endless
        return trace

    before = sys.gettrace()
    try:
        for inputs, wanted in zip(copy.deepcopy(pool(task.args)), results(task)):
            steps = 0
            sys.settrace(trace)  # again: Python drops a failed trace, e.g. in deep recursion
            try:
                got = namespace["f"](*inputs)
                wrongs += got != wanted or type(got) is not type(wanted)
            except Endless:
                return False
            except Exception:
                failures += 1
    finally:
        sys.settrace(before)
    return wrongs > 0 and failures <= POOL // 2
