import json

from data.documents import read_documents
from data.shards import open_shard
from tokenizer import Tokenizer


def documents_of(folder, split, tokenizer):
    """The texts in a split's shards."""
    texts = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
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
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "sha256": "00000000"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text("")
    for args, message in [
        (["--source", tmp_path / "bad.jsonl"], "bad.jsonl line 2: not valid JSON"),
        (["--source", tmp_path / "empty.jsonl"], "no document in the train split"),
        (["--source", tmp_path / "nowhere.jsonl"], "no such file"),
        (["--source", corpus, "--val_frac", 0], "--val_frac 0.0"),
        (["--source", corpus, "--tokenizer", tmp_path], "no tokenizer at"),
    ]:
        done = cli(*pack, *args)
        assert done.returncode == 2, (args, done.stderr)
        assert message in done.stderr
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not [p for p in tmp_path.iterdir() if ".tmp" in p.name]
