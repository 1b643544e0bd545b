import json
import math
import random

import numpy as np
import pytest

from common.config import UserError
from common.files import read_jsonl
from data.base.documents import ShardWriter, document
from data.base.minhash import shingles, signatures
from data.base.syntax import TOPICS, facts
from data.diversity import (
    Config,
    balance,
    distinct,
    diversity,
    growth,
    is_problems,
    near_duplicates,
    set_names,
    show,
    vectors,
    vendi,
)

WORDS = [f"{a}{b}" for a in "bcdfgklmnprst" for b in ("ake", "ill", "ound", "ery", "isto", "ump")]


def function(rng: random.Random) -> str:
    a, b, c, d = rng.sample(WORDS, 4)
    body = rng.choice([
        f"    for {c} in {b}:\n        print({c} + {rng.randrange(99)})\n",
        f"    if {b}:\n        return {a}({b} - 1)\n    return sorted([{rng.randrange(99)}])\n",
        f"    try:\n        return {{{c!r}: {b}}}\n    except {d}:\n        raise\n",
    ])  # fmt: skip
    return f"import {c}\n\n\ndef {a}({b}, {d}):\n{body}"


@pytest.fixture
def sets(tmp_path):
    """Two folders: `varied`, 120 functions of 4 shards, and `same`, one function with new numbers
    and 30 copies of another."""
    rng = random.Random(0)
    for name in ("varied", "same"):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, shard_bytes=8_000) as writer:
            for i in range(120):
                text = function(rng)
                if name == "same":
                    text = f"def add(number):\n    return number + {i}\n" * 3
                if name == "same" and i % 4 == 0:
                    text = function(random.Random(7)) * 4 + f"\n# {i}\n"
                writer.write(document(text, f"made:{i}"))
    return tmp_path


def test_a_varied_set_is_told_from_a_uniform_one_by_every_measure(sets):
    config = Config(source=(sets / "varied", sets / "same"), out=sets / "out", sample=100)
    summary = diversity(config)
    varied, same = summary["sets"]["varied"], summary["sets"]["same"]
    for high in ("topics_covered", "topic_balance", "distinct_1", "distinct_2", "distinct_4",
                 "vendi", "names", "modules", "imports_frac"):  # fmt: skip
        assert varied[high] > same[high], high
    assert varied["compression"] < same["compression"]
    assert varied["near_duplicate_frac"] < 0.05
    assert same["near_duplicate_frac"] >= 29 / 120
    assert varied["documents"] == same["documents"] == 120
    assert varied["parses_frac"] == 1
    assert all(round(100 * share, 6).is_integer() for share in varied["topics"].values())
    assert varied["runs_frac"] is None
    page = (sets / "out" / "index.html").read_text()
    assert page.count("<svg") == 4
    assert "src=" not in page
    assert "http://www.w3.org" in page  # a name of SVG's; nothing else is named
    assert all(topic in page for topic in TOPICS)


def test_one_set_measures_the_same_beside_itself_in_other_shards(sets):
    records = list(read_jsonl(sets / "varied" / "shard-00000.jsonl.zst"))
    (sets / "again").mkdir()
    with ShardWriter(sets / "again") as writer:
        for record in reversed(list(records)):
            writer.write(record)
    source = (sets / "varied" / "shard-00000.jsonl.zst", sets / "again")
    summary = diversity(Config(source=source, out=sets / "out"))
    one, other = summary["sets"].values()
    assert one == other


def test_problems_are_measured_and_their_solutions_run(tmp_path, cli):
    problem = {
        "prompt": 'def add(x):\n    """x + 1"""\n', "canonical_solution": "    return x + 1\n",
        "entry_point": "add", "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    }  # fmt: skip
    wrong = problem | {"canonical_solution": "    return x - 1\n"}
    made = [problem | {"prompt": problem["prompt"] + f"    # {i}\n"} for i in range(3)]
    rows = [p | {"task_id": f"t/{i}"} for i, p in enumerate([*made, wrong])]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"task_id": "t/9"}])))
    assert is_problems(tmp_path / "p.jsonl")
    done = cli("-m", "data.diversity", "--source", tmp_path / "p.jsonl", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "75%" in done.stdout
    assert "1 no problem" in done.stderr


def test_facts_of_a_function_counted_by_hand():
    text = (
        "import os.path\nfrom json import loads\nfrom . import near\n\n\n"
        "def f(n):\n    if n > 1 and n < 9 or n == 4:\n        return f(n - 1)\n"
        "    return [i for i in range(n) if i]\n"
    )
    found = facts(text)
    assert found["modules"] == ["json", "os"]
    assert found["complexity"] == [1 + 1 + 2 + 1]  # if, two of and / or, the comprehension
    assert {"recursion", "conditions", "comprehensions", "files", "data formats"} < {
        *found["topics"]
    }
    assert "loops" not in found["topics"]
    assert facts("x = 1")["depth"] == 4  # module, assignment, name, its context
    lesson = f"# Title\n\nSome prose.\n\n```python\n{text}```\n"
    assert facts(lesson)["complexity"] == found["complexity"]
    assert facts("just prose, no code")["depth"] is None


def test_vendi_of_known_sets():
    assert vendi(np.eye(7)) == pytest.approx(7)
    assert vendi(np.repeat(np.eye(7)[:1], 5, axis=0)) == pytest.approx(1)
    assert vendi(np.repeat(np.eye(3), 10, axis=0)) == pytest.approx(3)
    cosine = 0.5  # of two documents: eigenvalues 0.75 and 0.25
    two = np.array([[1, 0], [cosine, math.sqrt(1 - cosine**2)]])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert vendi(two) == pytest.approx(expected)
    config = Config(source=(), out=None)
    x = vectors(["def add_two(): pass", "two add()", "completely other", ""], config)
    assert (x[0] @ x[1], x[0] @ x[2]) == pytest.approx((1, 0), abs=0.01)
    assert x[3].sum() == 0


def test_balance_and_distinct_by_hand():
    assert balance([[topic] for topic in TOPICS]) == pytest.approx(1)
    assert balance([["loops"]] * 9) == 0
    assert balance([["loops", "lists"], []]) == pytest.approx(math.log(2) / math.log(len(TOPICS)))
    assert balance([]) == 0
    assert distinct(list("abab"), 1) == 0.5
    assert distinct(list("abab"), 2) == pytest.approx(2 / 3)
    assert distinct([], 4) == 0
    assert growth(["a", "b", "a"])[-1] == [3, 2]


def test_near_duplicates_are_counted_once_each():
    rng = random.Random(1)
    base = [" ".join(rng.choices(WORDS, k=200)) for _ in range(30)]
    near = [text + " and more" for text in base[:5]] + [base[0], base[0] + " yet more"]
    made = signatures(*shingles([t.encode() for t in base + near]), 128)
    assert near_duplicates(made) == pytest.approx(7 / 37)
    assert near_duplicates(made[:30]) == 0
    # A Jaccard index of 0.63: some become candidates, none is a near-duplicate.
    half = [" ".join([*text.split()[:155], *rng.choices(WORDS, k=45)]) for text in base]
    assert near_duplicates(signatures(*shingles([t.encode() for t in base + half]), 128)) == 0


def test_sets_are_called_by_what_tells_them_apart(tmp_path):
    a, b = tmp_path / "raw", tmp_path / "exercises" / "train"
    assert set_names((a, b)) == ["raw", "exercises/train"]
    assert set_names((a,)) == ["raw"]
    with pytest.raises(UserError, match="given twice"):
        set_names((a, a))
    assert show("chars", [1, 2000, 3]) == "1 / 2,000 / 3"
    assert show("runs_frac", None) == "-"


def test_an_empty_set_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x = 1"}\n')
    with pytest.raises(UserError, match="want 2 or more"):
        diversity(Config(source=(tmp_path / "a.jsonl",), out=tmp_path / "out"))
