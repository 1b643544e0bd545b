"""Compute what a lesson shows about a function: types, docstring, loop rounds, mistakes.

All of it comes from running the function on the lesson's own calls, so it is true. Used by
textbooks.py.
"""

import ast
import contextlib
import copy
import re
import sys
import textwrap
from collections.abc import Callable

WIDTH = 79  # of docstring and comment lines
MOST_ROUNDS, MOST_CHARS = 6, 36  # limits of a trace: rounds, characters per value
SCALARS = {type(None): "None", bool: "bool", int: "int", float: "float", str: "str"}
EDGES = {"[]": "the empty list", "''": "the empty string", "{}": "the empty dictionary"}
EDGES |= {"0": "zero", "None": "None"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def outcome(call: str, namespace: dict) -> str:
    """Return the repr of `call`'s result, or its error as the last traceback line."""
    try:
        return repr(eval(call, namespace))
    except Exception as e:
        return f"{type(e).__name__}: {e}".rstrip(": ")


def plain(call: str) -> str:
    """Evaluate parts of arguments such as `[1, 2] + [3]`, except floats, which may lose digits."""

    def parts(node: ast.AST):
        inside = [*ast.walk(node)]
        fixed = not any(isinstance(part, (ast.Name, ast.Call)) for part in inside)
        fixed &= not any(isinstance(getattr(part, "value", None), float) for part in inside)
        if isinstance(node, (ast.BinOp, ast.Subscript)) and fixed:
            yield node.col_offset, node.end_col_offset, repr(eval(ast.unparse(node)))
        elif not isinstance(node, (ast.Lambda, ast.JoinedStr)):
            for child in ast.iter_child_nodes(node):
                yield from parts(child)

    calls = [node for node in ast.walk(ast.parse(call, mode="eval")) if isinstance(node, ast.Call)]
    changes = {change for node in calls for arg in node.args for change in parts(arg)}
    for start, end, text in sorted(changes, reverse=True):
        call = call[:start] + text + call[end:]
    return call


def function_in(code: str, name: str) -> ast.FunctionDef | None:
    found = [n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[0] if found else None


# ---- Types, from values


def type_of(values) -> str:
    """Return a type hint that holds for all values, such as "list[int]"; "" if none does.

    If the element type is unknown, return the bare container: "list".
    """
    types = {type(v) for v in values}
    if type(None) in types and len(types) > 1:
        inner = type_of([v for v in values if v is not None])
        return inner and f"{inner} | None"
    if types == {int, float}:
        return "float"
    if len(types) != 1:
        return ""
    (kind,) = types
    if kind is dict:
        inside = [[k for v in values for k in v], [x for v in values for x in v.values()]]
    elif kind is tuple:
        if len({len(v) for v in values}) != 1 or not values[0]:
            return "tuple"
        inside = [*zip(*values)]
    elif kind in (list, set):
        inside = [[x for v in values for x in v]]
    else:
        return SCALARS.get(kind, "")
    inner = [type_of(x) if x else "" for x in inside]
    return f"{kind.__name__}[{', '.join(inner)}]" if all(inner) else kind.__name__


def as_floats(value):
    """Convert all ints in the value to floats."""
    if type(value) is dict:
        return dict(map(as_floats, value.items()))
    if type(value) in (list, tuple, set):
        return type(value)(map(as_floats, value))
    return float(value) if type(value) is int else value


def takes_floats(function, args: list) -> bool:
    """Return whether some argument accepts floats as well as ints, so no hint is certain."""
    for i, arg in enumerate(args):
        if repr(other := as_floats(arg)) != repr(arg):
            with contextlib.suppress(Exception):
                function(*copy.deepcopy([*args[:i], other, *args[i + 1 :]]))
                return True
    return False


def from_typing(hints) -> tuple[str, tuple[str, ...]]:
    """Respell hints with the typing module; return the import line and the new hints."""

    def spell(node: ast.expr) -> str:
        match node:
            case ast.BinOp(inner):
                return f"Optional[{spell(inner)}]"
            case ast.Subscript(ast.Name(name), inner):
                return f"{name.title()}[{spell(inner)}]"
            case ast.Tuple(parts):
                return ", ".join(map(spell, parts))
        return ast.unparse(node)

    old = tuple(hint and spell(ast.parse(hint, mode="eval").body) for hint in hints)
    names = sorted(set(re.findall(r"\b(Dict|List|Optional|Set|Tuple)\b", " ".join(old))))
    return f"from typing import {', '.join(names)}\n\n\n" * bool(names), old


def hints(function: ast.FunctionDef, calls: list[str], namespace: dict) -> list[str]:
    """Return the argument and result types seen in `calls`, [] if they are not clear."""
    seen = []
    for call in calls:
        node = ast.parse(call, mode="eval").body
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == function.name):
            continue
        if node.keywords or len(node.args) != len(function.args.args):
            return []
        args = [eval(ast.unparse(part), namespace) for part in node.args]
        if takes_floats(namespace[function.name], args):
            return []
        seen.append([*args, eval(call, namespace)])
    found = [*map(type_of, zip(*seen))]
    bare = re.compile(r"\b(list|dict|set|tuple)\b(?!\[)")
    returns = [ast.unparse(n) for n in ast.walk(function) if isinstance(n, ast.Return)]
    partial = "None" in " ".join(returns) and "None" not in found[-1]
    return [] if partial or any(not hint or bare.search(hint) for hint in found) else found


# ---- A function as a programming exercise


def documented(
    code: str, name: str, says: str, calls: list[str], namespace: dict, typed: str, told: int
) -> str:
    """Add a docstring to function `name` in `code`: `says`, and up to `told` calls as doctests.

    `typed` "new" or "old" (typing module) adds type hints if the calls determine them.
    """
    function = function_in(code, name)
    assert function, f"no function {name}"
    lines, head = code.split("\n"), f"def {name}({ast.unparse(function.args)}):"
    imports = ""
    if typed and (types := hints(function, calls, namespace)):
        if typed == "old":
            imports, types = from_typing(types)
        for arg, hint in zip(function.args.args, types):
            arg.annotation = ast.Name(hint)
        head = f"def {name}({ast.unparse(function.args)}) -> {types[-1]}:"
    text = textwrap.fill(says, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    examples = [prompted(c, outcome(c, namespace)) for c in calls if c.startswith(f"{name}(")]
    examples = [e for e in examples if len(e) < 95 and "\\" not in e][:told]
    if examples:
        text += "\n\n" + "\n".join(examples)
    end = "\n" * ("\n" in text)
    quoted = textwrap.indent(f'"""{text}{end}"""', "    ")
    first = function.body[0].lineno - 1
    start = function.lineno - 1
    return imports + "\n".join([*lines[:start], head, quoted, *lines[first:]])


def imperative(task: str) -> str:
    """Turn "Write `f`, which gives the ..." into a docstring; "" for any other wording."""
    found = re.match(r"Write (?:a [\w ]+ )?`\w+`,? (?:which|that) (\w+) (.*)", task)
    if not found:
        return ""
    verb = re.sub("ies$", "y", found[1])
    verb = re.sub("(?<=ss|sh|ch|do|go|ix)es$|s$", "", verb) if verb == found[1] else verb
    verb = "return" if verb == "give" or found[2].startswith("whether") else verb
    return f"{verb.capitalize()} {found[2]}"


def comment(text: str) -> str:
    """Return prose as comment lines."""
    plain = " ".join(text.replace("`", "").split())
    return "\n".join(f"# {line}" for line in textwrap.wrap(plain, WIDTH - 2))


# ---- Execution


def prompted(call: str, result: str) -> str:
    """Return a call at the prompt and Python's output; test for None, which prints nothing."""
    return f">>> {call} is None\nTrue" if result == "None" else f">>> {call}\n{result}"


def edge(call: str, name: str) -> str:
    """Return the edge case in the first argument of a call of `name`, "" if it is none."""
    node = ast.parse(call, mode="eval").body
    called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == name and node.args
    return EDGES.get(ast.unparse(node.args[0]), "") if called else ""


def means(code: str, name: str) -> str:
    """Return how the function `name` works, in words such as "with one loop"."""
    nodes = [*ast.walk(function_in(code, name) or ast.Module([], []))]
    loops = sum(isinstance(node, (ast.For, ast.While)) for node in nodes)
    if any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == name for n in nodes):
        return "by recursion"
    if loops:
        return "with one loop" if loops == 1 else "with more than one loop"
    if any(isinstance(node, COMPREHENSIONS) for node in nodes):
        return "with a comprehension"
    return "without a loop" if nodes[1:] else f"in {len(code.splitlines())} lines"


def shown(value: object) -> str:
    """Return the value as code; sort sets, as their order differs between runs."""
    if isinstance(value, set) and value:
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    return repr(value)


def rounds(code: str, call: str, namespace: dict) -> list[dict[str, str]]:
    """Return the variables at the start of each round of the called function's first loop.

    Empty without a loop, for a long trace, or if line numbers cannot tell the rounds apart.
    """
    node = ast.parse(call, mode="eval").body
    function = function_in(code, getattr(getattr(node, "func", None), "id", ""))
    loops = [n for n in (function.body if function else []) if isinstance(n, (ast.For, ast.While))]
    if not loops or isinstance(loops[0].body[0], (ast.For, ast.While, ast.FunctionDef)):
        return []
    if any(isinstance(n, COMPREHENSIONS) for n in ast.walk(loops[0].body[0])):
        return []
    line, seen = loops[0].body[0].lineno, []
    space = dict(namespace)
    exec(compile(code, "<lesson>", "exec"), space)

    def trace(frame, event, _) -> Callable | None:
        if frame.f_code.co_filename != "<lesson>":
            return None
        if event == "line" and frame.f_lineno == line:
            seen.append({k: shown(v) for k, v in frame.f_locals.items() if k != "_"})
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        eval(call, space)
    finally:
        sys.settrace(before)
    same = {k for k, v in seen[0].items() if all(r.get(k) == v for r in seen)} if seen else set()
    seen = [{k: v for k, v in r.items() if k not in same} for r in seen]
    long = any(len(v) > MOST_CHARS or " at 0x" in v for r in seen for v in r.values())
    plain = 2 <= len(seen) <= MOST_ROUNDS and len(seen[0]) > 1 and not long
    return seen if plain else []


def table(seen: list[dict[str, str]]) -> str:
    """Format rounds as aligned columns."""
    names = [*dict.fromkeys(name for row in seen for name in row)]
    rows = [["step", *names]]
    rows += [[str(i), *(row.get(n, "-") for n in names)] for i, row in enumerate(seen, 1)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def differences(wrong: str, calls: list[str], namespace: dict) -> list[tuple[str, str, str]]:
    """Return (call, got, want) for each call where `wrong` differs from the right code."""
    space = dict(namespace)
    exec(wrong, space)
    both_ways = [(c, outcome(c, space), outcome(c, namespace)) for c in calls]
    return [row for row in both_ways if row[1] != row[2]]
