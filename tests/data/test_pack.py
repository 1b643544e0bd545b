import json

import pytest

from data import pack
from data.base.documents import ShardWriter
from data.base.readers import read_documents
from data.shards import open_shard
from tokenizer import Tokenizer


def documents_of(folder, split, tokenizer):
    """Return a split's texts; assert that each shard ends with the document that fills it."""
    texts = []
    for path in sorted(folder.glob(f"{split}*.bin")):
        ids = open_shard(path, tokenizer.vocab_size, tokenizer.fingerprint).tolist()
        *ends, last = [i for i, token in enumerate(ids) if token == tokenizer.end_of_text]
        assert last == len(ids) - 1
        assert (ends[-1] if ends else 0) < pack.SHARD_TOKENS
        starts = [0, *(end + 1 for end in ends)]
        texts += [tokenizer.decode(ids[a:b]) for a, b in zip(starts, [*ends, last])]
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


def test_bad_input_leaves_the_old_output(corpus, tokens, tmp_path, in_process):
    out = tmp_path / "out"
    arguments = ["--tokenizer", tokens, "--out", out]
    assert in_process(pack.main, *arguments, "--source", corpus)[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text("")
    for args, message in [
        (["--source", tmp_path / "bad.jsonl"], "quarantined: 1 not JSON"),
        (["--source", tmp_path / "empty.jsonl"], "no document in the train split"),
        (["--source", corpus, "--val_frac", 0], "--val_frac 0.0"),
        (["--source", corpus, "--epochs", 1, "--epochs", 2], "got 2 for 1 sources"),
        (["--source", corpus, "--weight", 0], "got 0, want more"),
        (["--source", corpus, "--tokenizer", tmp_path], "no tokenizer at"),
    ]:
        status, _, stderr = in_process(pack.main, *arguments, *args)
        assert status == 2, (args, stderr)
        assert message in stderr
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def mixed(corpus, tokens, tmp_path, monkeypatch):
    """Return mix(**options), which packs a third of the corpus and the rest as a mixture."""
    documents = list(read_documents([corpus]))
    for name, of in (("a", documents[::3]), ("b", documents[1::3] + documents[2::3])):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, shard_bytes=10_000) as writer:
            for document in of:
                writer.write(document)
    monkeypatch.setattr(pack, "SHARD_TOKENS", 4000)

    def mix(**options):
        out, sources = tmp_path / "mix", (tmp_path / "a", tmp_path / "b")
        pack.pack(pack.Config(out, sources, tokens, val_frac=0.1, **options))
        return out, json.loads((out / "mixture.json").read_text())

    return mix


def test_a_mixture_holds_every_document_once_and_keeps_its_sources_apart(mixed, tokens, tmp_path):
    mix, manifest = mixed(epochs=(3, 0.5))
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
    _, manifest = mixed(weight=(3, 1))
    a, b = manifest["sources"]
    assert (a["share"], b["share"]) == (0.75, 0.25)
    assert a["epochs"] == 1
    assert b["epochs"] == pytest.approx(a["tokens"] / b["tokens"] / 3, 1e-4)
