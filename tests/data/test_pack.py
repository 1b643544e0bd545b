import json

import numpy as np
import pytest

from common.files import read_documents
from data.base.documents import ShardWriter
from data.pack import cut, join
from data.shards import open_shard
from tokenizer import Tokenizer


def documents_of(folder, split, tokenizer):
    """The texts in a split's shards."""
    texts = []
    for path in sorted(folder.glob(f"{split}*.bin")):
        ids = open_shard(path, tokenizer.vocab_size, tokenizer.fingerprint).tolist()
        assert ids[-1] == tokenizer.end_of_text
        start = 0
        for i, t in enumerate(ids):
            if t == tokenizer.end_of_text:
                texts.append(tokenizer.decode(ids[start:i]))
                start = i + 1
    return texts


def test_every_document_once_on_one_side(corpus, tokens):
    tokenizer = Tokenizer(tokens)
    train, val = (documents_of(tokens, split, tokenizer) for split in ("train", "val"))
    texts = [d["text"] for d in read_documents([corpus])]
    assert sorted(train + val) == sorted(texts)
    assert not set(train) & set(val)
    assert 0.03 < len(val) / len(texts) < 0.2
    summary = json.loads((tokens / "summary.json").read_text())
    assert summary["val_documents"] == len(val)


def test_shards_are_cut_between_documents_and_hold_the_same(cli, corpus, tokens, tmp_path):
    done = cli("-m", "data.pack", "--source", corpus, "--tokenizer", tokens,
               "--out", tmp_path / "out", "--shard_tokens", 2000, "--val_frac", 0.1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("train_*.bin"))) > 3
    tokenizer = Tokenizer(tokens)
    for split in ("train", "val"):
        assert documents_of(tmp_path / "out", split, tokenizer) == documents_of(
            tokens, split, tokenizer
        )


def test_bad_input_leaves_the_old_output(cli, corpus, tokens, tmp_path):
    out = tmp_path / "out"
    pack = ["-m", "data.pack", "--tokenizer", tokens, "--out", out]
    assert cli(*pack, "--source", corpus).returncode == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text("")
    for args, message in [
        (["--source", tmp_path / "bad.jsonl"], "quarantined: 1 not JSON"),
        (["--source", tmp_path / "bad.jsonl"], "no document in the val split (1 in all)"),
        (["--source", tmp_path / "empty.jsonl"], "no document in the train split"),
        (["--source", tmp_path / "nowhere.jsonl"], "no such file"),
        (["--source", corpus, "--val_frac", 0], "--val_frac 0.0"),
        (["--source", corpus, "--epochs", 1, "--epochs", 2], "got 2 for 1 sources"),
        (["--source", corpus, "--epochs", 1, "--weight", 2], "give one"),
        (["--source", corpus, "--weight", 0], "--weight: got 0"),
        (["--source", corpus, "--tokenizer", tmp_path], "no tokenizer at"),
    ]:
        done = cli(*pack, *args)
        assert done.returncode == 2, (args, done.stderr)
        assert message in done.stderr
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def mixed(cli, corpus, tokens, tmp_path):
    """pack(option, values): a mixture of the corpus' even and its odd documents, twice as many."""
    documents = list(read_documents([corpus]))
    for name, of in (("a", documents[::3]), ("b", documents[1::3] + documents[2::3])):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, shard_bytes=10_000) as writer:
            for document in of:
                writer.write(document)

    def pack(option, a, b):
        done = cli("-m", "data.pack", "--source", tmp_path / "a", "--source", tmp_path / "b",
                   option, a, option, b, "--tokenizer", tokens, "--out", tmp_path / "mix",
                   "--val_frac", 0.1, "--shard_tokens", 4000)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return tmp_path / "mix", json.loads((tmp_path / "mix" / "mixture.json").read_text())

    return pack


def test_a_mixture_holds_every_document_once_and_keeps_its_sources_apart(mixed, tokens, tmp_path):
    mix, manifest = mixed("--epochs", 3, 0.5)
    tokenizer = Tokenizer(mix)
    of_shard = {p.name: documents_of(p.parent, p.stem, tokenizer) for p in mix.glob("train_*.bin")}
    train = {}
    for source in manifest["sources"]:
        train[source["source"]] = [t for name in source["shards"] for t in of_shard[name]]
    val = documents_of(mix, "val", tokenizer)
    assert len(of_shard) == sum(len(s["shards"]) for s in manifest["sources"]) > 3
    sha256 = {}
    for name in "ab":
        documents = list(read_documents([tmp_path / name]))
        sha256 |= {d["text"]: d["sha256"] for d in documents}
        texts = [d["text"] for d in documents]
        assert train[str(tmp_path / name)] == [t for t in texts if t not in val]
    assert len(val) + sum(map(len, train.values())) == len(sha256)
    assert val == sorted(val, key=sha256.get)
    a, b = manifest["sources"]
    assert (a["epochs"], b["epochs"]) == (3, 0.5)
    assert a["share"] == pytest.approx(3 * a["tokens"] / (3 * a["tokens"] + b["tokens"] / 2), 1e-4)
    assert a["share"] + b["share"] == pytest.approx(1)


def test_weights_are_shares_of_what_is_seen(mixed):
    _, manifest = mixed("--weight", 3, 1)
    a, b = manifest["sources"]
    assert (a["share"], b["share"]) == (0.75, 0.25)
    assert a["epochs"] == 1
    assert b["epochs"] == pytest.approx(a["tokens"] / b["tokens"] / 3, 1e-4)


def test_train_reads_a_mixture(cli, mixed, tiny, tmp_path):
    mix, _ = mixed("--epochs", 3, 0.5)
    done = cli("train.py", *tiny, "--data", mix, "--out", tmp_path / "run", "--max_steps=3")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_a_cut_is_behind_the_document_that_fills_it():
    def run(i, lengths):
        lengths = np.array(lengths, np.uint32)
        return np.full(len(lengths), i), np.cumsum(lengths, dtype=np.int64) - lengths, lengths

    runs = [run(0, [4, 4, 4]), run(1, []), run(2, [1, 1, 30, 2])]
    found = [(documents, stretches.tolist()) for documents, stretches in cut(runs, 8)]
    assert found == [(2, [[0, 0, 8]]), (4, [[0, 8, 4], [2, 0, 32]]), (1, [[2, 32, 2]])]
    assert list(cut([], 8)) == []


def test_documents_that_follow_each_other_are_one_stretch():
    inputs, firsts, lengths = np.array([0, 0, 1, 1, 0]), np.array([0, 3, 5, 9, 4]), np.array([3, 1, 4, 1, 2])  # fmt: skip # noqa: E501
    assert join(inputs, firsts, lengths).tolist() == [[0, 0, 4], [1, 5, 5], [0, 4, 2]]
