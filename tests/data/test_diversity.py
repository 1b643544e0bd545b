import json
import random

import pytest

from common.config import UserError
from data.base.documents import ShardWriter, document
from data.base.readers import read_documents
from data.base.syntax import facts
from data.diversity import Config, diversity, of_words, vendi

WORDS = [f"{a}{b}" for a in "bcdfgklmnprst" for b in ("ake", "ill", "ound", "ery", "isto", "ump")]


def function(rng: random.Random) -> str:
    a, b, c, d = rng.sample(WORDS, 4)
    body = rng.choice([
        f"    for {c} in {b}:\n        print({c} + {rng.randrange(99)})\n",
        f"    if {b}:\n        return {a}({b} - 1)\n    return sorted([{rng.randrange(99)}])\n",
    ])  # fmt: skip
    return f"import {c}\n\n\ndef {a}({b}, {d}):\n{body}"


@pytest.fixture
def sets(tmp_path):
    """Write 120 documents to each of `varied` (functions) and `same` (one with new numbers)."""
    rng = random.Random(0)
    for name in ("varied", "same"):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, shard_bytes=8_000) as writer:
            for i in range(120):
                text = function(rng)
                if name == "same":
                    text = f"def add(number):\n    return number + {i}\n" * 3
                writer.write(document(text, f"made:{i}"))
    return tmp_path


def test_every_measure_tells_a_varied_set_from_a_uniform_one(sets, cli):
    out = sets / "out"
    done = cli("-m", "data.diversity", "--source", sets / "varied", "--source", sets / "same",
               "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Vendi score" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    varied, same = summary["sets"].values()
    for high in ("topics_covered", "distinct_4", "vendi", "names"):
        assert varied[high] > same[high], high
    assert varied["compression"] < same["compression"]
    assert varied["documents"] == same["documents"] == 120


def test_one_set_measures_the_same_in_other_shards(sets, monkeypatch):
    records = list(read_documents([sets / "varied"]))
    (sets / "again").mkdir()
    with ShardWriter(sets / "again") as writer:
        for record in reversed(records):
            writer.write(record)
    monkeypatch.setattr("data.diversity.SAMPLE", 50)
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
    assert facts(f"# Title\n\nSome prose.\n\n```python\n{text}```\n") == found


def test_vendi_of_known_sets():
    assert vendi(of_words(["a b", "c d", "e"])) == pytest.approx(3)
    assert vendi(of_words(["def add_two(): pass", "two add()"] * 5)) == pytest.approx(1)
    assert vendi(of_words(["a b", "c"] * 10)) == pytest.approx(2)
    # A cosine of 0.5 gives eigenvalues 0.75 and 0.25.
    assert vendi(of_words(["a b", "a c"])) == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def test_an_encoders_states_have_a_score_too(sets, encoder, cli):
    done = cli("-m", "data.diversity", "--source", sets / "same", "--out", sets / "out",
               "--encoder", encoder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Vendi score of states" in done.stdout
    (found,) = json.loads((sets / "out" / "summary.json").read_text())["sets"].values()
    assert 1 <= found["vendi_states"] < 2


def test_an_empty_set_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x = 1"}\n')
    with pytest.raises(UserError, match="want 2 or more"):
        diversity(Config(source=(tmp_path / "a.jsonl",), out=tmp_path / "out"))
