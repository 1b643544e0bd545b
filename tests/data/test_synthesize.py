"""synthesize.py, its lessons and its requests: all that is written runs, and nothing twice."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from common.config import UserError
from common.files import read_documents
from data.base.minhash import Index, jaccard, shingles
from data.synthesize import KINDS, Exercises, Textbooks, main, synthesize
from data.synthetic import prompts, textbooks, worked
from tests.fake_endpoint import FakeEndpoint


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


# ---- The built-in lessons


def fault_of(topic) -> str:
    """Return what is wrong with a topic, "" if nothing is."""
    kinds = Counter(kind for kind, _ in topic.sections)
    known = {"why", "code", "doc", "how", "calls", "wrong", "mistake", "deeper"}
    if not {*kinds} <= known | {"task", "answer", "checks"} or kinds["why"] < 1:
        return f"its sections are {[*kinds]}"
    once = [kinds[k] for k in ("code", "how", "calls")] == [1, 1, 1]
    if not once or kinds["wrong"] > kinds["mistake"]:
        return "want code, how and calls once, and a mistake for what is wrong"
    if len({kinds[k] for k in ("task", "answer", "checks")}) > 1 or kinds["task"] > 1:
        return "want a task with its answer and checks"
    rng, wrong, texts = random.Random(topic.title), False, set()
    for audience in rng.sample(textbooks.AUDIENCES, 8):
        writer = textbooks.Writer(topic, audience, "beginner", rng)
        code, calls = writer.sections("code", "calls")
        wrong = wrong or bool(writer.wrong(code, calls))
        if topic.of("doc") and not worked.function_in(code, writer.filled["f"]):
            return "its docstring is of no function"
        if len(texts) == 3:
            continue
        text = textbooks.write(topic, audience, rng.choice([*textbooks.LEVELS]), rng)
        program, why_not = prompts.lesson_program(text)
        if why_not or program.count("assert ") < 3 or topic.title not in text:
            return f"{why_not}: a lesson without title or tests"
        if left := re.search(r"\$\w|<[^<>`\n]*\|[^<>`\n]*>", text):
            return f"{left[0]} is left"
        exec(compile(program, topic.title, "exec"), {})
        texts.add(text)
    if len(texts) < 3:
        return "its lessons are all the same"
    return "" if wrong == bool(topic.of("wrong")) else "what is called wrong is right"


def test_every_topic_is_whole_runs_and_teaches_what_is_true():
    assert len({t.title for t in textbooks.TOPICS}) == len(textbooks.TOPICS) >= 100
    faults = {}
    for topic in textbooks.TOPICS:
        try:
            faults[topic.title] = fault_of(topic)
        except Exception as e:
            faults[topic.title] = repr(e)
    assert not {title: fault for title, fault in faults.items() if fault}


def test_what_a_lesson_claims_is_computed():
    def lesson(divisor: int) -> str:
        code = f"def half(x):\n    return x / {divisor}"
        text = f"Half\n== why\nw\n== code\n{code}\n== how\nh\n== calls\nhalf(3)\nhalf(4)"
        (topic,) = textbooks.read_topics(text)
        return textbooks.write(topic, textbooks.AUDIENCES[0], "beginner", random.Random(0))

    assert "assert half(3) == 1.5" in lesson(2)
    assert "assert half(3) == 0.75" in lesson(4)
    with pytest.raises(ZeroDivisionError):
        lesson(0)


# ---- Replies


FUNCTION = '''def double_all(numbers):
    """List each of the numbers times two."""
    return [2 * x for x in numbers]
'''
TESTS = """assert double_all([1]) == [2]
assert double_all([]) == []
assert double_all([3, 4]) == [6, 8]
"""


def fenced(*blocks: str) -> str:
    return "\n".join(f"```python\n{block}```" for block in blocks)


def test_an_exercise_as_asked_for():
    for above in ("", "import math\n\n"):
        found, why_not = prompts.read_exercise(fenced(above + FUNCTION, TESTS), "double_all")
        assert not why_not
        assert found["prompt"] + found["solution"] == above + FUNCTION
        assert found["prompt"].endswith('two."""\n')
        assert found["tests"] == TESTS


NO_DOC = FUNCTION.replace('    """List each of the numbers times two."""\n', "")
NO_BODY = FUNCTION[: FUNCTION.index("    return")]
ONE_LINE = 'def double_all(numbers):\n    """Doc."""; return 1\n'


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (fenced(FUNCTION), "not two blocks"),
        ("Sure!\n" + fenced(FUNCTION, TESTS), "not two blocks"),
        (fenced(FUNCTION, TESTS)[:-4], "not two blocks"),
        (fenced(FUNCTION + "(\n", TESTS), "syntax"),
        (fenced(FUNCTION.replace("double_all", "other"), TESTS), "not the function asked for"),
        (fenced(FUNCTION + FUNCTION, TESTS), "not the function asked for"),
        (fenced("", TESTS), "not the function asked for"),
        (fenced(NO_DOC, TESTS), "no docstring"),
        (fenced(NO_BODY, TESTS), "no solution below the docstring"),
        (fenced(ONE_LINE, TESTS), "no solution below the docstring"),
        (fenced(FUNCTION, "assert True\n" * 3), "no tests"),
        (fenced(FUNCTION, TESTS + "import os\n"), "no tests"),
        (fenced(FUNCTION, "assert double_all([1]) == [2]\n"), "no tests"),
    ],
)
def test_an_exercise_that_is_not(reply, why):
    assert prompts.read_exercise(reply, "double_all") == ({}, why)


def test_a_lesson_that_is_none():
    words = "words " * 200 + "\n"
    assert prompts.lesson_program(words + fenced("x = 1\n")) == ("x = 1\n", "")
    assert prompts.lesson_program(words) == ("", "no code")
    assert prompts.lesson_program("words\n" + fenced("x = 1\n")) == ("", "no prose")
    assert prompts.lesson_program(words + fenced("x = (\n")) == ("", "syntax")


def test_requests_are_varied_by_topic_audience_names_and_words():
    writer = Textbooks(out=Path("x"), count=1, model="m")
    asked = [writer.prompt(i) for i in range(2 * len(textbooks.TOPICS))]
    assert len(set(asked)) == len(asked)
    topics = [re.search("Topic: (.*)", text)[1] for text in asked]
    assert all(topics.count(t.title) == 2 for t in textbooks.TOPICS)  # balanced
    writer = Exercises(out=Path("x"), count=1, model="m")
    names = [writer.draw(i)[0] for i in range(500)]
    assert len(set(names)) > 480
    assert all(name.isidentifier() for name in names)
    assert all(name in writer.prompt(i) for i, name in enumerate(names))


def test_seen_refuses_what_is_like_something_before():
    config = Textbooks(out=Path("x"), count=1)
    texts = [config.make(i)[0]["text"] for i in range(60)]
    texts += [texts[3], texts[5].replace("the", "a", 2), texts[7] + "The end.\n"]
    accepted, reasons = [], Index(0.8).add(texts)

    def similarity(a: str, b: str) -> float:
        hashes, starts = shingles([a.encode(), b.encode()])
        return float(jaccard([hashes[: starts[1]]], [hashes[starts[1] :]])[0])

    for text, reason in zip(texts, reasons):
        most = max((similarity(text, other) for other in accepted), default=0.0)
        assert bool(reason) == (most >= 0.8)
        if not reason:
            accepted.append(text)
    assert reasons[-3:] == ["duplicate", "near-duplicate", "near-duplicate"]
    assert Index(0.8).add(["", "a"]) == ["", ""]


# ---- The whole job


def test_textbooks_offline_the_same_for_any_number_of_ranks(tmp_path):
    summary = synthesize(Textbooks(out=tmp_path / "out", count=110))
    assert summary["documents"] == 110
    records = list(read_documents([tmp_path / "out"]))
    assert len({r["topic"] for r in records}) == 110
    assert all(r["writer"] == "builtin" and r["audience"] for r in records)
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not mpirun:
        pytest.skip("no mpirun")
    command = ["-m", "mpi4py", "-m", "data.synthesize", "textbooks", "--count", "110"]
    subprocess.run(
        [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *command,
         "--out", tmp_path / "ranks"], cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip
    assert shards(tmp_path / "ranks") == shards(tmp_path / "out")
    assert json.loads((tmp_path / "ranks" / "summary.json").read_text()) == summary


def test_what_exists_is_not_written_again(tmp_path):
    synthesize(Textbooks(out=tmp_path / "a", count=20))
    with pytest.raises(UserError, match=r"only 0 different.*'duplicate': 20.*another --seed"):
        synthesize(Textbooks(out=tmp_path / "b", count=20, existing=(tmp_path / "a",)))
    synthesize(Textbooks(out=tmp_path / "b", count=20, existing=(tmp_path / "a",), seed=1))
    a, b = ({r["text"] for r in read_documents([tmp_path / name])} for name in "ab")
    assert not a & b


# ---- By an endpoint


WAYS = ("good", "good", "wrong", "good", "prose", "good", "untested", "copy", "good", "good")


def written(request: dict, ways: tuple[str, ...] = WAYS) -> str:
    """An exercise or a lesson as asked for, some of them wrong in one of several ways."""
    content = request["messages"][0]["content"]
    rng = random.Random(content)
    way = rng.choice(ways)
    number = 0 if way == "copy" else rng.randint(1, 10**9)
    if m := re.search(r"must be called (\w+)\.", content):
        name = m[1]
        code = f'def {name}(xs):\n    """Add {number} to each of xs, as {name} says."""\n'
        code += f"    return [x + {number} for x in xs]\n"
        want = "[1]" if way == "wrong" else f"[{number + 1}]"
        tests = f"assert {name}([1]) == {want}\nassert {name}([]) == []\nassert {name}([2]) != 2\n"
        if way == "untested":
            return fenced(code, "assert True\n" * 3)
        return "Sure!\n" * (way == "prose") + fenced(code, tests)
    words = " ".join(rng.choices(prompts.WORDS, k=120)) if number else "the same again " * 40
    result = number + (way == "wrong")
    code = f"x = {number}\nassert x == {result}\n"
    return words if way == "prose" else f"{words}\n\n" + fenced(code)


def by_endpoint(cls, out: Path, endpoint, **more):
    return cls(**{"out": out, "writer": "llm", "model": "m", "base_url": endpoint.url,
                  "budget_tokens": 10**9, "backoff_s": 0.001, "timeout_s": 0.3,
                  "cache": out.with_name("replies.jsonl"), **more})  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_endpoint_that_misbehaves_writes_all_and_is_paid_once(kind, tmp_path):
    with FakeEndpoint(written, max_faults=2) as endpoint:
        config = by_endpoint(KINDS[kind], tmp_path / "out", endpoint, count=40)
        with pytest.raises(UserError, match="budget"):
            synthesize(replace(config, budget_tokens=20_000))
        assert 0 < endpoint.replied.total() < 40
        assert not (tmp_path / "out").exists()
        summary = synthesize(config)  # goes on
        assert max(endpoint.replied.values()) == 1
        seen, first = endpoint.seen.total(), shards(tmp_path / "out")
        assert synthesize(replace(config, out=tmp_path / "again")) == summary  # from the cache
        assert endpoint.seen.total() == seen
        assert shards(tmp_path / "again") == first
    records = list(read_documents([tmp_path / "out"]))
    assert len(records) == summary["documents"] == 40
    refused = summary["refused"]
    assert summary["candidates"] - sum(refused.values()) >= 40
    assert refused["code: failed"]
    assert refused["not two blocks" if kind == "exercises" else "no code"]
    assert all(len(r["words"]) == 3 and r["writer"] == "m" for r in records)
    for r in records:
        exec(r["text"] + r["tests"] if "tests" in r else prompts.lesson_program(r["text"])[0])


def test_benchmarks_are_kept_away_from_the_endpoints_exercises(tmp_path):
    config = Exercises(out=tmp_path / "x", count=9, model="m")
    name = config.draw(4)[0]
    problem = {"entry_point": name, "prompt": f'def {name}(x):\n    """Do it."""\n', "test": ""}
    (tmp_path / "b.jsonl").write_text(json.dumps(problem))
    with FakeEndpoint(lambda r: written(r, ("good",))) as endpoint:
        config = by_endpoint(Exercises, tmp_path / "out", endpoint, count=12,
                             benchmarks=(tmp_path / "b.jsonl",))  # fmt: skip
        summary = synthesize(config)
    assert summary["refused"]["like a benchmark problem"] == 1
    assert name not in {r["entry_point"] for r in read_documents([tmp_path / "out"])}


def test_a_dry_run_prices_the_job_and_asks_nothing(tmp_path):
    with FakeEndpoint(written) as endpoint:
        config = by_endpoint(Textbooks, tmp_path / "out", endpoint, count=50, dry_run=True,
                             usd_per_m_in=1.0, usd_per_m_out=4.0)  # fmt: skip
        price = synthesize(config)
        assert price["requests"] == 50
        assert not endpoint.seen
    assert price["at_most"]["usd"] > 50 * config.reply_tokens * 4e-6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"writer": "gpt"}, "want builtin or llm"),
        ({"count": 0}, "at least 1"),
        ({"max_similarity": 0.0}, "above 0"),
        ({"dry_run": True}, "costs nothing"),
        ({"existing": (Path("/nowhere"),)}, "no such file"),
    ],
)
def test_wrong_options(wrong, told, tmp_path):
    with pytest.raises(UserError, match=told):
        synthesize(Textbooks(**{"out": tmp_path / "out", "count": 3, **wrong}))
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wants(in_process):
    for words, told in [
        (["poems"], "textbooks or exercises"),
        (["exercises", "--out=x", "--count=3"], "use python -m data.exercises"),
    ]:
        code, _, stderr = in_process(main, *words)
        assert code == 2
        assert told in stderr
