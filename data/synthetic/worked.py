"""Work out what a lesson shows of a function: its types, its docstring, its rounds, its mistakes.

All of it is taken from running the function on the lesson's own calls, so that it is true. Used by
textbooks.py.
"""

import ast
import functools
import re
import sys
import textwrap
from collections.abc import Callable

WIDTH = 79  # of a docstring's and a comment's lines
MOST_ROUNDS, MOST_CHARS = 6, 36  # of a trace, of one value in it
FIXED = (ast.BinOp, ast.Subscript, ast.Slice, ast.List, ast.Tuple, ast.Constant, ast.UnaryOp,
         ast.operator, ast.unaryop, ast.expr_context)  # fmt: skip
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def outcome(call: str, namespace: dict) -> str:
    """Return what `call` gives, or the error that it raises, as the last line of a traceback."""
    try:
        return repr(eval(call, namespace))
    except Exception as e:
        return f"{type(e).__name__}: {e}".rstrip(": ")


def plain(call: str) -> str:
    """`call` with arguments such as `[1, 2] + [3]` worked out, where that loses no digits."""
    changes = []
    for node in ast.walk(ast.parse(call, mode="eval")):
        for arg in node.args if isinstance(node, ast.Call) else []:
            parts = [*ast.walk(arg)]
            fixed = all(isinstance(part, FIXED) for part in parts)
            floats = any(isinstance(getattr(part, "value", None), float) for part in parts)
            if isinstance(arg, (ast.BinOp, ast.Subscript)) and fixed and not floats:
                changes.append((arg.col_offset, arg.end_col_offset, repr(eval(ast.unparse(arg)))))
    for start, end, text in sorted(changes, reverse=True):
        call = call[:start] + text + call[end:]
    return call


def function_in(code: str, name: str) -> ast.FunctionDef | None:
    found = [n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[0] if found else None


# ---- Types, from values

# A kind is (type's name, *kinds of its parts), and None where nothing has been seen.
Kind = tuple | None


class Unclear(Exception):
    """There is no simple type for these values."""


def kind(value: object) -> Kind:
    name = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, str)):
        return (name,)
    if isinstance(value, (list, set)):
        return name, functools.reduce(both, map(kind, value), None)
    if isinstance(value, tuple):
        return name, *map(kind, value)
    if isinstance(value, dict):
        parts = (functools.reduce(both, map(kind, p), None) for p in (value, value.values()))
        return "dict", *parts
    raise Unclear


def both(a: Kind, b: Kind) -> Kind:
    """Return the kind of what may be of either kind."""
    if a is None or a == b:
        return b
    if b is None:
        return a
    if a[0] == b[0] and len(a) == len(b):
        return a[0], *map(both, a[1:], b[1:])
    if {a[0], b[0]} == {"int", "float"}:
        return ("float",)
    none, optional = ("NoneType",), "optional"
    if none in (a, b) or optional in (a[0], b[0]):
        inner = [k[1] if k[0] == optional else None if k == none else k for k in (a, b)]
        return optional, both(*inner)
    raise Unclear


def spell(k: Kind, old: bool) -> str:
    """Return a kind as a type hint; `old` is that of the module typing."""
    if k is None:
        raise Unclear
    parts = [spell(part, old) for part in k[1:]]
    if k[0] == "NoneType":
        return "None"
    if k[0] == "optional":
        return f"Optional[{parts[0]}]" if old else f"{parts[0]} | None"
    if not parts:
        return k[0]
    return f"{k[0].capitalize() if old else k[0]}[{', '.join(parts)}]"


def hints(function: ast.FunctionDef, calls: list[str], namespace: dict, old: bool) -> list[str]:
    """Types of the arguments and of the result, of what `calls` give and get. Raises Unclear."""
    seen: list[Kind] = [None] * (len(function.args.args) + 1)
    for call in calls:
        node = ast.parse(call, mode="eval").body
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == function.name):
            continue
        if node.keywords or len(node.args) + 1 != len(seen):
            raise Unclear
        values = [eval(ast.unparse(part), namespace) for part in [*node.args, node]]
        seen = [both(k, kind(value)) for k, value in zip(seen, values)]
    return [spell(k, old) for k in seen]


# ---- A function as a programming exercise


def documented(
    code: str, name: str, says: str, calls: list[str], namespace: dict, typed: str, told: int
) -> str:
    """`code` with a docstring in its function `name`: what it does, and `told` calls as doctests.

    Type hints join them where the calls make the types plain, and `typed` is "new", or "old" (those
    of the module typing), not "".
    """
    function = function_in(code, name)
    assert function, f"no function {name}"
    lines, head = code.split("\n"), f"def {name}({ast.unparse(function.args)}):"
    imports = ""
    if typed:
        try:
            *types, result = hints(function, calls, namespace, typed == "old")
            for arg, hint in zip(function.args.args, types, strict=True):
                arg.annotation = ast.Name(hint)
            head = f"def {name}({ast.unparse(function.args)}) -> {result}:"
            used = sorted({*re.findall(r"\b(Dict|List|Optional|Set|Tuple)\b", head)})
            imports = f"from typing import {', '.join(used)}\n\n\n" if used else ""
        except Unclear:
            pass
    text = textwrap.fill(says, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    doc = [*text.split("\n")]
    own = [call for call in calls if call.startswith(f"{name}(")]
    examples = [(call, outcome(call, namespace)) for call in own]
    examples = [e for e in examples if len("".join(e)) < 90 and "\\" not in "".join(e)][:told]
    if examples:
        doc += ["", *(line for call, result in examples for line in (f">>> {call}", result))]
    quoted = [f'    """{doc[0]}', *(f"    {line}".rstrip() for line in doc[1:])]
    quoted = [quoted[0] + '"""'] if len(doc) == 1 else [*quoted, '    """']
    first = function.body[0].lineno - 1
    start = function.lineno - 1
    return imports + "\n".join([*lines[:start], head, *quoted, *lines[first:]])


def imperative(task: str) -> str:
    """A docstring out of "Write `f`, which gives the ...", or "" where it is put otherwise."""
    found = re.match(r"Write (?:a [\w ]+ )?`\w+`,? (?:which|that) (\w+) (.*)", task)
    if not found:
        return ""
    verb = re.sub("ies$", "y", found[1])
    verb = re.sub("(?<=ss|sh|ch|do|go|ix)es$|s$", "", verb) if verb == found[1] else verb
    return f"{verb.capitalize()} {found[2]}"


def comment(text: str) -> str:
    """Prose as comment lines."""
    plain = " ".join(text.replace("`", "").split())
    return "\n".join(f"# {line}" for line in textwrap.wrap(plain, WIDTH - 2))


# ---- What happens in it


def shown(value: object) -> str:
    """Return the value as code; a set in order, as its own order differs from run to run."""
    if isinstance(value, set) and value:
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    return repr(value)


def rounds(code: str, call: str, namespace: dict) -> list[dict[str, str]]:
    """Return the variables at the beginning of each round of the first loop of the function called.

    Empty where there is none, where it is long, or where its lines do not tell the rounds apart.
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
            seen.append({k: shown(v) for k, v in frame.f_locals.items()})
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
    plain = 2 <= len(seen) <= MOST_ROUNDS and seen[0] and not long
    return seen if plain else []


def differences(
    code: str, wrong: str, calls: list[str], namespace: dict
) -> list[tuple[str, str, str]]:
    """Return the calls that `wrong` code gets wrong: (call, what it gives, what it should give)."""
    space = dict(namespace)
    exec(wrong, space)
    both_ways = [(c, outcome(c, space), outcome(c, namespace)) for c in calls]
    return [row for row in both_ways if row[1] != row[2]]
