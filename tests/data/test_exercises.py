"""exercises.py and synthetic/families.py: right solutions, no leaks, tests that discriminate."""

import ast
import builtins
import doctest
import json
import keyword
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from common.config import UserError
from common.files import read_documents, read_jsonl
from data import exercises
from data.exercises import Benchmarks, solution_key, tell
from data.synthetic.families import FAMILIES, KINDS

ROOT = Path(__file__).parents[2]
EVAL = ROOT.parent / "shared/eval"
NONE = Benchmarks(())
TASKS = [task for tasks in FAMILIES.values() for task in tasks]
FEW = {name: FAMILIES[name] for name in ("count", "clamp", "cut_text", "combine")}


@pytest.fixture(scope="module")
def outputs():
    """Every task's outputs; raises where body and oracle disagree."""
    return exercises.run_tasks(NONE)[0]


@pytest.fixture(scope="module")
def problems(outputs):
    return exercises.hold_out(outputs, 500, NONE)


@pytest.fixture(scope="module")
def train(outputs, problems):
    left = {task: v for task, v in outputs.items() if str(task) not in problems}
    return list(exercises.draw(left, 2000, 0, NONE, Counter()))


def source(exercise):
    return exercise.prompt() + exercise.solution()


def test_there_are_many_tasks(outputs):
    assert len(FAMILIES) >= 40
    assert len(outputs) >= 5000
    assert len({str(task) for task in outputs}) == len(outputs)


@pytest.mark.parametrize("name", ["in_base", "find", "both", "combine"])
def test_a_wrong_body_is_caught(name):
    task = FAMILIES[name][0]
    wrong = replace(task, body="return None if 0 else []")
    results = [task.oracle(*x) for x in exercises.pool(task.args)]
    exercises.check(tell(task, random.Random(0)), results, range(exercises.POOL))
    with pytest.raises(AssertionError, match=name):
        exercises.check(tell(wrong, random.Random(0)), results, range(exercises.POOL))


def test_arguments_shadow_nothing():
    taken = {*dir(builtins), *keyword.kwlist} - {"_"}  # which a doctest of another test may set
    for task in TASKS:
        names = {n for kind in task.args.split() for n in KINDS[kind].names.split()}
        body = exercises.fill(task.body, ("_a", "_b"))
        stored = {
            node.id
            for node in ast.walk(ast.parse(f"def f():\n{re.sub('^', '    ', body, flags=re.M)}"))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        assert not names & (taken | stored), task
        assert not stored & taken, task
        for seed in range(3):
            assert tell(task, random.Random(seed)).name not in taken | names, task


def test_a_docstring_determines_the_answer(outputs):
    known = {}
    for task, results in outputs.items():
        for seed in range(4):
            doc = tell(task, random.Random(seed)).doc
            if known.setdefault((task.args, doc), results) != results:
                pytest.fail(f"{task}: another task with {doc!r} does something else")


def test_exercises_are_short_and_wrapped(train):
    sizes = [len(source(e)) for e in train]
    assert 130 < sum(sizes) / len(sizes) < 195
    assert max(len(line) for e in train for line in source(e).splitlines()) <= 100
    assert len({source(e) for e in train}) == len(train)


def test_examples_in_docstrings_are_right(train):
    shown = [e for e in train if e.example]
    assert 0.05 < len(shown) / len(train) < 0.2
    runner, parser = doctest.DocTestRunner(verbose=False), doctest.DocTestParser()
    for e in shown:
        namespace = {}
        exec(source(e), namespace)
        function = namespace[e.name]
        assert runner.run(parser.get_doctest(function.__doc__, namespace, e.name, "", 0)) == (0, 1)


def test_solution_key_ignores_names_and_nothing_else():
    one = 'def f(xs):\n    """A."""\n    return [x + 1 for x in xs if x in "ab"]\n'
    same = 'def g(n):\n    """B."""\n    return [y + 1 for y in n if y in "ab"]\n'
    assert solution_key(one) == solution_key(same)
    for other in (
        one.replace("+ 1", "+ 2"),
        one.replace("[x", "[xs"),
        one.replace('"ab"', '"x"'),
        one.replace("return [", "return sum([").replace('ab"]', 'ab"])'),
    ):
        assert solution_key(other) != solution_key(one)


def test_heldout_does_not_leak(problems, train, outputs):
    heldout = {solution_key(p["prompt"] + p["canonical_solution"]) for p in problems.values()}
    assert len(heldout) == len(problems) == 500
    assert not heldout & {solution_key(source(e)) for e in train}
    assert not set(problems) & {str(e.task) for e in train}
    left = [task for task in outputs if str(task) not in problems]
    assert not heldout & {solution_key(source(tell(task, random.Random(1)))) for task in left}


def test_heldout_is_made_of_what_training_shows(problems, train, outputs):
    families = Counter(p["family"] for p in problems.values())
    assert set(families) <= {e.task.family for e in train}
    assert len(families) >= 40
    assert max(families.values()) <= 500 / len(families) * 1.5
    left = [task for task in outputs if str(task) not in problems]
    shown = {str(p) for task in left for p in task.params}
    for task in outputs:
        if str(task) in problems:
            assert {str(p) for p in task.params if not isinstance(p, int)} <= shown


def passes(check, candidate):
    try:
        check(candidate)
    except Exception:
        return False
    return True


def results_in(check, solution):
    """What `solution` returns while it passes `check`."""
    results = []
    check(lambda *a: results.append(solution(*a)) or results[-1])
    return results


def test_heldout_tests_pass_the_reference_only(problems, outputs):
    siblings = defaultdict(list)
    for task in outputs:
        siblings[task.family, task.args].append(task)
    for task in outputs:
        if not (problem := problems.get(str(task))):
            continue
        namespace = {}
        exec(problem["prompt"] + problem["canonical_solution"] + "\n" + problem["test"], namespace)
        check, solution = namespace["check"], namespace[problem["entry_point"]]
        wanted = results_in(check, solution)
        assert len(wanted) == exercises.TESTS
        assert Counter(map(repr, wanted)).most_common(1)[0][1] <= exercises.MAX_SAME
        for value in wanted:
            assert not passes(check, lambda *a, value=value: value), f"{task}: constant {value!r}"
        for i in range(len(task.args.split())):
            assert not passes(check, lambda *a, i=i: a[i]), f"{task}: echo"
        for other in siblings[task.family, task.args]:
            assert other is task or not passes(check, other.oracle), f"{task}: {other} passes"


def test_a_test_that_a_trivial_body_passes_is_refused():
    task, rng = FAMILIES["clamp"][0], random.Random(0)
    inputs = [x for (x,) in exercises.pool(task.args)]
    mixed = [x * x for x in inputs]
    assert len(set(exercises.choose_tests(task, mixed, [mixed, inputs], rng))) == exercises.TESTS
    assert exercises.choose_tests(task, mixed, [mixed, list(mixed)], rng) == []
    assert exercises.choose_tests(task, inputs, [], rng) == []
    assert exercises.choose_tests(task, [x == 1 for x in inputs], [], rng) == []


def test_heldout_is_the_same_for_a_smaller_split(outputs, problems):
    few = exercises.hold_out(outputs, 60, NONE)
    assert list(few.items()) == list(problems.items())[:60]
    assert exercises.hold_out(outputs, 0, NONE) == {}
    some = dict(list(outputs.items())[:50])
    with pytest.raises(UserError, match="--heldout 100: only"):
        exercises.hold_out(some, 100, NONE)


def test_too_large_a_count_is_refused(outputs):
    some = {task: v for task, v in outputs.items() if task.family == "runs"}
    with pytest.raises(UserError, match="--count 5000: only about"):
        list(exercises.draw(some, 5000, 0, NONE, Counter()))


def test_shuffled_docstrings_keep_the_solutions(train):
    shuffled = exercises.shuffle_docstrings(train, 0)
    assert [e.solution() for e in shuffled] == [e.solution() for e in train]
    assert [e.arguments for e in shuffled] == [e.arguments for e in train]
    pairs = lambda es: Counter((e.task.args, e.name, e.doc, e.example) for e in es)  # noqa: E731
    assert pairs(shuffled) == pairs(train)
    assert sum(a.doc != b.doc for a, b in zip(train, shuffled)) > 0.95 * len(train)


COMMAND = """
import sys
from data import exercises
exercises.FAMILIES = {k: v for k, v in exercises.FAMILIES.items() if k in %r}
exercises.run(exercises.main)
"""


def generate(out, *flags, hash_seed="0", more=()):
    """The command on a few families, in a process of its own."""
    command = [sys.executable, "-c", COMMAND % sorted({*FEW, *more}), f"--out={out}", *flags]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


HELDOUT_SHA256 = "3beb0f16606cc2fd5063518380832a0e663aa78bbb204478ac957e1c879e3038"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_command_writes_the_same_bytes_for_a_seed(tmp_path):
    flags = ("--count=400", "--heldout=20")
    for name, more, hash_seed in [("a", (), "1"), ("b", (), "2"), ("c", ("--seed=1",), "1")]:
        done = generate(tmp_path / name, *flags, *more, hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["heldout.jsonl"] == c["heldout.jsonl"]
    assert a["train/shard-00000.jsonl.zst"] != c["train/shard-00000.jsonl.zst"]
    documents = list(read_documents([tmp_path / "a/train"]))
    heldout = list(read_jsonl(tmp_path / "a/heldout.jsonl"))
    summary = json.loads(a["summary.json"])
    assert len(documents) == summary["documents"] == sum(summary["train_by_family"].values()) == 400
    assert len(heldout) == summary["heldout"] == sum(summary["heldout_by_family"].values()) == 20
    asked = {"count": 400, "heldout": 20, "seed": 0, "shuffle_docstrings": False}
    asked |= {"forms": "plain", "unseen": 0, "damage_frac": 0.0, "concepts": False}
    assert summary["args"] == asked
    assert set(a) == {"heldout.jsonl", "summary.json", "train/shard-00000.jsonl.zst", ".nanophi"}
    # Pinned before there were other forms: the demo's numbers are of these very exercises.
    texts = "".join(d["text"] for d in documents)
    assert sha256(texts.encode()).hexdigest() == (
        "b270a03a3bb5b2ed2db958200a48487a7175ca95d6e7ca2243b7b26cb0344e8c"
    )
    assert sha256("".join(map(json.dumps, heldout)).encode()).hexdigest() == HELDOUT_SHA256
    for d in documents:
        assert d["text"] == d["prompt"] + d["solution"]
        assert d["origin"] == "exercises:" + d["family"]
        assert d["prompt"].startswith(f"def {d['entry_point']}(")
    assert {d["family"] for d in documents} == set(FEW)
    keys = {solution_key(d["text"]) for d in documents}
    assert not keys & {solution_key(p["prompt"] + p["canonical_solution"]) for p in heldout}
    assert len({p["task_id"] for p in heldout}) == 20


def test_command_records_the_shuffle(tmp_path):
    done = generate(tmp_path / "a", "--count=200", "--heldout=5", "--shuffle_docstrings")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["args"]["shuffle_docstrings"] is True
    assert summary["docstrings_exchanged"] > 100


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--count=0", "--count 0: want at least 1"),
        ("--count=-3", "--count -3: want at least 1"),
        ("--heldout=-1", "--heldout -1: want 0 or more"),
        ("--heldout=100000", "--heldout 100000: only"),
        ("--unseen=-1", "--unseen -1: want 0 or more"),
        ("--unseen=5", "--unseen 5: only 0 tasks qualify"),
        ("--damage_frac=1.5", "--damage_frac 1.5: want a share"),
        ("--forms=other", "--forms 'other': want plain or varied"),
        ("--benchmarks=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--benchmarks=nowhere.json", "cannot read benchmark nowhere.json"),
        ("--benchmarks=pyproject.toml", "pyproject.toml line 1: not valid JSON"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flag, message):
    done = generate(tmp_path / "out", flag)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_varies_damages_and_leaves_families_out(tmp_path):
    flags = ("--count=300", "--heldout=10", "--unseen=12", "--forms=varied")
    runs = [("a", 0.4, "1"), ("b", 0.4, "2"), ("c", 0.0, "3")]
    for name, frac, hash_seed in runs:
        more = {"windows", "unclosed"}
        done = generate(
            tmp_path / name, *flags, f"--damage_frac={frac}", hash_seed=hash_seed, more=more
        )
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for name in ("heldout.jsonl", "unseen.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    damaged = list(read_documents([tmp_path / "a/train"]))
    sound = list(read_documents([tmp_path / "c/train"]))
    unseen = list(read_jsonl(tmp_path / "a/unseen.jsonl"))
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert sum(d.get("damaged", False) for d in damaged) == summary["damaged"] == 120
    assert len(unseen) == summary["unseen"] == 12
    assert {p["family"] for p in unseen} == {"windows", "unclosed"}
    assert {d["family"] for d in damaged} == set(FEW)
    assert not any("damaged" in d for d in sound)
    for a, b in zip(damaged, sound, strict=True):
        assert all(a[k] == b[k] for k in ("prompt", "entry_point", "family", "task", "origin"))
        assert (a["solution"] != b["solution"]) == a.get("damaged", False)
    for p in unseen:
        namespace = {}
        exec(p["prompt"] + p["canonical_solution"] + p["test"], namespace)
        namespace["check"](namespace[p["entry_point"]])


# ---- Families that training lacks


@pytest.fixture(scope="module")
def seen(outputs):
    return exercises.leave_families_out(outputs, Counter())


def test_unseen_families_do_not_leak(outputs, seen):
    unseen = exercises.hold_out(outputs, 100, NONE, unseen=True)
    assert exercises.UNSEEN == {p["family"] for p in unseen.values()}
    assert not exercises.UNSEEN & {task.family for task in seen}
    assert len(seen) > 0.75 * len(outputs)
    hidden = [task for task in outputs if task.family in exercises.UNSEEN]
    made = {(task.args, repr(outputs[task])) for task in hidden}
    assert not made & {(task.args, repr(outputs[task])) for task in seen}
    keys = {exercises.key(task) for task in hidden}
    assert {solution_key(p["prompt"] + p["canonical_solution"]) for p in unseen.values()} <= keys
    assert not keys & {exercises.key(task) for task in seen}


def test_a_task_that_does_what_an_unseen_one_does_is_left_out(outputs):
    unseen = next(t for t in outputs if str(t) == "windows(sum(x), 3)")
    body = "return [sum($a[i:i + 3]) for i in range(0, len($a) - 2)]"
    others = [
        replace(unseen, family="other", params=(kind, oracle), args=kind, body=body, oracle=oracle)
        for kind, oracle in [
            ("ints", unseen.oracle),
            ("sorted", unseen.oracle),  # of another kind, but the same type
            ("sorted", lambda a: unseen.oracle(a)[:1]),
            ("ints", lambda a: [x + 1 for x in unseen.oracle(a)]),
        ]
    ]
    tasks = {t: exercises.results(t) for t in [unseen, *others]}
    left = exercises.leave_families_out(tasks, Counter())
    assert [*left] == others[2:]


def write_benchmarks(folder):
    """A HumanEval file and an MBPP file, each with one problem."""
    doc = "Tell me how many of the given whole numbers are found to be larger than nine."
    (folder / "humaneval.jsonl").write_text(
        json.dumps(
            {
                "task_id": "HumanEval/0",
                "prompt": f'def above_nine(xs):\n    """{doc}"""\n',
                "entry_point": "above_nine",
                "test": "def check(candidate):\n    assert candidate([10, 9, 3]) == 1\n"
                "    assert candidate([11, 12, -20]) == 2\n    assert candidate([5]) == 0\n",
            }
        )
    )
    (folder / "mbpp.json").write_text(
        json.dumps(
            [
                {
                    "task_id": 1,
                    "text": "Write a function to limit n to the range from 0 to 10.",
                    "test_setup_code": "",
                    "code": "def limit_it(n):\r\n  return min(max(n, 0), 10)",
                    "test_list": ["assert limit_it(-3) == 0", "assert limit_it(7) == 7"],
                }
            ]
        )
    )
    return Benchmarks((folder / "humaneval.jsonl", folder / "mbpp.json"))


def test_benchmark_problems_are_found_by_name_text_and_behaviour(tmp_path):
    benchmarks = write_benchmarks(tmp_path)
    exercise = tell(FAMILIES["clamp"][0], random.Random(0))
    assert benchmarks.overlap(exercise) == ""
    assert "name" in benchmarks.overlap(replace(exercise, name="above_nine"))
    assert "name" in benchmarks.overlap(replace(exercise, name="limit_it"))
    same = replace(exercise, doc="Limit $a to the range from 0 to 10.", arguments=("n",))
    assert "docstring" in benchmarks.overlap(same)
    shared = "how many of the given whole numbers are found to be"
    assert "docstring" in benchmarks.overlap(replace(exercise, doc=f"Say {shared} small."))
    assert benchmarks.overlap(replace(exercise, doc=f"Say {shared[:-6]} small.")) == ""
    varied = exercises.vary(FAMILIES["clamp"][0], random.Random(0))
    assert benchmarks.overlap(varied) == ""
    for name in ("above_nine", "aboveNine", "above_Nine", "Above_nine"):
        assert "name" in benchmarks.overlap(replace(varied, name=name))
    benchmarks.names.add("solve")
    assert benchmarks.overlap(replace(varied, name="solve")) == ""  # it tells nothing
    assert "name" in benchmarks.overlap(replace(exercise, name="solve"))
    core = "Limit the number to the range from 0 to 10."
    benchmarks.texts.add(tuple(exercises.normalize(core)))
    dressed = replace(
        varied.form, prose=f"You are given a number n. {core} The result is a number."
    )
    assert "docstring" in benchmarks.overlap(replace(varied, doc=core, form=dressed))
    dressed = replace(varied.form, prose=f"Please say {shared} small.")
    assert "docstring" in benchmarks.overlap(replace(varied, form=dressed))
    found = {
        str(task)
        for task in FAMILIES["count"]
        if benchmarks.has(task, [task.oracle(*x) for x in exercises.pool(task.args)])
    }
    assert "count(ints, x > 9)" in found
    assert not found & {"count(ints, x > 8)", "count(ints, x > 10)", "count(ints, x < 9)"}


def test_problems_of_two_lists_are_found_by_behaviour(tmp_path):
    tests = [
        "assert larger([1, 5], [2, 3]) == [2, 5]",
        "assert larger([7], [7]) == [7]",
        "assert larger([0, -1, 4], [3, -2, 9]) == [3, -1, 9]",
    ]
    row = {"task_id": 1, "text": "The larger ones.", "code": "def larger(a, b):\n    pass",
           "test_list": tests, "test_setup_code": ""}  # fmt: skip
    path = tmp_path / "mbpp.jsonl"
    path.write_text(json.dumps(row) + "\n")
    benchmarks = Benchmarks((path,))
    found = [
        str(task)
        for task in FAMILIES["combine"]
        if benchmarks.has(task, [task.oracle(*x) for x in exercises.pool(task.args)])
    ]
    assert found == ["combine(two lists, max(x, y), [{e} {loop}])"]


def test_a_file_that_is_no_benchmark_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"entry_point": "f"}\n')
    with pytest.raises(UserError, match=r"other\.jsonl: a problem lacks 'prompt'"):
        Benchmarks((tmp_path / "other.jsonl",))


@pytest.mark.skipif(not EVAL.exists(), reason="needs ../shared/eval")
def test_no_wording_overlaps_with_humaneval_or_mbpp():
    names = ("HumanEval.jsonl.gz", "mbpp.jsonl", "sanitized-mbpp.json")
    benchmarks = Benchmarks(tuple(EVAL / name for name in names))
    assert len(benchmarks.names) > 1000
    for task in TASKS:
        for seed in range(3):
            exercise = tell(task, random.Random(seed))
            assert not benchmarks.overlap(exercise), (exercise.name, exercise.doc)
