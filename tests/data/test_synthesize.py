"""synthesize.py, its lessons and its requests: all output runs, without duplicates."""

import doctest
import json
import random
import re
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import UserError
from data.base.readers import read_documents
from data.synthesize import KINDS, Exercises, Textbooks, main, synthesize
from data.synthetic import prompts, textbooks, worked
from tests.fake_endpoint import FakeEndpoint


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


# ---- The built-in lessons


def faults_of(topic):
    """Yield the defects of a topic."""
    kinds = Counter(kind for kind, _ in topic.sections)
    others = {"why", "doc", "wrong", "mistake", "deeper", "task", "answer", "checks"}
    whole = {kinds.pop(k, 0) for k in ("code", "how", "calls")} == {1} and kinds["why"]
    if not whole or {*kinds} > others or kinds["wrong"] > kinds["mistake"]:
        yield f"its sections are {dict(kinds)}"
    rng, wrong, texts = random.Random(topic.title), False, set()
    for number, audience in enumerate(rng.sample(textbooks.AUDIENCES, 8)):
        writer = textbooks.Writer(topic, audience, "beginner", rng)
        code, calls = writer.sections("code", "calls")
        wrong = wrong or bool(writer.wrong(code, calls))
        if topic.of("doc") and not worked.function_in(code, writer.filled["f"]):
            yield "its docstring is of no function"
        if number < 3:
            text = textbooks.write(topic, audience, rng.choice([*textbooks.LEVELS]), rng)
            program, why_not = prompts.lesson_program(text)
            if why_not or program.count("assert ") < 3 or topic.title not in text:
                yield f"{why_not}: a lesson without title or tests"
            if left := re.search(r"\$\w|<[^<>`\n]*\|[^<>`\n]*>", text):
                yield f"{left[0]} is left"
            exec(compile(program, topic.title, "exec"), {})
            texts.add(text)
    if len(texts) < 3:
        yield "its lessons are the same"
    if wrong != bool(topic.of("wrong")):
        yield "what is called wrong is right"


@pytest.mark.parametrize("topic", textbooks.TOPICS, ids=lambda topic: topic.title)
def test_every_topic_is_whole_runs_and_teaches_what_is_true(topic):
    assert not [*faults_of(topic)]


def test_what_a_lesson_claims_is_computed():
    text = "Half\n== why\nw\n== code\ndef half(x):\n    return x / 4\n== how\nh\n== calls\nhalf(3)"
    topic = textbooks.Topic(text)
    lesson = textbooks.write(topic, textbooks.AUDIENCES[0], "beginner", random.Random(0))
    assert "assert half(3) == 0.75" in lesson


def test_examples_are_what_a_session_prints():
    writer, attempted = Textbooks(out=Path("x"), count=1), 0
    for i in range(2 * len(textbooks.TOPICS)):
        record, program = writer.make(i)
        space = {}
        exec(program, space)
        text = re.sub(r'^ *("""|```).*', "", record["text"], flags=re.MULTILINE)
        text = re.sub(r"^(print\(.*\))  # (.*)", r">>> \1\n\2\n", text, flags=re.MULTILINE)
        test = doctest.DocTestParser().get_doctest(text, space, record["topic"], None, 0)
        result = doctest.DocTestRunner().run(test)
        assert not result.failed, text
        attempted += result.attempted
    assert attempted > 2 * len(textbooks.TOPICS)


def test_a_lesson_names_its_audience_only_where_it_speaks_of_its_things():
    writer, named = Textbooks(out=Path("x"), count=1), 0
    for i in range(200):
        text, audience = writer.make(i)[0]["text"], writer.draw(i)[1]
        if f"{audience['who']} who" in text:
            things = [audience["one"], audience["many"], *audience["words"].split()]
            assert sum(text.count(thing) for thing in things) >= 3
            named += 1
    assert 10 < named < 60


# ---- Replies


def fenced(*blocks: str) -> str:
    return "\n".join(f"```python\n{block}```" for block in blocks)


NAME = "double_all"
FUNCTION = '''def double_all(numbers):
    """Double each."""
    return [2 * x for x in numbers]
'''
EXAMPLE = FUNCTION.replace("each.", "each.\\n\\n    >>> double_all([5])\\n    [10]\\n    ")
CASES = [("[1]", "[2]"), ("[]", "[]"), ("[3]", "[6]"), ("(0, 'a')", "[0, 'aa']")]
TESTS = "".join(f"assert double_all({x}) == {y}\n" for x, y in CASES)


def exercise_in(reply: str) -> tuple[dict, str] | str:
    """Return the exercise parsed from a reply with its tests, or why there is none."""
    fields, claims, why_not = prompts.read_exercise(reply, NAME)
    if why_not:
        return why_not
    record = {**fields, "text": fields["prompt"] + fields["solution"]}
    made = Exercises(out=Path("x"), count=1).finish(["refused", (record, claims)])
    assert made[0] == "refused"
    return made[1] if isinstance(made[1], str) else made[1][0]


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (fenced(FUNCTION + "\n\n" + TESTS), 0),
        (fenced(FUNCTION, TESTS), 0),
        (textwrap.indent(fenced(FUNCTION, TESTS), "  "), 0),
        (f"Sure!\n```py\n{FUNCTION}```\nTests:\n```\n{TESTS}```\nI hope it helps.", 0),
        (f"{FUNCTION}\n{TESTS}", 0),
        (fenced(f"def other():\n    pass\n\n\n{FUNCTION}print(double_all([1]))\n", TESTS), 0),
        (fenced(FUNCTION, FUNCTION.replace('    """Double each."""\n', "") + TESTS), 0),
        (fenced(FUNCTION, f"def test():\n{textwrap.indent(TESTS, '    ')}test()\n"), 0),
        (fenced(FUNCTION, TESTS.replace("[2]", "[1]").replace("[6]", "[8]")), 2),
        (fenced(FUNCTION, "".join(f"assert double_all({x})\n" for x, _ in CASES)), 1),
        ("```text\nDouble 1 to get 2\n```\n" + fenced("x = 1\n" + FUNCTION, TESTS), 0),
    ],
)
def test_an_exercise_gets_the_tests_that_its_code_passes(reply, wrong):
    found = exercise_in(reply)
    assert found["prompt"] + found["solution"] == FUNCTION
    assert found["prompt"].endswith('each."""\n')
    assert (found["tests"], found["wrong"]) == (TESTS, wrong)


def test_imports_and_decorators_belong_to_an_exercise():
    code = "import functools\n# cached\n@functools.cache\n" + FUNCTION
    found, claims, why_not = prompts.read_exercise(fenced(code, TESTS), NAME)
    assert not why_not
    want = "import functools\n\n\n@functools.cache\n" + FUNCTION
    assert found["prompt"] + found["solution"] == want
    assert claims[0] == ("double_all([1])", "double_all([1]) == [2]", False)


@pytest.mark.parametrize(
    ("example", "holds"),
    [
        (">>> double_all([5])\n    [10]", True),
        (">>> numbers = [5]\n    >>> print(double_all(numbers), 1)\n    [10] 1", True),
        (">>> double_all([]) is None\n    False", True),
        (">>> double_all([5])\n    [5]", False),
        (">>> double_all(numbers)\n    [10]", False),
        (">>>double_all([5])\n    [10]", False),
    ],
)
def test_an_example_in_the_docstring_must_hold(example, holds):
    code = FUNCTION.replace("each.", f"each.\n\n    {example}\n    ")
    found = exercise_in(fenced(code, TESTS))
    assert found["tests"] == TESTS if holds else found == "the docstring's example is wrong"


def test_the_docstring_counts_among_the_claims_that_hold():
    code = FUNCTION.replace("each.", "each.\n\n    >>> double_all([5])\n    [10]\n    ")
    tests = TESTS.replace("[2]", "[1]").replace("== []", "== 0").replace("== [6]", "== 3")
    assert exercise_in(fenced(FUNCTION, tests)) == "most tests are wrong"
    three = "".join(tests.splitlines(keepends=True)[1:])
    assert exercise_in(fenced(FUNCTION, three)) == "most tests are wrong"
    assert exercise_in(fenced(code, three))["wrong"] == 2


def test_a_reply_nested_deeply_is_no_exercise():
    deep = f"assert double_all([1]) == {'-' * 900}2\n" * 3
    assert exercise_in(fenced(FUNCTION, deep)) in ("most tests are wrong", "syntax")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("return", "return (", "syntax"),
        ("double_all(numbers):", "double(numbers):", "not the function asked for"),
        ('    """Double each."""\n', "", "no docstring"),
        ("    return [2 * x for x in numbers]\n", "", "no solution below the docstring"),
        ('each."""\n    return', 'each."""; return', "no solution below the docstring"),
        ("assert double_all([", "assert ([", "no tests"),
        ("return [2", "return [3", "most tests are wrong"),
        ("return [2", "return [1 / 0", "most tests are wrong"),
        ("return [2", "[2", "most tests are wrong"),
    ],
)
def test_an_exercise_that_is_none(old, new, why):
    assert exercise_in(fenced(FUNCTION, TESTS).replace(old, new)) == why


def test_what_returns_nothing_or_no_plain_data_has_no_tests():
    tests = "".join(f"assert double_all([{i}]) != 0\n" for i in range(4))
    for returned in ("None", "object()", "[0] * 99", "float('nan')"):
        reply = fenced(FUNCTION.replace("[2 * x for x in numbers]", returned), tests)
        assert exercise_in(reply) == "no tests"


WORDS = " ".join(prompts.WORDS) + "\n"
LESSON = f"# Title\n\n{WORDS}\n" + fenced("x = 1\nassert x == 1\n") + "\n\nThe end.\n"


@pytest.mark.parametrize(
    "reply",
    [
        LESSON, f"Sure! Here is a lesson:\n\n{LESSON}", f"```markdown\n{LESSON}```",
        f"```\n{LESSON}```\n", f"Here it is:\n```md\n\n{LESSON}```\nI hope this helps!",
        LESSON.replace("\n", "\r\n"), f"{LESSON}\n---\n\n**Let me know** if you like it.\n",
        LESSON.rstrip() + " I hope this helps! Feel free to ask.",
    ],
)  # fmt: skip
def test_a_lesson_in_a_reply(reply):
    assert prompts.read_lesson(reply) == (LESSON, "")


@pytest.mark.parametrize(
    "reply", ["A lesson.", fenced("# a comment\n"), fenced("x = 1\n") + LESSON]
)
def test_a_reply_without_a_lesson(reply):
    assert prompts.read_lesson(reply) == ("", "no heading first")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("x = 1\nassert x == 1\n", ""),
        ("for x in (1, 2):\n    assert x\n", ""),
        ("def test_it():\n    assert int('1') == 1\n\n\ntest_it()\n", ""),
        ("def test_it():\n    assert int('1') == 1\n", "no check that runs"),
        ("def f(x):\n    assert x\n    return x\n\n\nf(1)\n", "no check that runs"),
        ("def f(x):\n    return x\n", "no check that runs"),
        ("assert True\n", "no check that runs"),
        ("x = (\n", "syntax"),
    ],
)
def test_a_lesson_checks_something(code, why):
    block = fenced(code)
    for written in (block, block.replace("python", "Py"), textwrap.indent(block, "   ")):
        assert prompts.lesson_program(WORDS + written) == ("" if why else code, why)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (WORDS, "no code"),
        ("words\n" + fenced("x = 1\nassert x\n"), "no prose"),
        (f"```\n{WORDS}```\n" + fenced("x = 1\nassert x\n"), "no prose"),
        ("words " * 200 + "\n" + fenced("x = 1\nassert x\n"), "repeats itself"),
        (LESSON + f"```text\n{'The output is 5 or 6.' + chr(10)}```\n" * 5, "repeats itself"),
        (LESSON + "```\n", "an open fence"),
    ],
)
def test_a_lesson_that_is_none(text, why):
    assert prompts.lesson_program(text) == ("", why)


def test_requests_are_varied_by_topic_audience_names_and_words():
    writer = Textbooks(out=Path("x"), count=1, model="m")
    asked = {writer.prompt(i) for i in range(2 * len(textbooks.TOPICS))}
    topics = Counter(re.search("Topic: (.*)", text)[1] for text in asked)
    assert topics == {t.title: 2 for t in textbooks.TOPICS}
    writer = Exercises(out=Path("x"), count=1, model="m")
    names = [writer.draw(i)[0] for i in range(500)]
    assert len(set(names)) > 480
    assert all(f"called {name}." in writer.prompt(i) for i, name in enumerate(names))


# ---- The whole job


def test_textbooks_offline(tmp_path):
    summary = synthesize(Textbooks(out=tmp_path / "out", count=110))
    assert summary["documents"] == 110
    records = list(read_documents([tmp_path / "out"]))
    assert len({r["topic"] for r in records}) == 110
    assert all(r["writer"] == "builtin" and r["audience"] for r in records)


def test_the_main_reason_for_too_few_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data.synthesize.MOST_BARREN", 3)
    with FakeEndpoint(lambda request: "Sure!") as endpoint:
        config = by_endpoint(Textbooks, tmp_path / "out", endpoint, count=4)
        told = rf"only 0 .* refusal: 'no heading first' \(4 of .*in {config.replies()}"
        with pytest.raises(UserError, match=told):
            synthesize(config)


def test_too_few_different_ones_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("data.synthesize.MOST_BARREN", 3)
    with FakeEndpoint(lambda request: written(request, ("copy",))) as endpoint:
        config = by_endpoint(Textbooks, tmp_path / "out", endpoint, count=4)
        with pytest.raises(UserError, match=r"only 1 .* refusal: 'duplicate' .*ask for fewer"):
            synthesize(config)
    assert not (tmp_path / "out").exists()


# ---- By an endpoint


WAYS = ("good", "good", "wrong", "good", "prose", "good", "untested", "copy", "good", "good")


def written(request: dict, ways: tuple[str, ...] = WAYS) -> str:
    """Write the requested exercise or lesson, some of them wrong in one of several ways."""
    content = request["messages"][0]["content"]
    rng = random.Random(content)
    way = rng.choice(ways)
    number = 0 if way == "copy" else rng.randint(1, 10**9)
    if m := re.search(r"must be called (\w+)\.", content):
        code = f'def {m[1]}(x):\n    """Add {number} to x, as {m[1]} says."""\n'
        tests = [f"assert {m[1]}({x}) == {x + number + (way == 'wrong')}\n" for x in (0, 1, 2)]
        tests = "assert True\n" * 3 if way == "untested" else "".join(tests)
        return "Sure!\n" * (way == "prose") + fenced(f"{code}    return x + {number}\n", tests)
    words = "# Title\n\n" + " ".join(rng.sample(prompts.WORDS, 90) if number else prompts.WORDS)
    code = f"x = {number}\nassert x == {number + (way == 'wrong')}\n"
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
        summary = synthesize(config)  # resumes
        assert max(endpoint.replied.values()) == 1
        seen, first = endpoint.seen.total(), shards(tmp_path / "out")
        assert synthesize(replace(config, out=tmp_path / "again")) == summary  # from the cache
        assert endpoint.seen.total() == seen
        assert shards(tmp_path / "again") == first
    records = list(read_documents([tmp_path / "out"]))
    assert len(records) == summary["documents"] == 40
    refused = summary["refused"]
    assert summary["candidates"] - sum(refused.values()) >= 40
    assert refused["most tests are wrong" if kind == "exercises" else "code: failed"]
    assert refused["no tests" if kind == "exercises" else "no code"]
    assert all(len(r["words"]) == 3 and r["writer"] == "m" for r in records)
    for r in records:
        exec(r["text"] + r["tests"] if "tests" in r else prompts.lesson_program(r["text"])[0])


def test_benchmarks_are_kept_away_from_the_endpoints_exercises(tmp_path):
    name = Exercises(out=tmp_path / "x", count=9).draw(4)[0]
    problem = {"entry_point": name, "prompt": f'def {name}(x):\n    """Do it."""\n', "test": ""}
    (tmp_path / "b.jsonl").write_text(json.dumps(problem))
    with FakeEndpoint(lambda r: written(r, ("good",))) as endpoint:
        more = {"count": 12, "benchmarks": (tmp_path / "b.jsonl",)}
        summary = synthesize(by_endpoint(Exercises, tmp_path / "out", endpoint, **more))
    assert summary["refused"]["like a benchmark problem"] == 1
    assert name not in {r["entry_point"] for r in read_documents([tmp_path / "out"])}


def test_a_dry_run_prices_the_job_and_asks_nothing(tmp_path):
    with FakeEndpoint(written) as endpoint:
        more = {"count": 50, "dry_run": True, "usd_per_m_in": 1.0, "usd_per_m_out": 4.0}
        price = synthesize(by_endpoint(Textbooks, tmp_path / "out", endpoint, **more))
        assert price["requests"] == 50
        assert not endpoint.seen
    assert price["at_most"]["usd"] > 50 * 1500 * 4e-6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["poems"], "textbooks or exercises"),
        (["exercises", "--count=3"], "use python -m data.exercises"),
        (["textbooks", "--count=3", "--writer=gpt"], "want builtin or llm"),
        (["textbooks", "--count=3", "--dry_run"], "costs nothing"),
    ],
)
def test_wrong_options(words, told, in_process, tmp_path):
    code, _, stderr = in_process(main, *words, f"--out={tmp_path / 'out'}")
    assert code == 2
    assert told in stderr
    assert not (tmp_path / "out").exists()
