import ast
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance.Levenshtein import distance

from data.base.ast_match import Matcher, functions, functions_anywhere, node_codes

SEQUENCES = st.lists(st.text("abc", max_size=12).map(str.encode), max_size=8)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, SEQUENCES, st.sampled_from([0.5, 0.8, 0.95, 1]))
def test_matcher_finds_all_pairs_and_no_other(patterns, sequences, min_rate):
    patterns = [pattern for pattern in patterns if pattern]
    want = []
    for (p, pattern), (i, sequence) in itertools.product(enumerate(patterns), enumerate(sequences)):
        longer, edits = max(len(pattern), len(sequence)), distance(pattern, sequence)
        if longer - edits >= longer * min_rate - 1e-9:
            want.append((p, i, 1 - edits / longer))
    assert list(Matcher(patterns, min_rate).match(sequences)) == want


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
    assert functions_anywhere("Just text, no code.") == []
