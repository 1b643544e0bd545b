"""Match functions by the edit distance of their syntax trees, for many pairs at once.

The paper prunes CodeExercises by the edit distance of syntax trees (arXiv 2306.11644, section 5)
and leaves the details open. Ours encodes a function as its node types in preorder (for a constant,
the type of its value). Operators and structure count; names, strings, comments and layout do not.
Docstrings, annotations, decorators, `pass` and a method's `self` are skipped, as a copy may add or
drop them; `print(x)` counts as `return x`. Two sequences have

    match rate = 1 - Levenshtein distance / length of the longer one

which is 1 for the same structure and 0.95 for a copy with one more node in twenty.
"""

import ast
import html
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.base.syntax import FUNCTIONS, docstring, parse_python

LEFT_OUT = {"ctx", "annotation", "returns", "decorator_list", "type_params", "type_comment",
            "id", "attr", "arg", "name", "asname", "module", "level"}  # fmt: skip
CODE = defaultdict(lambda: len(CODE))  # {node type or constant's type: byte}
SELF = {"self", "cls"}
SCRIPT_STATEMENTS = 40  # a longer script is not taken for a solution
SCRIPT_INPUTS = 6  # up to this many leading statements may stand for arguments
REPAIRS = 5  # lines to cut short before giving up on a function that does not parse
DEF = re.compile(r"def[ \t]+\w+[ \t]*\(")
TAGGED_DEF = re.compile(r"def</\w+>")
# Ways to quote Python: at a prompt, as HTML, in a string, as a list of strings.
PROMPT = re.compile(r"^([ \t]*)(?:>>>|\.\.\.:?|In \[\d+\]:) ?", re.MULTILINE)
TAG = re.compile(r"</?[a-zA-Z][^<>\n]*>")
STRING = re.compile(r"""(["'])((?:(?!\1)[^\\\n]|\\.)*)\1""")
NEXT_STRING = re.compile(r"""\\n(["']),\s*\1""")
ESCAPE = re.compile(r"\\(u00[0-7][0-9a-fA-F]|.)")
ESCAPED = {"n": "\n", "t": "\t", "r": ""}


@dataclass(frozen=True)
class Function:
    """A function in a source text, or a script read as one."""

    name: str
    nodes: bytes  # from `encode`
    lines: list[str]
    column: int = 0  # where `def` starts in the first line

    @property
    def text(self) -> str:
        """Return the lines, dedented by the first line's indent."""
        return "\n".join(line[self.column :] for line in self.lines)


class Shapes(dict):
    """{node type: (code, child fields, last first)}; None for types to skip."""

    def __missing__(self, kind: type) -> tuple[int, list[str]] | None:
        fields = [f for f in reversed(getattr(kind, "_fields", ())) if f not in LEFT_OUT]
        self[kind] = (CODE[kind], fields) if issubclass(kind, ast.AST) else None
        return self[kind]


SHAPES = Shapes({ast.Pass: None})


def encode(tree: ast.AST) -> tuple[bytes, list[tuple[ast.AST, int, int]]]:
    """Encode the tree in preorder, one byte per node; return that and each function's span."""
    codes, found, stack = bytearray(), [], [tree]
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind is tuple:  # marks the end of a function
            found.append((*node, len(codes)))
            continue
        if kind is ast.Constant:
            codes.append(CODE[type(node.value)])
            continue
        if (shape := SHAPES[kind]) is None:  # None in a list, a name, `pass`
            continue
        code, fields = shape
        if kind in FUNCTIONS:
            stack.append((node, len(codes)))
        elif kind is ast.arg and node.arg in SELF:
            continue
        elif kind is ast.Attribute and getattr(node.value, "id", "") in SELF:
            codes.append(CODE[ast.Name])
            continue
        elif kind is ast.Expr and (printed := print_of(node.value)):
            codes.append(CODE[ast.Return])
            stack.append(printed)
            continue
        codes.append(code)
        for field in fields:
            value = getattr(node, field)
            if type(value) is list:
                if field == "body" and "decorator_list" in kind._fields and docstring(node):
                    value = value[1:]
                stack += value[::-1]
            else:
                stack.append(value)
    return bytes(codes), found


def print_of(node: ast.expr) -> ast.expr | None:
    """Return the argument of a `print` call, a tuple for several; None for any other node."""
    called = type(node) is ast.Call and getattr(node.func, "id", "") == "print"
    many = called and len(node.args) > 1
    return ast.Tuple(node.args) if many else node.args[0] if called and node.args else None


def functions(source: str) -> list[Function]:
    """Return all functions in `source`, nested ones too, by line. Raises SyntaxError."""
    return functions_of(parse_python(source), source.split("\n"))


def functions_of(tree: ast.Module, lines: list[str]) -> list[Function]:
    codes, spans = encode(tree)
    spans.sort(key=lambda of: (of[0].lineno, of[0].col_offset))
    return [Function(node.name, codes[a:b], lines[node.lineno - 1 : node.end_lineno],
                     node.col_offset) for node, a, b in spans]  # fmt: skip


def functions_anywhere(text: str) -> list[Function] | None:
    """Find the functions in Python source or in text that quotes it; None without any Python.

    If the text does not parse, or the parser misses a `def`, read from each `def` on: as is,
    without prompts and tags, and inside strings. Read a script without functions as one function,
    with its first statements (zero or more) as the arguments.
    """
    try:
        tree = parse_python(text)
        found = functions_of(tree, text.split("\n"))
    except SyntaxError:
        tree, found = None, []
    if len(DEF.findall(text)) > len(found) or TAGGED_DEF.search(text):
        seen = {f.lines[0] for f in found}
        for reading in dict.fromkeys((text, plain(text))):
            for source in cut(reading, seen):
                found += repaired(source)
        for string in STRING.finditer(NEXT_STRING.sub(r"\\n", text)):
            if DEF.search(string[2]) and "\\n" in string[2]:
                found += functions_anywhere(ESCAPE.sub(unescaped, string[2])) or []
    elif tree is not None and not found:
        return scripts(tree, text)
    return found if found or tree is not None else None


def scripts(tree: ast.Module, text: str) -> list[Function]:
    """Read a script as a function with 0, 1, ... arguments; return one Function for each."""
    body = tree.body[docstring(tree) is not None :]
    body = list(itertools.dropwhile(lambda n: isinstance(n, (ast.Import, ast.ImportFrom)), body))
    if len(body) > SCRIPT_STATEMENTS:
        return []
    parts = [encode(node)[0] for node in body]
    head = bytes([CODE[ast.FunctionDef], CODE[ast.arguments]])
    arg = bytes([CODE[ast.arg]])
    return [Function("", head + arg * n + b"".join(parts[n:]), text.split("\n"))
            for n in range(min(SCRIPT_INPUTS + 1, len(body)))]  # fmt: skip


def plain(text: str) -> str:
    """Strip prompts and HTML tags."""
    if ">>> " in text or "In [" in text:
        text = PROMPT.sub(r"\1", text)
    return html.unescape(TAG.sub("", text) if "</" in text else text)


def unescaped(match: re.Match) -> str:
    escape = match[1]
    return chr(int(escape[1:], 16)) if escape[1:] else ESCAPED.get(escape, escape)


def cut(text: str, seen: set[str]) -> Iterator[str]:
    """Yield each outermost `def` not on a line in `seen`, without the prefix of its lines."""
    lines, at = text.split("\n"), 0
    while at < len(lines):
        begin, at = DEF.search(lines[at]), at + 1
        if not begin or begin.string in seen:
            continue
        before, own = begin.string[: begin.start()], [begin.string[begin.start() :]]
        before = before.removesuffix("async ")
        if at < len(lines) and not lines[at].startswith(before):
            before = ""  # a prefix of the first line only
        deeper = tuple(before + c for c in " \t#")
        while at < len(lines) and (
            lines[at].startswith(deeper)
            or lines[at].strip() in ("", before.strip())
            or lines[at].lstrip()[0] == ")"
        ):
            own.append(lines[at][len(before) :])
            at += 1
        yield "\n".join(own).expandtabs()


def repaired(source: str) -> list[Function]:
    """Return the functions in `source`; cut lines off where they do not parse."""
    for _ in range(REPAIRS):
        lines = source.split("\n")
        try:
            return functions_of(parse_python(source), lines)
        except SyntaxError as e:
            if not e.lineno or e.lineno > len(lines):
                break
            line = lines[e.lineno - 1]
            kept = line[: max(e.offset or 0, 1) - 1]
            indent = line[: len(line) - len(line.lstrip())]
            lines[e.lineno - 1] = kept if kept.strip() else indent + "pass"
            source = "\n".join(lines)
    return []


class Matcher:
    """Match many sequences against a few patterns (the benchmark's problems)."""

    def __init__(self, patterns: list[bytes], min_rate: float):
        """Take the lowest match rate that counts, `min_rate` > 0."""
        self.patterns, self.min_rate = patterns, min_rate

    def match(self, sequences: list[bytes]) -> Iterator[tuple[int, int, float]]:
        """Yield (pattern index, sequence index, match rate), both indexes ascending."""
        from rapidfuzz.distance import Levenshtein  # here: scoring a benchmark needs no matching
        from rapidfuzz.process import cdist

        rates = cdist(
            self.patterns,
            sequences,
            scorer=Levenshtein.normalized_similarity,
            score_cutoff=self.min_rate - 1e-6,  # a rate equal to the cutoff may read 0
            dtype=np.float64,
        )
        for number, index in np.argwhere(rates >= self.min_rate - 1e-9).tolist():
            yield number, index, float(rates[number, index])
