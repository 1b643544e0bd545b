"""synthetic/concepts.py: right solutions, well-formed wordings, and no problem of a benchmark."""

import ast
import builtins
import keyword
import random
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from data import exercises
from data.exercises import Benchmarks, tell
from data.synthetic.concepts import CONCEPTS, unite
from data.synthetic.families import FAMILIES, KINDS, values_of

EVAL = Path(__file__).parents[3] / "shared/eval"
TASKS = [task for tasks in CONCEPTS.values() for task in tasks]
for label in CONCEPTS:  # other tests, in the same process, count the families of families.py
    FAMILIES.pop(label, None)


@pytest.fixture(scope="module")
def outputs():
    """Every task's outputs; raises where body and oracle disagree, or an argument is changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercises, "FAMILIES", CONCEPTS)
        return exercises.run_tasks(Benchmarks(()))[0]


def test_there_are_many_families(outputs):
    assert len({task.family for task in outputs}) >= 130
    assert len(outputs) >= 2000
    assert len({str(task) for task in TASKS}) == len(TASKS)


@pytest.mark.parametrize("label", ["recursive_number", "three_numbers", "list_then", "nested_walk"])
def test_a_wrong_body_is_caught(label):
    task = CONCEPTS[label][0]
    results = [task.oracle(*x) for x in exercises.pool(task.args)]
    exercises.check(tell(task, random.Random(0)), results, range(exercises.POOL))
    wrong = replace(task, body="return None if 0 else ()")
    with pytest.raises(AssertionError, match=label):
        exercises.check(tell(wrong, random.Random(0)), results, range(exercises.POOL))


def test_names_shadow_nothing():
    taken = {*dir(builtins), *keyword.kwlist} - {"_"}  # which a doctest of another test may set
    for task in TASKS:
        kinds = [set(KINDS[kind].names.split()) for kind in task.args.split()]
        names = set().union(*kinds)
        assert len(names) == sum(map(len, kinds)), f"{task}: two arguments may have one name"
        body = exercises.fill(task.body.replace("$f", "_f"), ("_a", "_b", "_c"))
        tree = ast.parse("def _f():\n" + textwrap.indent(body, "    "))
        all_names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        stored = {n.id for n in all_names if isinstance(n.ctx, ast.Store)}
        stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        assert not names & (stored | taken), task
        assert not stored & taken, task
        name = tell(task, random.Random(0)).name
        assert name.isidentifier(), (task, name)
        assert name not in taken | names, (task, name)


def test_wordings_are_filled_in_and_differ(outputs):
    for task in TASKS:
        docs = {tell(task, random.Random(seed)).doc for seed in range(12)}
        assert len(docs) > 1, task
        for doc in docs:
            assert not re.search("[<>|]", doc), f"{task}: a choice is left in {doc!r}"
            assert doc.endswith((".", "?", ")")), f"{task}: {doc!r}"


def test_a_wording_tells_one_task(outputs):
    known = {}
    for task, results in outputs.items():
        for seed in range(4):
            doc = tell(task, random.Random(seed)).doc
            assert known.setdefault((task.args, doc), results) == results, (str(task), doc)


def test_lines_fit():
    for task in TASKS:
        exercise = tell(task, random.Random(1))
        lines = (exercise.prompt() + exercise.solution()).splitlines()
        assert max(map(len, lines)) <= 100, task


def test_values_of_an_axis():
    assert values_of("2..4; 9") == [2, 3, 4, 9]
    assert values_of("a ~ -1; b c ~ x") == [("a", -1), ("b c", "x")]


def test_an_oracle_merges_intervals():
    assert unite([(5, 1), (5, 7), (8, 8)]) == [(1, 7), (8, 8)]
    assert unite([]) == []


@pytest.mark.skipif(not EVAL.exists(), reason="needs ../shared/eval")
def test_hardly_a_wording_overlaps_with_humaneval_or_mbpp():
    benchmarks = Benchmarks((EVAL / "HumanEval.jsonl.gz", EVAL / "mbpp.jsonl"))
    texts = [tell(task, random.Random(0)) for task in TASKS]
    close = [e for e in texts if "docstring" in benchmarks.overlap(e)]
    assert len(close) <= len(texts) // 200, [e.doc for e in close]
