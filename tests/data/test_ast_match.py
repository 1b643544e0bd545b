import html
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance.Levenshtein import distance

from data.base.ast_match import Matcher, functions, functions_anywhere

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
    return functions(source)[0].nodes


ORIGINAL = "def f(a, b):\n    return [x + 1 for x in a if x > b]\n"


@pytest.mark.parametrize(
    "same",
    [
        "def other(xs, low):\n    return [y + 20 for y in xs if y > low]\n",
        'def f(a, b):\n    """Some text."""\n    return [x + 1 for x in a if x > b]\n',
        "@cache\ndef f(a: list[int], b: int) -> list[int]:\n"
        "    # why\n    return [\n        x + 1 for x in a if x > b\n    ]\n",
        "class A:\n    def f(self, a, b):\n        return [x + 1 for x in a if x > b]\n",
        "class A:\n  def f(self, a, b):\n    pass\n    return [x + 1 for x in a if x > self.b]\n",
        "def f(a, b):\n    print([x + 1 for x in a if x > b])\n",
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


LINES = ORIGINAL.splitlines(keepends=True)
BOLD = html.escape(ORIGINAL).replace("def", "<b>def</b>").replace("return", "<b>return</b>")
QUOTED = {
    "Python 2": ORIGINAL + "print 'x'\n",
    "Python 2 inside": LINES[0] + "    print 'x'\n" + LINES[1],
    "JSON": json.dumps({"text": ORIGINAL}),
    "JSON, cut": json.dumps({"text": ORIGINAL, "n": [1, 2]})[:-1],
    "JSON in JSON": json.dumps(json.dumps({"text": ORIGINAL.rstrip()})),
    "notebook": json.dumps({"cells": [{"source": ["# A\n", *LINES], "outputs": []}]}, indent=1),
    "string": f"code = {ORIGINAL!r}\n\n\ndef g():\n    return code\n",
    "HTML": f"<pre><code>{html.escape(ORIGINAL.rstrip())}</code></pre>",
    "entities": f"So,\n\n    {LINES[0]}    {html.escape(LINES[1])}",
    "coloured HTML": f"<pre>{BOLD}</pre>",
    "prompt": f"So:\n\n>>> {LINES[0]}... {LINES[1]}...\n>>> f([1], 0)\n[2]\n",
    "comments": "x = 1\n" + "".join(f"# {line}" for line in LINES) + "y = 2\n",
    "diff": "@@ -1,2 +3,4 @@\n" + "".join(f"+{line}" for line in LINES),
    "fence": f"Text, isn't it.\n\n```python\n{ORIGINAL}```\n\n```\nnot python\n```\n",
    "fence in a list": "* So:\n\n  ```\n" + "".join(f"  {line}" for line in LINES) + "  ```\n",
    "beside its like": "f(\nclass A:\n  def g(self):\n    return 1\n\n"
    + "".join(f"  {line}" for line in LINES) + "\nx = 1\n",
    "script": "import os\na = [1, 2]\nb = int(input())\nprint([x + 1 for x in a if x > b])\n",
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTED)
def test_what_quotes_a_function_has_it(name):
    assert codes(ORIGINAL) in {f.nodes for f in functions_anywhere(QUOTED[name])}


def test_what_is_printed_counts_as_returned():
    assert codes("def f():\n    print(1, 2)\n") == codes("def f():\n    return 1, 2\n")
    assert codes("def f():\n    print()\n") != codes("def f():\n    return\n")


def test_a_line_of_python_2_stands_for_pass():
    loop = "def f(a):\n    for x in a:\n        print x\n    return a\n"
    assert [f.nodes for f in functions_anywhere(loop)] == [codes(loop.replace("print x", "pass"))]


def test_nothing_to_compare():
    assert functions_anywhere("Just text, no code.") is None
    assert functions_anywhere("If you def f(x, you begin.") is None
    assert functions_anywhere("x = [\n" + "1,\n" * 9 + "]\n" + "x += x\n" * 99) == []
