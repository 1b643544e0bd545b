import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import read_jsonl
from data.base import minhash
from data.base.documents import ShardWriter, document, shard_files
from data.base.readers import read_documents
from data.dedup import Config, Corpus, dedup

MPIRUN = Path(sys.executable).with_name("mpirun")
ROOT = Path(__file__).parents[2]


def text_of(seed, lines=12):
    rng = random.Random(seed)
    return "".join(
        f"name_{rng.randrange(10**6)} = call({rng.randrange(99)})\n" for _ in range(lines)
    )


def write(folder, shards):
    """Write `shards`, one file per list of documents."""
    folder.mkdir()
    for i, documents in enumerate(shards):
        with ShardWriter(folder) as writer:
            writer.shards = i
            for record in documents:
                writer.write(record)
    return folder


@pytest.fixture
def source(tmp_path):
    """Write ten different documents, and copies of some, to three shards."""
    texts = [text_of(i) for i in range(10)]
    near = texts[1].replace("call(", "call( ", 1).replace("name_", "other_", 1)  # one token of 72
    spaced = texts[2].replace(" = ", "=")  # the same tokens
    return write(
        tmp_path / "source",
        [
            [document(t, f"a:{i}") for i, t in enumerate(texts)],
            [document(texts[0], "b:exact"), document(near, "b:near"), document("new", "b:new")],
            [document(texts[0], "c:exact"), document(spaced, "c:spaced")],
        ],
    )


def origins(folder):
    return [d["origin"] for d in read_documents([folder])]


def removed(folder):
    return {d["origin"]: d for f in shard_files(folder / "removed") for d in read_jsonl(f)}


def test_planted_duplicates(source, tmp_path):
    summary = dedup(Config(source=(source,), out=tmp_path / "out"))
    gone = removed(tmp_path / "out")
    assert set(gone) == {"b:exact", "c:exact", "a:1", "a:2"} ^ {"a:2", "c:spaced"}
    assert origins(tmp_path / "out") == [
        *(f"a:{i}" for i in range(10) if i != 1),
        *("b:near", "b:new"),  # one character longer than a:1
    ]
    assert gone["b:exact"]["kept"] == document(text_of(0), "")["id"]
    assert gone["b:exact"]["jaccard"] == gone["c:spaced"]["jaccard"] == 1
    assert 0.8 <= gone["a:1"]["jaccard"] < 1
    counts = {"documents_in": 15, "documents": 11, "exact": 2, "near": 2, "groups": 3}
    assert {k: summary[k] for k in counts} == counts
    assert summary["largest_group"] == 3


def test_the_best_quality_stays_else_the_longest_and_first(tmp_path):
    long, short = text_of(1) + "tail = 1\n", text_of(1)
    shards = [
        [document(long, "long", quality=0.2), document(short, "short", quality=0.9)],
        [document(long + "\n", "unscored"), document(short + "\n", "word", quality="high")],
        [document(text_of(2), "first"), document(text_of(2), "scored", quality=1)],
        [document(text_of(3), "shorter"), document(text_of(3) + "\n", "longer", score=10)],
        [document(text_of(4), "one"), document(text_of(4), "two")],
    ]
    out = tmp_path / "out"
    summary = dedup(Config(source=(write(tmp_path / "source", shards),), out=out))
    assert origins(out) == ["short", "scored", "longer", "one"]
    assert (summary["exact"], summary["near"]) == (2, 4)


def test_copies_of_one_text_are_compared_a_few_times_each(tmp_path, monkeypatch):
    compared, jaccard = [], Corpus.jaccard
    monkeypatch.setattr(Corpus, "jaccard", lambda self, i, j: (
        compared.extend(zip(i.tolist(), j.tolist())) or jaccard(self, i, j)))  # fmt: skip
    texts = [text_of(0, 60) + f"copy = {i}\n" for i in range(300)]
    source = write(tmp_path / "source", [[document(t, str(i)) for i, t in enumerate(texts)]])
    assert dedup(Config(source=(source,), out=tmp_path / "out"))["largest_group"] == 300
    assert len(compared) < 3 * 300  # including `write`; all pairs would be 45 times as many


def test_what_is_connected_is_one_group_and_drift_is_counted(tmp_path):
    lines = text_of(3, 60).splitlines(keepends=True)
    chain = ["".join(lines[2 * i : 2 * i + 40]) for i in range(10)]  # neighbours share 38 lines
    source = write(tmp_path / "source", [[document(t, str(i)) for i, t in enumerate(chain)]])
    summary = dedup(Config(source=(source,), out=tmp_path / "out"))
    assert (summary["documents"], summary["largest_group"]) == (1, 10)
    gone = removed(tmp_path / "out")
    low = [d for d in gone.values() if d["jaccard"] < 0.8]
    assert 0 < len(low) == summary["drifted"] < 9


def test_finds_what_brute_force_finds(tmp_path):
    rng, texts = random.Random(0), []
    for i in range(60):
        tokens = text_of(i % 20, 15).split(" ")
        for _ in range(rng.randrange(6)):
            tokens[rng.randrange(len(tokens))] = f"x{rng.randrange(9)}"
        texts.append(" ".join(tokens))
    texts = list(dict.fromkeys(texts))
    source = write(tmp_path / "source", [[document(t, str(i)) for i, t in enumerate(texts)]])
    summary = dedup(Config(source=(source,), out=tmp_path / "out"))
    hashes, starts = minhash.shingles([t.encode() for t in texts])
    sets = [set(hashes[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8 and group[i] != group[j]:
                group = [group[j] if g == group[i] else g for g in group]
    assert summary["documents"] == len(set(group)) < len(texts)


def files(folder):
    """Return the output, which must not depend on the run."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpirun beside python")
def test_ranks_write_the_same_bytes(source, tmp_path):
    dedup(Config(source=(source,), out=tmp_path / "one"))
    done = subprocess.run(
        [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable, "-m",
         "mpi4py", "-m", "data.dedup", "--source", source, "--out", tmp_path / "three"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("11 of 15 documents") == 1
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_empty_and_tokenless_documents_are_no_near_duplicates(tmp_path):
    texts = [[(" ", "a"), ("\n", "b"), ("x", "c"), ("x ", "d")], [], [(" ", "e")]]
    shards = [[document(*of) for of in shard] for shard in texts]
    source = write(tmp_path / "source", shards)
    (source / "shard-00001.jsonl").touch()  # a shard without documents
    dedup(Config(source=(source,), out=tmp_path / "out"))
    assert origins(tmp_path / "out") == ["a", "b", "d"]
