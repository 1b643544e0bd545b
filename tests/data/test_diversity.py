import json
import random

import pytest

from common.config import UserError
from common.files import read_documents
from data.base.documents import ShardWriter, document
from data.base.minhash import shingles, signatures
from data.base.syntax import facts
from data.diversity import Config, diversity, growth, near_duplicates, set_names, vendi

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


def test_every_measure_tells_a_varied_set_from_a_uniform_one(sets, cli):
    out = sets / "out"
    done = cli("-m", "data.diversity", "--source", sets / "varied", "--source", sets / "same",
               "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Vendi score" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    varied, same = summary["sets"]["varied"], summary["sets"]["same"]
    for high in ("topics_covered", "distinct_4", "vendi", "names"):
        assert varied[high] > same[high], high
    assert varied["compression"] < same["compression"]
    assert varied["near_duplicate_frac"] < 0.05
    assert same["near_duplicate_frac"] >= 29 / 120
    assert varied["documents"] == same["documents"] == 120
    assert (out / "diversity.png").read_bytes()[:4] == b"\x89PNG"


def test_one_set_measures_the_same_in_other_shards(sets, monkeypatch):
    records = list(read_documents([sets / "varied"]))
    (sets / "again").mkdir()
    with ShardWriter(sets / "again") as writer:
        for record in reversed(records):
            writer.write(record)
    monkeypatch.setattr("data.diversity.SAMPLE", 50)
    monkeypatch.setattr("data.diversity.NEAR_DOCUMENTS", 80)
    summary = diversity(Config(source=(sets / "varied", sets / "again"), out=sets / "out"))
    one, other = summary["sets"].values()
    assert one == other


def test_facts_of_a_function_counted_by_hand():
    text = (
        "import os.path\nfrom json import loads\nfrom . import near\n\n\n"
        "def f(n):\n    if n > 1 and n < 9 or n == 4:\n        return f(n - 1)\n"
        "    return [i for i in range(n) if i]\n"
    )
    found = facts(text)
    assert found["complexity"] == [1 + 1 + 2 + 1]  # if, two of and / or, the comprehension
    topics = {"recursion", "conditions", "comprehensions", "files", "data formats"}
    assert topics < {*found["topics"]}
    assert "loops" not in found["topics"]
    lesson = f"# Title\n\nSome prose.\n\n```python\n{text}```\n"
    assert facts(lesson) == found
    assert facts("just prose, no code")["complexity"] == []


def test_vendi_and_growth_of_known_sets():
    assert vendi(["a b", "c d", "e"]) == pytest.approx(3)
    assert vendi(["def add_two(): pass", "two add()"] * 5) == pytest.approx(1)
    assert vendi(["a b", "c"] * 10) == pytest.approx(2)
    # Of a cosine of 0.5: eigenvalues 0.75 and 0.25.
    assert vendi(["a b", "a c"]) == pytest.approx(0.75**-0.75 * 0.25**-0.25)
    assert growth(["a", "b", "a"]) == [[0, 0], [1, 1], [2, 2], [3, 2]]


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


def test_sets_are_called_by_what_tells_them_apart_and_are_not_empty(tmp_path):
    a, b = tmp_path / "raw", tmp_path / "exercises" / "train"
    assert set_names((a, b)) == ["raw", "exercises/train"]
    with pytest.raises(UserError, match="given twice"):
        set_names((a, a))
    (tmp_path / "a.jsonl").write_text('{"text": "x = 1"}\n')
    with pytest.raises(UserError, match="want 2 or more"):
        diversity(Config(source=(tmp_path / "a.jsonl",), out=tmp_path / "out"))
