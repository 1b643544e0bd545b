"""How alike two functions are in syntax: the match rate of their trees, for many pairs at once.

The paper prunes CodeExercises by the edit distance of syntax trees (arXiv 2306.11644, section 5)
and leaves the details open. Ours: a function is the sequence of its tree's nodes in preorder, each
as its type alone (a constant as the type of its value), without docstrings, annotations and
decorators. So names, texts, comments and layout do not count, while operators and structure do. Of
two sequences

    match rate = 1 - Levenshtein distance / length of the longer one

which is 1 for the same structure; a copy with one node more in twenty has 0.95.

Levenshtein distances are computed bit-parallel (Myers 1999, in blocks as Hyyro 2003): one bit for
each node of the pattern, one numpy lane for each sequence it is compared with. Before that come two
bounds that most pairs fail. The rate is at most the shorter length over the longer, and at most the
number of nodes in common, as multisets, over the longer.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.base.syntax import FENCE, FUNCTIONS, docstring, parse_python

WORD_BITS = 64
LANES = 4096  # sequences compared at once: 20 arrays of them stay in the L2 cache
LEFT_OUT = {"ctx", "annotation", "returns", "decorator_list", "type_params", "type_comment"}
NODE_TYPES = sorted(
    (t for t in vars(ast).values() if isinstance(t, type) and issubclass(t, ast.AST)),
    key=lambda t: t.__name__,
)
CONSTANT_TYPES = (bool, int, float, complex, str, bytes, type(None), type(...))
CODE = {t: i for i, t in enumerate((*NODE_TYPES, *CONSTANT_TYPES))}
FIELDS = {t: [f for f in reversed(t._fields) if f not in LEFT_OUT] for t in NODE_TYPES}
assert len(CODE) <= 256, "a code is a byte"


@dataclass(frozen=True)
class Function:
    """A function of some source text."""

    name: str
    text: str  # its lines, dedented as far as the first one is indented
    nodes: bytes  # the codes of its tree, as `node_codes` gives them


def functions(source: str) -> list[Function]:
    """Return the functions in `source`, methods and nested ones too, in the order of their lines.

    Raises SyntaxError.
    """
    lines = source.split("\n")
    found = [n for n in ast.walk(parse_python(source)) if isinstance(n, FUNCTIONS)]
    return [
        Function(
            node.name,
            "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno]),
            node_codes(node),
        )
        for node in sorted(found, key=lambda n: (n.lineno, n.col_offset))
    ]


def functions_anywhere(text: str) -> list[Function] | None:
    """Find the functions in Python, or in a text's fenced code blocks; None if neither parses."""
    try:
        return functions(text)
    except SyntaxError:
        found, any_python = [], False
    for block in FENCE.findall(text):
        try:
            found += functions(block)
            any_python = True
        except SyntaxError:
            continue
    return found if any_python else None


def node_codes(tree: ast.AST) -> bytes:
    """Encode the tree in preorder, a byte a node, without docstrings and what LEFT_OUT names."""
    codes, stack = bytearray(), [tree]
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind is ast.Constant:
            codes.append(CODE[type(node.value)])
            continue
        codes.append(CODE[kind])
        for field in FIELDS[kind]:
            value = getattr(node, field, None)
            if isinstance(value, list):
                children = [child for child in reversed(value) if isinstance(child, ast.AST)]
                if field == "body" and isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
                    del children[len(children) - (docstring(node) is not None) :]
                stack += children
            elif isinstance(value, ast.AST):
                stack.append(value)
    return bytes(codes)


def match_rate(a: bytes, b: bytes) -> float:
    """Return 1 - Levenshtein(a, b) / max(len(a), len(b)) of two node sequences."""
    longer = max(len(a), len(b))
    return 1 - int(_distances(a, *_columns([b]))[0]) / longer if longer else 1.0


class Matcher:
    """Find, among many sequences, those near one of a few patterns (the benchmark's problems)."""

    def __init__(self, patterns: list[bytes], min_rate: float):
        """Pairs with a match rate of at least `min_rate` > 0 are of interest."""
        assert 0 < min_rate <= 1
        self.patterns, self.min_rate = patterns, min_rate
        self.max_length = int(max(map(len, patterns), default=0) / min_rate)

    def match(self, sequences: list[bytes]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield for each pattern near any: (its index, indexes of sequences int64 ascending,
        their match rates float64)."""
        where: dict[bytes, list[int]] = {}  # each different sequence is compared once
        for index, sequence in enumerate(sequences):
            if 0 < len(sequence) <= self.max_length:
                where.setdefault(sequence, []).append(index)
        different = sorted(where, key=lambda s: (len(s), s))
        copies = np.array([len(where[s]) for s in different], np.int64)
        indexes = np.array([i for s in different for i in where[s]], np.int64)
        first = np.cumsum(copies) - copies
        lengths = np.array([len(s) for s in different], np.int64)
        counts = _counts(different)
        for number, pattern in enumerate(self.patterns):
            near, rates = self._near(pattern, different, lengths, counts)
            if len(near):
                repeat = copies[near]
                at = np.repeat(first[near] - np.cumsum(repeat) + repeat, repeat)
                found = indexes[at + np.arange(len(at))]
                order = np.argsort(found)
                yield number, found[order], np.repeat(rates, repeat)[order]

    def _near(self, pattern, sequences, lengths, counts) -> tuple[np.ndarray, np.ndarray]:
        """Return indexes of near ones among `sequences`, which ascend in length, and rates."""
        # In this order the products round as the rates do: 1 - d / longer >= min_rate.
        m = len(pattern)
        low = int(np.searchsorted(lengths, m * self.min_rate - 1e-9))
        high = int(np.searchsorted(lengths, m / self.min_rate + 1e-9, side="right"))
        longer = np.maximum(lengths[low:high], m)
        common = np.zeros(high - low, np.int32)
        for code, count in enumerate(np.bincount(np.frombuffer(pattern, np.uint8))):
            if count:
                common += np.minimum(counts[code, low:high], count)
        possible = low + np.flatnonzero(common >= longer * self.min_rate - 1e-9)
        rates = np.zeros(len(possible))
        for begin in range(0, len(possible), LANES):
            part = possible[begin : begin + LANES]
            distance = _distances(pattern, *_columns([sequences[i] for i in part]))
            rates[begin : begin + LANES] = 1 - distance / np.maximum(lengths[part], m)
        near = rates >= self.min_rate - 1e-9
        return possible[near], rates[near]


def _counts(sequences: list[bytes]) -> np.ndarray:
    """Return how often each code is in each sequence: int32 [256, sequences]."""
    counts = np.zeros((256, len(sequences)), np.int32)
    for i, sequence in enumerate(sequences):
        counts[:, i] = np.bincount(np.frombuffer(sequence, np.uint8), minlength=256)
    return counts


def _columns(sequences: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences as columns uint8 [longest, n], padded with 0, and lengths int64 [n]."""
    longest = max(map(len, sequences), default=0)
    padded = b"".join(sequence.ljust(longest, b"\0") for sequence in sequences)
    columns = np.frombuffer(padded, np.uint8).reshape(len(sequences), longest).T
    return np.ascontiguousarray(columns), np.array([len(s) for s in sequences], np.int64)


def _distances(pattern: bytes, columns: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return Levenshtein distances int64 [n] from `pattern` to each of n sequences.

    `columns` uint8 [longest, n], `lengths` [n]; a lane's distance is read where its sequence ends.
    Bit i of `up` and `down` says that the table's cell (i + 1, j) is one more or one less than
    (i, j); a word holds 64 rows, and `carry` takes the horizontal difference to the next word.
    """
    m, n = len(pattern), columns.shape[1]
    if m == 0:
        return lengths.copy()
    one, top = np.uint64(1), np.uint64(WORD_BITS - 1)
    words = -(-m // WORD_BITS)
    equal = np.zeros((words, 256), np.uint64)  # the rows where the pattern has this code
    for i, code in enumerate(pattern):
        equal[i // WORD_BITS, code] |= one << np.uint64(i % WORD_BITS)
    last = np.uint64((m - 1) % WORD_BITS)
    up = np.full((words, n), ~np.uint64(0))
    down = np.zeros((words, n), np.uint64)
    distance = np.full(n, m, np.int64)
    result = np.where(lengths == 0, m, 0)
    for j, codes in enumerate(columns):
        carry_up, carry_down = np.ones(n, np.uint64), np.zeros(n, np.uint64)
        for w in range(words):
            match = equal[w][codes]
            diagonal = match | down[w]
            match |= carry_down
            zero = (((match & up[w]) + up[w]) ^ up[w]) | match
            rise = down[w] | ~(zero | up[w])
            fall = up[w] & zero
            if w == words - 1:
                distance += (rise >> last & one).astype(np.int64)
                distance -= (fall >> last & one).astype(np.int64)
            rise, fall, carry_up, carry_down = (
                rise << one | carry_up,
                fall << one | carry_down,
                rise >> top,
                fall >> top,
            )
            up[w] = fall | ~(diagonal | rise)
            down[w] = rise & diagonal
        result = np.where(lengths == j + 1, distance, result)
    return result
