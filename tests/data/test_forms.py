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
from data.synthetic.families import FAMILIES, KINDS
from data.synthetic.forms import results, vary
from eval import mbpp, perturb
from eval.harness import BODY, Protocol

TASKS = random.Random(0).sample([task for tasks in FAMILIES.values() for task in tasks], 1500)


@pytest.fixture(scope="module")
def varied():
    return [vary(task, random.Random(f"{task}")) for task in TASKS]


def source(exercise):
    return exercise.prompt() + exercise.solution()


def run(exercise):
    namespace = {}
    exec(source(exercise), namespace)
    return namespace


def test_varied_exercises_give_the_oracles_results(varied):
    for e in varied:
        exercises.check(e, results(e.task), range(20))


def test_a_task_and_a_seed_give_one_form(varied):
    assert varied[:50] == [vary(task, random.Random(f"{task}")) for task in TASKS[:50]]
    assert len({source(vary(TASKS[0], random.Random(i))) for i in range(50)}) == 50


def test_names_shadow_nothing():
    reserved = {*dir(builtins), *keyword.kwlist}
    for i, task in enumerate(TASKS):
        e = vary(task, random.Random(i))
        body = {
            n.id
            for n in ast.walk(ast.parse(exercises.fill(task.body, ("_a", "_b"))))
            if isinstance(n, ast.Name)
        }
        names = [e.name, *e.arguments]
        assert len({*names}) == len(names), names
        assert not {*names} & (reserved | body), (task, names)
        assert all(map(str.isidentifier, names))


def test_forms_differ(varied):
    forms_ = [e.form for e in varied]
    share = lambda test: sum(map(test, forms_)) / len(forms_)  # noqa: E731
    assert 0.12 < share(lambda f: f.mbpp) < 0.21
    assert 0.2 < share(lambda f: bool(f.hints)) < 0.36
    assert 0.03 < share(lambda f: f.indent == "\t") < 0.08
    assert 0.07 < share(lambda f: f.indent == "  ") < 0.15
    assert 0.05 < share(lambda f: f.quote == "'''") < 0.15
    assert 0.04 < share(lambda f: "from typing import" in f.lead) < 0.2
    assert {f.begin for f in forms_} == {"", " ", "\n"}
    assert {f.end for f in forms_} == {f.gap for f in forms_} == {"", "\n"}
    shown = [e for e in varied if not e.form.mbpp and re.search(rf"\b{e.name}\(", told(e))]
    assert 0.3 < len(shown) / len(varied) < 0.5
    assert len({e.name for e in varied}) > 600
    assert 0.1 < sum(e.name in forms.GENERIC for e in varied) / len(varied) < 0.3
    assert len({a for e in varied for a in e.arguments}) > 150
    begins = Counter(" ".join(e.form.prose.split()[:2]) for e in varied)
    assert len(begins) > 150
    assert begins.most_common(1)[0][1] < 0.3 * len(varied)


def told(e):
    """The docstring of a form, as Python reads it."""
    tree = ast.parse(source(e))
    return ast.get_docstring(tree if e.form.mbpp else tree.body[-1], clean=False)


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
    assert sum(found.values()) > 700
    assert found["Input"] > 5
    assert found["assert"] > 150


def holds(value, hint) -> bool:
    """Whether the value is of the type, by typing's own reading of it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(holds(value, h) for h in inner)
    if hint is type(None) or not inner:
        return type(value) is hint
    if type(value) is not origin:
        return False
    if origin is tuple:
        return len(value) == len(inner) and all(map(holds, value, inner))
    if origin is dict:
        return all(holds(k, inner[0]) and holds(v, inner[1]) for k, v in value.items())
    return all(holds(v, inner[0]) for v in value)


def test_type_hints_are_right(varied):
    checked = Counter()
    for e in varied:
        function = run(e)[e.name]
        hints = typing.get_type_hints(function)
        if "return" in hints:
            assert all(holds(v, hints["return"]) for v in results(e.task)), (e.task, hints)
            checked["return"] += 1
        for i, name in enumerate(e.arguments):
            if name in hints:
                values = [inputs[i] for inputs in forms.pool(e.task.args)]
                assert all(holds(v, hints[name]) for v in values), (e.task, hints)
                checked["argument"] += 1
    assert min(checked["return"], checked["argument"]) > 250


def test_a_varied_docstring_determines_the_answer():
    known = {}
    for task in (task for tasks in FAMILIES.values() for task in tasks):
        doc = vary(task, random.Random(1)).doc
        if known.setdefault((task.args, doc), results(task)) != results(task):
            pytest.fail(f"{task}: another task with {doc!r} does something else")


def test_mbpp_form_is_what_the_evaluator_asks(varied):
    protocol = Protocol("docstring", mbpp.DOCSTRING_STOP, to_body=False)
    asked = [e for e in varied if e.form.mbpp]
    assert len(asked) > 150
    for e in asked:
        problem = mbpp.problem(Mbpp(1, e.form.prose, e.solution(), [*e.form.lines], ""), "")
        assert problem["prompt"] == e.prompt()
        assert problem["entry_point"] == e.name
        assert protocol.trim(e.solution()) == e.solution()
        assert e.solution().startswith(f"def {e.name}(")


def test_a_body_ends_where_the_evaluator_cuts(varied):
    for e in varied:
        assert source(e).endswith("\n")
        assert not source(e).endswith("\n\n")
        assert max(map(len, source(e).splitlines())) <= 240
        if not e.form.mbpp:
            assert BODY.trim(e.solution()) == e.solution()
            assert e.prompt().endswith(e.form.quote + "\n")


def test_held_out_forms_can_be_perturbed():
    for i, task in enumerate(TASKS[:60]):
        e = vary(task, random.Random(i), mbpp_frac=0)
        inputs = forms.pool(task.args)[3]
        test = f"def check(candidate):\n    assert candidate(*{inputs!r}) == {results(task)[3]!r}\n"
        problem = {
            "prompt": e.prompt(),
            "canonical_solution": e.solution(),
            "entry_point": e.name,
            "test": test,
        }
        assert perturb.split(problem)
        for name in ("rename_function", "rename_arguments", "two_spaces", "typos"):
            if other := perturb.PERTURBATIONS[name](problem):
                namespace = {}
                exec(other["prompt"] + other["canonical_solution"] + other["test"], namespace)
                namespace["check"](namespace[other["entry_point"]])


@pytest.mark.parametrize("quoted", ["'''", "''", '""', "'\"'", "''''", "'", '"'])
def test_an_exercise_compiles_whatever_its_docstring_quotes(quoted):
    """Also where the docstring, without its full stop, begins or ends with what is quoted."""
    args = "text"
    for i, doc in enumerate(
        [f"Join $a by {quoted}.", f"{quoted} $a", f"Put {quoted} in $a: {quoted}"]
    ):
        task = forms.Task(args, "join_it", doc, "return $a", lambda a: quoted + a)
        for seed in range(60):
            e = vary(task, random.Random(f"{seed} {i}"))
            namespace = run(e)
            assert namespace[e.name]("x") == "x"
            assert quoted in told(e), source(e)


def test_a_docstring_that_would_end_early_is_refused():
    task = forms.Task("text", "join_it", 'Put """ behind $a.', "return $a", lambda a: a)
    with pytest.raises(AssertionError, match="end early"):
        vary(task, random.Random(0), mbpp_frac=0)


def test_an_argument_called_as_its_noun_is_quoted():
    task = FAMILIES["count"][0]
    proses = [vary(task, random.Random(i)).form.prose for i in range(1500)]
    assert any(re.search(r"\b(numbers|integers|ints) `\1`", prose) for prose in proses)
    assert not any(re.search(r"\b(numbers|integers|ints) \1\b", prose) for prose in proses)


def test_what_is_given_is_said_once():
    doc = "Given the list $a, return its first number."
    task = forms.Task("ints", "first_one", doc, "return $a[:1]", lambda a: a[:1])
    for i in range(60):
        assert vary(task, random.Random(i)).form.prose.lower().count("given") == 1


@pytest.mark.parametrize("doc", ["$a is a list. Return it.", "Return the tuple $a."])
def test_a_name_is_kept_where_it_is_needed(doc):
    task = forms.Task("ints", "first_one", doc, "return $a", lambda a: a)
    for i in range(60):
        e = vary(task, random.Random(i))
        assert e.arguments[0] in e.form.prose
        assert not re.search("(given|the) (list|array) is a|tuple (a|the) ", e.form.prose)


def test_the_third_person():
    say = lambda s: re.sub(r"(^|\b(?:and then|and|then) )([\w-]+)", forms.third_person, s)  # noqa: E731
    assert say("Reverse $a and return the first") == "Reverses $a and returns the first"
    assert say("Multiply it by 2, then add 3") == "Multiplies it by 2, then adds 3"
    assert say("Double it and then square it") == "Doubles it and then squares it"
    assert say("Count the even and odd ones") == "Counts the even and odd ones"


def test_a_typo_spares_names_and_quotes():
    text = "Count the words in $a that begin with 'hello', as `strings` do."
    seen = {forms.typo(text, random.Random(i)) for i in range(60)}
    assert text not in seen
    assert all("'hello'" in t and "`strings`" in t and "$a" in t for t in seen)
    assert all(sorted(t) == sorted(text) for t in seen)


def test_arguments_of_a_new_kind_are_told_by_their_type(monkeypatch):
    points = forms.KINDS["int"].__class__(
        "points", lambda rng: [(rng.random(), 1)], ([(0.5, 2)], [])
    )
    monkeypatch.setitem(KINDS, "points", points)
    task = forms.Task(
        "points points few", "total", "Add $a, $b and $c.", "return $c", lambda a, b, c: c
    )
    assert forms.types_of(task) == ("list[tuple[float, int]]",) * 2 + ("int", "int")
    for i in range(40):
        e = vary(task, random.Random(i))
        assert run(e)[e.name]([], [], 3) == 3
        assert not re.search(r"\$[abc]", source(e))
