"""Test synthetic/forms.py: varied exercises run, describe their task correctly, end cleanly."""

import ast
import builtins
import doctest
import keyword
import random
import re
import types
import typing
from collections import Counter

import pytest

from data import exercises
from data.base.benchmarks import Mbpp
from data.synthetic import forms
from data.synthetic.families import FAMILIES, read_concepts
from data.synthetic.forms import Task, results, tell, vary
from data.synthetic.kinds import KINDS
from data.synthetic.worked import type_of
from eval import mbpp
from eval.harness import BODY, Protocol

ALL = FAMILIES | read_concepts()
TASKS = random.Random(0).sample([task for tasks in ALL.values() for task in tasks], 600)
RESERVED = {*dir(builtins), *keyword.kwlist}


@pytest.fixture(scope="module")
def varied():
    return [vary(task, random.Random(f"{task}")) for task in TASKS]


def source(exercise):
    return exercise.prompt() + exercise.solution()


def run(exercise):
    namespace = {}
    exec(source(exercise), namespace)
    return namespace


def docstring(e):
    """Return the docstring of a form, as parsed by Python."""
    tree = ast.parse(source(e))
    return ast.get_docstring(tree if e.mbpp else tree.body[-1], clean=False)


def test_varied_exercises_give_the_oracles_results_and_their_names_shadow_nothing(varied):
    for e in varied:
        exercises.check(e, results(e.task), range(20))
        tree = ast.parse(exercises.fill(e.task.body, ("_a", "_b", "_c")))
        body = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names = {e.name, *e.arguments}
        assert len(names) == 1 + len(e.arguments)
        assert not names & (RESERVED | body), (str(e.task), names)
    assert varied[:50] == [vary(task, random.Random(f"{task}")) for task in TASKS[:50]]


def test_forms_differ(varied):
    share = lambda test: sum(map(test, varied)) / len(varied)  # noqa: E731
    assert 0.12 < share(lambda e: e.mbpp) < 0.21
    assert 0.2 < share(lambda e: bool(e.hints)) < 0.36
    assert 0.1 < share(lambda e: e.indent != "    ") < 0.25
    assert 0.04 < share(lambda e: "from typing import" in e.lead) < 0.2
    assert len({tuple(e.prose.split()[:2]) for e in varied}) > 80


CALL = (
    r"(?:>>> |\* |assert )?({name}\(.*\))\s*(?:==>|==|=>|->|➞|# =>|=|returns|should return)\s*(.+)"
)


def test_every_example_is_right(varied):
    found = Counter()
    for e in varied:
        lines = [line.strip() for line in docstring(e).splitlines()]
        for line, below in zip(lines, [*lines[1:], ""]):
            if match := re.fullmatch(CALL.format(name=e.name), line):
                call, result = match.groups()
            elif re.fullmatch(rf"(>>> )?{e.name}\(.*\)", line):
                call, result = line.removeprefix(">>> "), below.removeprefix("# ")
            else:
                continue
            assert eval(call, run(e)) == eval(result), (call, result)
            found[line.startswith("assert")] += 1
    assert min(found[True], found[False]) > 50


def test_a_session_prints_what_the_docstrings_of_every_form_show(varied):
    none = [t for t in ALL["find"] + ALL["early_exit"] + ALL["machine"] if None in results(t)][:99]
    some = [tasks[0] for tasks in ALL.values()] + none
    told = [form(task, random.Random(i)) for i, task in enumerate(some) for form in (tell, vary)]
    runner, failed = doctest.DocTestRunner(verbose=False), []
    for e in varied + told:
        if ">>>" in (shown := docstring(e)):
            test = doctest.DocTestParser().get_doctest(shown, run(e), e.name, None, None)
            runner.run(test, out=failed.append)
    assert not failed, "".join(failed)
    assert runner.tries > 150


def test_type_hints_are_right(varied):
    checked = Counter()
    for e in varied:
        seen = {"return": results(e.task)} | dict(zip(e.arguments, zip(*forms.pool(e.task.args))))
        for name, hint in typing.get_type_hints(run(e)[e.name]).items():
            union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            outer = typing.get_args(hint) if union else [hint]
            kinds = {typing.get_origin(h) or h for h in outer}
            assert {type(v) for v in seen[name]} == kinds, (str(e.task), hint)
            checked[name == "return"] += 1
    assert min(checked[True], checked[False]) > 100
    both = ("int", "list[int] | None")
    hints = {forms.type_hints(both, random.Random(i))[1][1] for i in range(99)}
    assert hints == {"", "list | None", "list[int] | None", "Optional[list]", "Optional[List[int]]"}
    rng = random.Random(0)
    for name, kind in KINDS.items():  # also for inputs outside the pool
        assert type_of([kind.sample(rng) for _ in range(300)]) == forms.argument_types(name)[0]


def test_a_varied_docstring_determines_the_answer(varied):
    known = {}
    for e in varied:
        assert known.setdefault((e.task.args, e.doc), results(e.task)) == results(e.task), e.doc


def test_prompts_and_bodies_are_what_the_evaluators_ask_and_cut(varied):
    protocol = Protocol("docstring", mbpp.DOCSTRING_STOP, to_body=False)
    for e in varied:
        assert (protocol if e.mbpp else BODY).trim(e.solution()) == e.solution()
        if e.mbpp:
            problem = mbpp.problem(Mbpp(1, e.prose, e.solution(), [*e.lines], ""), "")
            assert (problem["prompt"], problem["entry_point"]) == (e.prompt(), e.name)
        else:
            assert e.prompt().endswith(e.quote + "\n")


@pytest.mark.parametrize("quoted", ["'''", '""', "'\"'", "'", '"'])
def test_an_exercise_compiles_whatever_its_docstring_quotes(quoted):
    """Also if the docstring, without its full stop, begins or ends with the quoted text."""
    for doc in (f"{quoted} $a", f"Put {quoted} in $a: {quoted}."):
        task = Task("text", "join_it", doc, "return $a", lambda a: quoted + a)
        for seed in range(60):
            e = vary(task, random.Random(f"{seed} {doc}"))
            assert run(e)[e.name]("x") == "x"
            assert quoted in docstring(e), source(e)


def test_an_argument_is_named_where_it_is_needed():
    def proses(doc):
        task = Task("ints", "first_one", doc, "return $a[:1]", lambda a: a[:1])
        told = [vary(task, random.Random(i)) for i in range(60)]
        return [(e.arguments[0], e.prose) for e in told]

    for name, prose in proses("$a is a list. Return it.") + proses("Return the tuple $a."):
        assert name in prose
        assert not re.search("(given|the) (list|array) is a|tuple (a|the) ", prose)
