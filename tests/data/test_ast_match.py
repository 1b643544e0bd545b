import ast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base import ast_match
from data.base.ast_match import Matcher, functions, functions_anywhere, match_rate, node_codes


def distance(a, b):
    """Levenshtein distance by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def mutate(sequence, edits):
    out = bytearray(sequence)
    for place, code, kind in edits:
        place %= len(out) + 1
        if kind == 0:
            out.insert(place, code)
        elif place < len(out):
            out[place : place + 1] = [code] if kind == 1 else []
    return bytes(out)


PATTERNED = st.integers(0, 20).map(lambda n: bytes(range(7)) * n)
SEQUENCE = st.binary(max_size=20) | PATTERNED
SHORT = st.binary(max_size=12) | PATTERNED.map(lambda s: s[:70])
EDITS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 8), st.integers(0, 2)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(SEQUENCE, st.lists(EDITS, min_size=1, max_size=4))
def test_distances_are_those_of_the_table(pattern, edits):
    others = [mutate(pattern, edit) for edit in edits]
    got = ast_match._distances(pattern, *ast_match._columns(others))
    assert got.tolist() == [distance(pattern, other) for other in others]


@pytest.mark.parametrize("size", [63, 64, 65, 127, 128, 129])
def test_patterns_that_end_at_a_word(size):
    rng = np.random.default_rng(size)
    pattern = rng.integers(0, 4, size, np.uint8).tobytes()
    others = [rng.integers(0, 4, n, np.uint8).tobytes() for n in (0, 1, size - 1, size, size + 9)]
    got = ast_match._distances(pattern, *ast_match._columns(others))
    assert got.tolist() == [distance(pattern, other) for other in others]


def test_match_rate():
    assert match_rate(b"abcd", b"abcd") == 1
    assert match_rate(b"abcd", b"abxd") == 0.75
    assert match_rate(b"ab", b"abcdefgh") == 0.25
    assert match_rate(b"", b"abc") == 0
    assert match_rate(b"", b"") == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(SHORT, max_size=3), st.data(), st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_matcher_finds_all_pairs_and_no_other(patterns, data, min_rate):
    edits = data.draw(st.lists(st.tuples(st.sampled_from([b"", *patterns]), EDITS), max_size=8))
    sequences = [mutate(s, e[: data.draw(st.integers(0, 4))]) for s, e in edits]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast_match, "LANES", 3)
        got = {
            (p, int(i)): float(rate)
            for p, near, rates in Matcher(patterns, min_rate).match(sequences)
            for i, rate in zip(near, rates)
        }
    want = {}
    for p, pattern in enumerate(patterns):
        for i, sequence in enumerate(sequences):
            longer = max(len(pattern), len(sequence))
            if sequence and longer - distance(pattern, sequence) >= longer * min_rate - 1e-9:
                want[p, i] = 1 - distance(pattern, sequence) / longer
    assert got == pytest.approx(want)


def test_matcher_counts_past_a_byte():
    pattern = bytes([1] * 400 + [2] * 20)
    ((_, near, rates),) = Matcher([pattern], 0.95).match([pattern[:-20] + bytes([3] * 20)])
    assert (near.tolist(), rates.tolist()) == ([0], [1 - 20 / 420])


def codes(source):
    return node_codes(ast.parse(source).body[0])


ORIGINAL = "def f(a, b):\n    return [x + 1 for x in a if x > b]\n"


@pytest.mark.parametrize(
    "same",
    [
        "def other(xs, low):\n    return [y + 20 for y in xs if y > low]\n",
        'def f(a, b):\n    """Some text."""\n    return [x + 1 for x in a if x > b]\n',
        "@cache\ndef f(a: list[int], b: int) -> list[int]:\n"
        "    # why\n    return [\n        x + 1 for x in a if x > b\n    ]\n",
    ],
)
def test_names_texts_annotations_and_layout_do_not_count(same):
    assert codes(same) == codes(ORIGINAL)


@pytest.mark.parametrize(
    "other",
    [
        "def f(a, b):\n    return [x - 1 for x in a if x > b]\n",
        "def f(a, b):\n    return [x + 1.5 for x in a if x > b]\n",
        "def f(a, b):\n    return [x + 1 for x in a if x >= b]\n",
        "def f(a, b):\n    return {x + 1 for x in a if x > b}\n",
        "def f(a, b=0):\n    return [x + 1 for x in a if x > b]\n",
        'def f(a, b):\n    "doc"\n    "text"\n    return [x + 1 for x in a if x > b]\n',
    ],
)
def test_operators_types_of_constants_and_structure_do(other):
    assert codes(other) != codes(ORIGINAL)


def test_functions_at_any_depth_and_their_text():
    source = (
        "class A:\n    def one(self):\n        '''1'''\n        return 1\n\n"
        "async def two():\n    def three():\n        return 3\n    return three\n"
    )
    one, two, three = functions(source)
    assert (one.name, two.name, three.name) == ("one", "two", "three")
    assert one.text == "def one(self):\n    '''1'''\n    return 1"
    assert three.text == "def three():\n    return 3"
    assert three.nodes in two.nodes
    with pytest.raises(SyntaxError):
        functions("print 'x'")


def test_code_blocks_of_a_text():
    text = "Text.\n\n```python\ndef f():\n    return 1\n```\n\n```\nnot python\n```\n"
    assert [f.name for f in functions_anywhere(text)] == ["f"]
    assert functions_anywhere("Just text, no code.") is None
    assert functions_anywhere("x = 1\n") == []
