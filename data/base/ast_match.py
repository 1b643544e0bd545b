"""Match functions by syntax: the edit distance of their trees, for many pairs at once.

The paper prunes CodeExercises by the edit distance of syntax trees (arXiv 2306.11644, section 5)
and leaves the details open. Ours: a function is the sequence of its tree's nodes in preorder, each
as its type alone (a constant as the type of its value), without docstrings, annotations and
decorators. So names, texts, comments and layout do not count; operators and structure do. Two
sequences have

    match rate = 1 - Levenshtein distance / length of the longer one

which is 1 for the same structure, and 0.95 for a copy with one more node in twenty.
"""

import ast
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from data.base.syntax import FENCE, FUNCTIONS, docstring, parse_python

LEFT_OUT = {"ctx", "annotation", "returns", "decorator_list", "type_params", "type_comment"}
CODE = defaultdict(lambda: len(CODE))  # of a node's type, or of a constant's: a byte


@dataclass(frozen=True)
class Function:
    """A function in some source text."""

    name: str
    text: str  # its lines, dedented as far as the first one is indented
    nodes: bytes  # its tree as `node_codes` encodes it


def functions(source: str) -> list[Function]:
    """Return the functions in `source`, methods and nested ones too, in the order of their lines.

    Raises SyntaxError.
    """
    lines, found = source.split("\n"), []
    nodes = [n for n in ast.walk(parse_python(source)) if isinstance(n, FUNCTIONS)]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
        own = [line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno]]
        found.append(Function(node.name, "\n".join(own), node_codes(node)))
    return found


def functions_anywhere(text: str) -> list[Function]:
    """Find the functions in Python, or in a text's fenced code blocks that are Python."""
    found = []
    for block in (text, *FENCE.findall(text)):
        with contextlib.suppress(SyntaxError):
            found += functions(block)
            if block is text:
                break
    return found


def node_codes(tree: ast.AST) -> bytes:
    """Encode the tree in preorder, a byte a node, without docstrings and the fields LEFT_OUT."""
    codes, stack = bytearray(), [tree]
    while stack:
        node = stack.pop()
        codes.append(CODE[type(node.value if isinstance(node, ast.Constant) else node)])
        documented = isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)) and docstring(node)
        children = []
        for field, value in ast.iter_fields(node):
            if field not in LEFT_OUT:
                children += value if isinstance(value, list) else [value]
            if field == "body" and documented:
                del children[-len(value)]
        stack += [child for child in reversed(children) if isinstance(child, ast.AST)]
    return bytes(codes)


class Matcher:
    """Find, among many sequences, those near one of a few patterns (the benchmark's problems)."""

    def __init__(self, patterns: list[bytes], min_rate: float):
        """`min_rate` > 0 is the match rate from which a pair counts."""
        self.patterns, self.min_rate = patterns, min_rate

    def match(self, sequences: list[bytes]) -> Iterator[tuple[int, int, float]]:
        """Yield (pattern's index, sequence's index, match rate), both indexes ascending."""
        rates = cdist(
            self.patterns,
            sequences,
            scorer=Levenshtein.normalized_similarity,
            score_cutoff=self.min_rate - 1e-6,  # a rate equal to the cutoff may read 0
            dtype=np.float64,
        )
        for number, index in np.argwhere(rates >= self.min_rate - 1e-9).tolist():
            yield number, index, float(rates[number, index])
