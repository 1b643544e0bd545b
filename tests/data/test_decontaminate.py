import json
from dataclasses import replace

import pytest

from common.config import UserError
from common.files import read_jsonl
from data.base.ast_match import functions, functions_anywhere
from data.base.benchmarks import read_references
from data.base.documents import document, shard_files
from data.base.readers import read_documents
from data.decontaminate import FAR, Config, Finder, decontaminate, ngrams

LONG = '''def running_balance(entries, limit):
    """Return the largest balance that is reached before the account is closed because the sum
    of all its entries went over the limit for a second time in a row.
    """
'''
LONG_BODY = """    balance = best = over = 0
    for entry in entries:
        balance += entry
        if balance > limit:
            over += 1
            if over == 2:
                break
        else:
            over = 0
        best = max(best, balance)
    return best
"""
SHORT = 'def vowels_in(text):\n    """Count the vowels of a text."""\n'
SHORT_BODY = '    return sum(c in "aeiou" for c in text)\n'
PROBLEMS = [
    {"task_id": "T/0", "prompt": LONG, "canonical_solution": LONG_BODY,
     "entry_point": "running_balance", "test": ""},
    {"task_id": "T/1", "prompt": SHORT, "canonical_solution": SHORT_BODY,
     "entry_point": "vowels_in", "test": ""},
    {"task_id": "T/2", "prompt": "def helper(x):\n    return x\n\n\ndef last(x):\n",
     "canonical_solution": "    while x and x[-1] is None:\n        x = x[:-1]\n    return x\n",
     "entry_point": "last", "test": ""},
]  # fmt: skip

RENAMED = """def f(items, top):
    '''Nothing of the kind.'''
    a = b = c = 0
    for i in items:
        a += i
        if a > top:
            c += 1
            if c == 2:
                break
        else:
            c = 0
        b = max(b, a)
    return b
"""
SHORT_NEAR = """def count_vowels(s):
    '''Count the vowels in s.'''
    return sum(c in "aeiou" for c in s)
"""
SHORT_FAR = """def truths(rows):
    '''How many rows are old.'''
    return sum(r in "abc" for r in rows)
"""
STATEMENT = (
    "# The largest balance that is\n# reached, before the account: IS CLOSED because the_total\n"
    "def g():\n    return 1\n"
)
DOCUMENTS = {
    "renamed": RENAMED,
    "short near": SHORT_NEAR,
    "short far": SHORT_FAR,
    "statement": STATEMENT,
    "method": "class A:\n" + "".join(f"    {line}\n" for line in RENAMED.splitlines()),
    "markdown": f"How it works:\n\n```python\n{RENAMED}```\n\nThat is all, isn't it.\n",
    "one edit": RENAMED.replace("c += 1", "c -= 1"),
    "many edits": RENAMED.replace("a += i", "a += i - i - -i"),
    "other words": RENAMED.replace("c += 1", "c -= i * 3").replace("max(b, a)", "b or a[0]"),
    "other": 'def area(width, height):\n    """Multiply."""\n    return width * height\n',
    "no python": "Plain text, and nothing else.",
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROBLEMS))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write the documents, the first five in their own shard."""
    folder = tmp_path_factory.mktemp("documents")
    lines = [json.dumps(document(text, name)) + "\n" for name, text in DOCUMENTS.items()]
    for i in range(2):
        (folder / f"part-{i}.jsonl").write_text("".join(lines[5:] if i else lines[:5]))
    return folder


@pytest.fixture(scope="module")
def out(source, problems, tmp_path_factory, cli):
    out = tmp_path_factory.mktemp("out") / "clean"
    done = cli("-m", "data.decontaminate", "--source", source, "--benchmarks", problems,
               "--out", out)  # fmt: skip
    assert "0.95         5  45.45%        2 / 1\n" in done.stdout, done.stderr
    assert "\n1 documents have no Python to compare\n" in done.stdout
    return out


def removed(folder):
    return {d["origin"]: d for f in shard_files(folder / "removed") for d in read_jsonl(f)}


def test_what_is_removed_and_why(out):
    gone = removed(out)
    assert gone.keys() == {"renamed", "short near", "method", "markdown", "one edit"}
    assert {name: d["task_id"] for name, d in gone.items()} == {
        name: "T/1" if name == "short near" else "T/0" for name in gone
    }
    assert gone["renamed"]["match_rate"] == gone["method"]["match_rate"] == 1
    assert 0.95 <= gone["one edit"]["match_rate"] < 1
    words = "the largest balance that is reached before the account is closed because the"
    (overlap,) = [d for f in shard_files(out / "report" / "overlaps") for d in read_jsonl(f)]
    assert (overlap["origin"], overlap["words"]) == ("statement", words)
    assert overlap["match_rate"] == 0
    assert gone["renamed"]["words"] == ""
    assert gone["short near"]["function"] == SHORT_NEAR.rstrip()
    stay = {d["origin"]: d["text"] for d in read_documents([out])}
    assert stay == {name: text for name, text in DOCUMENTS.items() if name not in gone}


def test_the_table(out):
    s = json.loads((out / "summary.json").read_text())
    assert s["tau"]["0.95"] == {"removed": 5, "problems_similar": 2}
    assert s["tau"]["0.8"]["removed"] == 6  # many edits
    assert (s["documents_in"], s["documents"], s["removed"]) == (11, 6, 5)
    assert (s["by_ngram"], s["no_python"]) == (1, 1)
    assert s["problems"] == 3
    lines = list(read_jsonl(out / "report" / "problems.jsonl"))
    assert [p["task_id"] for p in lines] == ["T/0", "T/1", "T/2"]
    assert [p["close"]["0.95"] for p in lines] == [4, 1, 0]


COPIES = {"renamed", "method", "markdown", "one edit"}


@pytest.mark.parametrize(
    ("changes", "more", "less"),
    [
        ({"tau": 0.8}, {"many edits"}, set()),
        ({"tau": 0.8, "COPY_WORDS": 6}, set(), set()),
        ({"tau": 0.8, "COPY_FRAC": 0.5}, {"many edits", "other words"}, set()),
        ({"tau": 1.0}, set(), {"one edit"}),
        ({"SURE_NODES": 1}, {"short far"}, set()),
        ({"SURE_NODES": 1000, "COPY_WORDS": 6}, set(), COPIES),
        ({"ngrams": True}, {"statement"}, set()),
        ({"ngrams": True, "NGRAM": 14}, set(), set()),
    ],
)
def test_thresholds(out, source, problems, tmp_path, monkeypatch, changes, more, less):
    config = Config(source=(source,), benchmarks=(problems,), out=tmp_path / "o")
    for name, value in changes.items():
        if hasattr(config, name):
            config = replace(config, **{name: value})
        else:
            monkeypatch.setattr(f"data.decontaminate.{name}", value)
    decontaminate(config)
    assert removed(tmp_path / "o").keys() == removed(out).keys() - less | more


def test_near_is_measured_on_the_problems(problems):
    known = read_references(problems)
    assert Finder(known, 0.8).near == FAR  # unrelated to each other
    text = known[1].function.text.replace("vowels", "consonants")
    other = replace(known[1], function=replace(known[1].function, lines=[text]))
    assert 0 < Finder([known[1], other], 0.8).near < FAR


def test_ngrams_are_of_words():
    words = [f"w{i}" for i in range(14)]
    text = "É, ".join(words[:7]).upper() + "_" + "\n# ".join(words[7:])
    assert list(ngrams(text)) == [tuple(words[:13]), tuple(words[1:])]


def test_problem_files(tmp_path, shared_eval):
    for name, count in (("HumanEval.jsonl.gz", 164), ("mbpp.jsonl", 974),
                        ("sanitized-mbpp.json", 427)):  # fmt: skip
        found = read_references(shared_eval / name)
        assert len({p.task_id for p in found}) == len(found) == count
        assert all(len(p.docstring) > 15 and p.function.nodes for p in found)
    (first, *_) = read_references(shared_eval / "mbpp.jsonl")
    assert (first.task_id, first.function.name) == ("MBPP/1", "min_cost")
    assert first.function.nodes == functions(first.function.text)[0].nodes


def test_every_problem_is_found_in_a_string(shared_eval):
    problems = read_references(shared_eval / "HumanEval.jsonl.gz")
    finder, found = Finder(problems, 0.95), []
    texts = [json.dumps({"output": problem.function.text}) for problem in problems]
    for problem, hits in zip(problems, finder.find(texts, list(map(functions_anywhere, texts)))):
        found += [problem for hit in hits if hit.problem is problem and hit.reaches(0.95)]
    assert found == problems


HALF = '{"task_id": 1, "entry_point": "f", "canonical_solution": "", "prompt": '


@pytest.mark.parametrize("content", ['{"task_id": 1}', HALF + '"f("}', "[1]"])
def test_a_file_without_problems_is_refused(tmp_path, content):
    path = tmp_path / ("a.json" if content == "[1]" else "a.jsonl")
    path.write_text(content)
    with pytest.raises(UserError, match=path.name):
        read_references(path)
