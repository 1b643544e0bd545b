import ast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base.ast_match import Matcher, functions, functions_anywhere, node_codes


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


PATTERNED = st.integers(1, 10).map(lambda n: bytes(range(7)) * n)
SEQUENCE = st.binary(min_size=1, max_size=12) | PATTERNED
EDITS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 8), st.integers(0, 2)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(SEQUENCE, min_size=1, max_size=3), st.data(), st.sampled_from([0.5, 0.8, 0.95, 1]))
def test_matcher_finds_all_pairs_and_no_other(patterns, data, min_rate):
    edits = data.draw(st.lists(st.tuples(st.sampled_from([b"", *patterns]), EDITS), max_size=8))
    sequences = [mutate(s, e[: data.draw(st.integers(0, 4))]) for s, e in edits]
    want = []
    for p, pattern in enumerate(patterns):
        for i, sequence in enumerate(sequences):
            longer = max(len(pattern), len(sequence))
            if longer - distance(pattern, sequence) >= longer * min_rate - 1e-9:
                want.append((p, i, 1 - distance(pattern, sequence) / longer))
    assert list(Matcher(patterns, min_rate).match(sequences)) == want


@pytest.mark.parametrize("min_rate", [0.8, 0.85, 0.9, 0.95])
def test_a_rate_of_exactly_the_threshold_counts(min_rate):
    for size in range(20, 301, 20):
        edits = round(size * (1 - min_rate))
        rng = np.random.default_rng(size)
        pattern = rng.integers(0, 100, size, np.uint8).tobytes()
        near, far = (bytes([200]) * n + pattern[n:] for n in (edits, edits + 1))
        found = list(Matcher([pattern], min_rate).match([far, near]))
        assert found == [(0, 1, 1 - edits / size)]


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
