"""Test synthetic/worked.py: lessons describe what a function really does."""

from data.synthetic import worked

TOTAL = """def total(xs, start=0):
    for x in xs:
        start += x
    return start"""


def told(code, name, calls, typed="new", examples=9):
    namespace = {}
    exec(code, namespace)
    return worked.documented(code, name, "Add up.", calls, namespace, typed, examples)


def test_a_docstring_has_the_types_and_results_that_the_calls_have():
    assert told(TOTAL, "total", ["total([1, 2])"], typed="") == (
        'def total(xs, start=0):\n    """Add up.\n\n    >>> total([1, 2])\n    3\n    """\n'
        "    for x in xs:\n        start += x\n    return start"
    )
    code = told(TOTAL, "total", ["total([1, 2])", "total([], 5)"], typed="old", examples=0)
    assert code.startswith("def total(xs")  # the calls differ in number of arguments
    first = "def f(a):\n    return a[:1]"
    code = told(first, "f", ["f('xy')", "f('')", "len('')", r"f('\\')"])
    assert code.startswith("def f(a: str) -> str:\n")
    assert ">>> f('')\n    ''\n" in code
    assert code.count(">>>") == 2  # skips other functions and backslashes
    code = told(first, "f", ["f(['a', 'b'])"], typed="old")
    assert code.startswith("from typing import List\n\n\ndef f(a: List[str]) -> List[str]:\n")
    for call in ("f([])", "f([1, 2])"):  # accepts floats too
        assert told(first, "f", [call], examples=0).startswith("def f(a):\n")
    find = "def f(a):\n    return a.index('x') if 'x' in a else None"
    assert told(find, "f", ["f('ax')"], examples=0).startswith("def f(a):\n")  # it may be None
    code = told(find, "f", ["f('ax')", "f('')"])
    assert code.startswith("def f(a: str) -> int | None:\n")
    assert ">>> f('') is None\n    True\n" in code  # None itself prints nothing


def test_the_rounds_of_a_loop_and_a_wrong_version():
    namespace = {}
    exec(TOTAL, namespace)
    seen = worked.rounds(TOTAL, "total([5, 6], 1)", namespace)
    assert seen == [{"start": "1", "x": "5"}, {"start": "6", "x": "6"}]
    assert worked.rounds(TOTAL, "total([5])", namespace) == []  # one round shows nothing
    assert worked.rounds(TOTAL, "total(range(99))", namespace) == []  # too many
    assert worked.rounds(TOTAL, "len([1, 2])", namespace) == []
    wrong = TOTAL.replace("+= x", "= x / 0 if x == 7 else x")
    assert worked.differences(wrong, ["total([1, 2])", "total([2])", "total([7])"], namespace) == [
        ("total([1, 2])", "2", "3"),
        ("total([7])", "ZeroDivisionError: division by zero", "7"),
    ]


def test_what_is_said_of_a_function_and_of_a_call():
    assert worked.means(TOTAL, "total") == "with one loop"
    assert worked.means("def f(n):\n    return n and f(n - 1)", "f") == "by recursion"
    assert worked.means("def f(n):\n    return {x for x in n}", "f") == "with a comprehension"
    assert worked.means("def f(n):\n    return n", "f") == "without a loop"
    edges = [worked.edge(call, "f") for call in ("f([])", "f(0, 1)", "f(1)", "g('')")]
    assert edges == ["the empty list", "zero", "", ""]
    assert worked.plain("f({[3, 4][1]: 'a' + 'b'}, lambda: 1 / 0)") == "f({4: 'ab'}, lambda: 1 / 0)"
    seen = [{"x": "5"}, {"x": "6", "y": "'long'"}]
    assert worked.table(seen) == "step  x  y\n1     5  -\n2     6  'long'"


def test_lessons_do_not_depend_on_the_order_of_sets(cli):
    script = (
        "import hashlib, random\nfrom data.synthetic import textbooks as t\n"
        "rng = random.Random(1)\n"
        "texts = [t.write(topic, rng.choice(t.AUDIENCES), 'newcomer', rng) for topic in t.TOPICS]\n"
        "print(hashlib.sha256('|'.join(texts).encode()).hexdigest())\n"
    )
    digests = [cli("-c", script, env={"PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert digests[0] == digests[1] != ""
