"""synthetic/forms.py: varied exercises run, say what is true of their task, and end cleanly."""

import ast
import builtins
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
from data.synthetic.families import FAMILIES
from data.synthetic.forms import Task, results, vary
from data.synthetic.kinds import KINDS, Kind
from eval import mbpp, perturb
from eval.harness import BODY, Protocol

TASKS = random.Random(0).sample([task for tasks in FAMILIES.values() for task in tasks], 600)


@pytest.fixture(scope="module")
def varied():
    return [vary(task, random.Random(f"{task}")) for task in TASKS]


def source(exercise):
    return exercise.prompt() + exercise.solution()


def run(exercise):
    namespace = {}
    exec(source(exercise), namespace)
    return namespace


def told(e):
    """Return the docstring of a form, as Python reads it."""
    tree = ast.parse(source(e))
    return ast.get_docstring(tree if e.form.mbpp else tree.body[-1], clean=False)


def test_varied_exercises_give_the_oracles_results(varied):
    for e in varied:
        exercises.check(e, results(e.task), range(20))
    assert varied[:50] == [vary(task, random.Random(f"{task}")) for task in TASKS[:50]]


def test_names_shadow_nothing(varied):
    reserved = {*dir(builtins), *keyword.kwlist}
    for e in varied:
        tree = ast.parse(exercises.fill(e.task.body, ("_a", "_b")))
        body = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names = [e.name, *e.arguments]
        assert len({*names}) == len(names), names
        assert not {*names} & (reserved | body), (str(e.task), names)
        assert all(map(str.isidentifier, names))


def test_forms_differ(varied):
    forms_ = [e.form for e in varied]
    share = lambda test: sum(map(test, forms_)) / len(forms_)  # noqa: E731
    assert 0.12 < share(lambda f: f.mbpp) < 0.21
    assert 0.2 < share(lambda f: bool(f.hints)) < 0.36
    assert 0.02 < share(lambda f: f.indent == "\t") < 0.08
    assert 0.07 < share(lambda f: f.indent == "  ") < 0.15
    assert 0.05 < share(lambda f: f.quote == "'''") < 0.15
    assert 0.04 < share(lambda f: "from typing import" in f.lead) < 0.2
    assert {f.begin for f in forms_} == {"", " ", "\n"}
    assert {f.end for f in forms_} == {f.gap for f in forms_} == {"", "\n"}
    assert len({e.name for e in varied}) > 300
    assert 0.1 < sum(e.name in forms.GENERIC for e in varied) / len(varied) < 0.3
    assert len({a for e in varied for a in e.arguments}) > 130
    begins = Counter(" ".join(e.form.prose.split()[:2]) for e in varied)
    assert len(begins) > 80
    assert begins.most_common(1)[0][1] < 0.3 * len(varied)


CALL = (
    r"(?:>>> |\* |assert )?({name}\(.*\))\s*(?:==>|==|=>|->|➞|# =>|=|returns|should return)\s*(.+)"
)


def test_every_example_is_right(varied):
    found = Counter()
    for e in varied:
        namespace = run(e)
        lines = [line.strip() for line in told(e).splitlines()]
        for line, below in zip(lines, [*lines[1:], ""]):
            if match := re.fullmatch(CALL.format(name=e.name), line):
                call, result = match.groups()
            elif re.fullmatch(rf"(>>> )?{e.name}\(.*\)", line):
                call, result = line.removeprefix(">>> "), below.removeprefix("# ")
            elif line.startswith("Input: "):
                call, result = f"{e.name}({line.removeprefix('Input: ')})", below[len("Output: ") :]
            elif match := re.fullmatch(
                "[Ff]or (.* = .*?),? (?:the result should be|return) (.*?)[.]?", line
            ):
                call, result = f"{e.name}({match[1]})", match[2]
            else:
                continue
            assert eval(call, namespace) == eval(result), (call, result)
            found[re.sub(r"\W.*", "", line)] += 1
    assert sum(found.values()) > 250
    assert found["Input"] > 1
    assert found["assert"] > 50


def holds(value, hint) -> bool:
    """Whether the value is of the type, by typing's own reading of it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(holds(value, h) for h in inner)
    if hint is type(None) or not inner:
        return type(value) is hint
    if origin is tuple:
        return len(value) == len(inner) and all(map(holds, value, inner))
    if origin is dict:
        return all(holds(k, inner[0]) and holds(v, inner[1]) for k, v in value.items())
    return type(value) is origin and all(holds(v, inner[0]) for v in value)


def test_type_hints_are_right(varied):
    checked = Counter()
    for e in varied:
        hints = typing.get_type_hints(run(e)[e.name])
        seen = {"return": results(e.task)} | dict(zip(e.arguments, zip(*forms.pool(e.task.args))))
        for name, hint in hints.items():
            assert all(holds(v, hint) for v in seen[name]), (str(e.task), hints)
            checked[name == "return"] += 1
    assert min(checked[True], checked[False]) > 100


def test_a_varied_docstring_determines_the_answer():
    known = {}
    for seed in range(3):
        for task in TASKS:
            doc = vary(task, random.Random(seed)).doc
            assert known.setdefault((task.args, doc), results(task)) == results(task), doc


def test_prompts_and_bodies_are_what_the_evaluators_ask_and_cut(varied):
    protocol = Protocol("docstring", mbpp.DOCSTRING_STOP, to_body=False)
    for e in varied:
        assert source(e).endswith("\n")
        assert not source(e).endswith("\n\n")
        assert (protocol if e.form.mbpp else BODY).trim(e.solution()) == e.solution()
        if e.form.mbpp:
            problem = mbpp.problem(Mbpp(1, e.form.prose, e.solution(), [*e.form.lines], ""), "")
            assert problem["prompt"] == e.prompt()
            assert problem["entry_point"] == e.name
        else:
            assert e.prompt().endswith(e.form.quote + "\n")


def test_held_out_forms_can_be_perturbed():
    for i, task in enumerate(TASKS[:40]):
        e = vary(task, random.Random(i), mbpp_frac=0)
        problem = exercises.as_problem(e, results(task), [3])
        assert perturb.split(problem)
        for name in ("rename_function", "rename_arguments", "two_spaces", "typos"):
            if other := perturb.PERTURBATIONS[name](problem):
                namespace = {}
                exec(other["prompt"] + other["canonical_solution"] + other["test"], namespace)
                namespace["check"](namespace[other["entry_point"]])


@pytest.mark.parametrize("quoted", ["'''", "''", '""', "'\"'", "''''", "'", '"'])
def test_an_exercise_compiles_whatever_its_docstring_quotes(quoted):
    """Also where the docstring, without its full stop, begins or ends with what is quoted."""
    docs = [f"Join $a by {quoted}.", f"{quoted} $a", f"Put {quoted} in $a: {quoted}"]
    for i, doc in enumerate(docs):
        task = Task("text", "join_it", doc, "return $a", lambda a: quoted + a)
        for seed in range(60):
            e = vary(task, random.Random(f"{seed} {i}"))
            assert run(e)[e.name]("x") == "x"
            assert quoted in told(e), source(e)


def proses(doc: str, count=60):
    task = Task("ints", "first_one", doc, "return $a[:1]", lambda a: a[:1])
    told = [vary(task, random.Random(i)) for i in range(count)]
    return [(e.arguments[0], e.form.prose) for e in told]


def test_an_argument_is_named_once_and_where_it_is_needed():
    many = proses("List the numbers in $a.", 900)
    assert any(re.search(r"\b(numbers|integers|ints) `\1`", prose) for _, prose in many)
    assert not any(re.search(r"\b(numbers|integers|ints) \1\b", prose) for _, prose in many)
    for _, prose in proses("Given the list $a, return its first number."):
        assert prose.lower().count("given") == 1
    for doc in ("$a is a list. Return it.", "Return the tuple $a."):
        for name, prose in proses(doc):
            assert name in prose
            assert not re.search("(given|the) (list|array) is a|tuple (a|the) ", prose)


def test_the_third_person_and_typos():
    say = lambda s: re.sub(r"(^|\b(?:and then|and|then) )([\w-]+)", forms.third_person, s)  # noqa: E731
    assert say("Reverse $a and return the first") == "Reverses $a and returns the first"
    assert say("Multiply it by 2, then add 3") == "Multiplies it by 2, then adds 3"
    assert say("Count the even and odd ones") == "Counts the even and odd ones"
    text = "Count the words in $a that begin with 'hello', as `strings` do."
    seen = {forms.typo(text, random.Random(i)) for i in range(60)}
    assert text not in seen
    assert all("'hello'" in t and "`strings`" in t and "$a" in t for t in seen)
    assert all(sorted(t) == sorted(text) for t in seen)


def test_arguments_of_a_new_kind_are_told_by_their_type(monkeypatch):
    spots = Kind("spots", lambda rng: [(rng.random(), 1)], ([(0.5, 2)],))
    monkeypatch.setitem(KINDS, "spots", spots)
    task = Task("spots spots few", "total", "Add $a, $b and $c.", "return $c", lambda a, b, c: c)
    assert forms.types_of(task) == ("list[tuple[float, int]]",) * 2 + ("int", "int")
    for i in range(40):
        e = vary(task, random.Random(i))
        assert run(e)[e.name]([], [], 3) == 3
        assert not re.search(r"\$[abc]", source(e))
