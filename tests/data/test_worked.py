import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data.synthetic import textbooks, worked

ROOT = Path(__file__).parents[2]
TOTAL = """def total(xs, start=0):
    for x in xs:
        start += x
    return start"""


def kind_of_all(values):
    return functools.reduce(worked.both, map(worked.kind, values), None)


def told(code, name, calls, typed="new", examples=9):
    namespace = {}
    exec(code, namespace)
    return worked.documented(code, name, "Add up.", calls, namespace, typed, examples)


def test_an_exercise_has_the_types_and_results_that_its_calls_have():
    assert told(TOTAL, "total", ["total([1, 2])"], typed="") == (
        'def total(xs, start=0):\n    """Add up.\n\n    >>> total([1, 2])\n    3\n    """\n'
        "    for x in xs:\n        start += x\n    return start"
    )
    code = told(TOTAL, "total", ["total([1, 2])", "total([], 5)"], typed="old", examples=0)
    assert code.startswith("def total(xs")  # one call has one argument, the other has two
    code = told("def f(a):\n    return a[:1]", "f", ["f('xy')", "f('')", "len('')"], typed="new")
    assert code.startswith("def f(a: str) -> str:\n")
    assert ">>> f('')\n    ''\n" in code
    assert "len" not in code
    code = told("def f(a):\n    return a[:1]", "f", ["f([1, 2])"], typed="old")
    assert code.startswith("from typing import List\n\n\ndef f(a: List[int]) -> List[int]:\n")


def test_no_example_has_what_a_docstring_would_read_otherwise():
    code = told("def f(a):\n    return a", "f", [r"f('a\nb')", "f('x')", r"f('\\')"])
    assert code.count(">>>") == 1
    assert ">>> f('x')\n    'x'\n" in code


@pytest.mark.parametrize(
    ("values", "new", "old"),
    [
        ([[1], []], "list[int]", "List[int]"),
        ([1, 2.5], "float", "float"),
        ([{"a": [1]}, {}], "dict[str, list[int]]", "Dict[str, List[int]]"),
        ([(1, "a")], "tuple[int, str]", "Tuple[int, str]"),
        ([None, "a", None], "str | None", "Optional[str]"),
        ([True, False], "bool", "bool"),
        ([[None, 3]], "list[int | None]", "List[Optional[int]]"),
    ],
)
def test_types_of_values(values, new, old):
    kind = kind_of_all(values)
    assert (worked.spell(kind, old=False), worked.spell(kind, old=True)) == (new, old)


@pytest.mark.parametrize("values", [[[]], [1, "a"], [[1, "a"]], [True, 1], [(1,), (1, 2)], [len]])
def test_types_that_are_not_plain_are_left_out(values):
    with pytest.raises(worked.Unclear):
        worked.spell(kind_of_all(values), old=False)
    calls = [f"f({'len' if value is len else repr(value)})" for value in values]
    assert told("def f(x):\n    return 0", "f", calls).startswith("def f(x):\n")


def test_the_rounds_of_a_loop():
    namespace = {}
    exec(TOTAL, namespace)
    assert worked.rounds(TOTAL, "total([5, 6], 1)", namespace) == [
        {"start": "1", "x": "5"},
        {"start": "6", "x": "6"},
    ]
    assert worked.rounds(TOTAL, "total([5])", namespace) == []  # one round tells nothing
    assert worked.rounds(TOTAL, "total(range(99))", namespace) == []  # too many
    assert worked.rounds(TOTAL, "len([1, 2])", namespace) == []
    assert sys.gettrace() is None or "coverage" in str(sys.gettrace())


def test_what_a_wrong_version_does():
    namespace = {}
    exec(TOTAL, namespace)
    wrong = TOTAL.replace("+= x", "= x / 0 if x == 7 else x")
    calls = ["total([1, 2])", "total([2])", "total([7])"]
    assert worked.differences(TOTAL, wrong, calls, namespace) == [
        ("total([1, 2])", "2", "3"),
        ("total([7])", "ZeroDivisionError: division by zero", "7"),
    ]


def test_arguments_are_worked_out():
    assert worked.plain("f([1] + [2], 'ab'[0])[1:]") == "f([1, 2], 'a')[1:]"
    assert worked.plain("f(0.1 + 0.2, x + 1)") == "f(0.1 + 0.2, x + 1)"


def test_docstrings_from_tasks():
    assert worked.imperative("Write `f`, which carries the one.") == "Carry the one."
    assert worked.imperative("Write a function `f` that does it.") == "Do it."
    assert worked.imperative("Write `f`, which passes it on.") == "Pass it on."
    assert worked.imperative("Think about `f`.") == ""


@pytest.mark.parametrize("topic", textbooks.TOPICS, ids=lambda t: t.title)
def test_wrong_versions_are_wrong_and_docstrings_are_of_functions(topic):
    rng, wrong = random.Random(0), False
    for audience in textbooks.AUDIENCES[:8]:
        writer = textbooks._Writer(topic, audience, "beginner", rng)
        code, calls = writer.sections("code", "calls")
        writer.run(code)
        wrong = wrong or bool(writer.wrong(code, calls))
        if topic.of("doc"):
            assert worked.function_in(code, writer.filled["f"])
    assert wrong == bool(topic.of("wrong"))
    assert not topic.of("wrong") or topic.of("mistake")
    assert 1 <= topic.difficulty <= 3


def test_lessons_do_not_depend_on_the_order_of_sets():
    script = (
        "import hashlib, random\nfrom data.synthetic import textbooks as t\n"
        "rng = random.Random(1)\n"
        "texts = [t.write(topic, rng.choice(t.AUDIENCES), 'newcomer', rng)"
        " for topic in t.TOPICS for _ in range(2)]\n"
        "print(hashlib.sha256('|'.join(texts).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, text=True,
                       env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(digests) == 1
