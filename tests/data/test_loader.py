import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.config import UserError
from data import loader
from data.loader import Loader, Windows, arguments, best_fit, permute, read_weights
from data.shards import write_shard

T, END = 8, 499
TOKENIZER = SimpleNamespace(fingerprint="0123456789abcdef" * 2, vocab_size=500, end_of_text=END)


@pytest.fixture
def folder(tmp_path):
    """Write two shards of consecutive numbers, so a window shows its position."""
    write_shard(tmp_path / "train_00000.bin", [np.arange(100)], 500, 1, TOKENIZER.fingerprint)
    write_shard(tmp_path / "train_00001.bin", [np.arange(200, 261)], 500, 1, TOKENIZER.fingerprint)
    return tmp_path


def windows(folder, seed=0, split="train"):
    return Windows([folder], split, T, TOKENIZER, seed)


@pytest.mark.parametrize("n", [1, 2, 17, 64, 1000, 4097])
def test_permute_is_a_permutation(n):
    drawn = [permute(np.arange(n), n, *key) for key in [(0, 0), (0, 1), (1, 0)]]
    for order in drawn:
        assert sorted(order) == list(range(n))
        assert n < 1000 or abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.15
    assert n < 1000 or all((drawn[0] == other).sum() < 10 for other in drawn[1:])  # 1 by chance


def joined(w, passed=0):
    """Return the tokens of a pass as one list; windows overlap by one token."""
    rows = w[passed * len(w) + np.arange(len(w))]
    assert rows.shape == (len(w), T + 1)
    assert (rows[:-1, -1] == rows[1:, 0]).all()
    return [*rows[:, :-1].flatten().tolist(), int(rows[-1, -1])]


def test_a_pass_joins_the_documents_in_an_order_of_its_own(tmp_path):
    lengths = [3, 9, 1, 0, 7, 9, 2, 2]  # 41 tokens with END: five whole windows
    documents = [[END, *range(10 * i, 10 * i + n)] for i, n in enumerate(lengths)]
    for split in ("train", "val"):
        for i, part in enumerate((documents[:3], documents[3:])):
            file = tmp_path / f"{split}_0000{i}.bin"
            write_shard(file, list(map(np.array, part)), 500, len(part), TOKENIZER.fingerprint)
    assert joined(windows(tmp_path, split="val")) == [t for d in documents for t in d]
    texts = [joined(windows(tmp_path, seed), passed) for seed in (0, 1) for passed in range(20)]
    for text in texts:
        found = [[END, *map(int, d.split())] for d in " ".join(map(str, text)).split(str(END))[1:]]
        assert sorted(found) == sorted(documents)
    assert len(set(map(tuple, texts))) > 35


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (1, 1), (2, 4), (2, 2), (8, 1)])
def test_a_step_sees_the_same_for_any_ranks(folder, world_size, micro_batch):
    w = windows(folder)
    whole = Loader(w, 8, 8, 0, 1, torch.device("cpu"))
    ranks = [Loader(w, 8, micro_batch, r, world_size, torch.device("cpu"))
             for r in range(world_size)]  # fmt: skip
    for step in (0, 1, 7):
        parts = [r.sequences(step, m) for m in range(ranks[0].micro_steps) for r in ranks]
        np.testing.assert_array_equal(np.concatenate(parts), whole.sequences(step, 0))


def test_stream_resumes_where_it_would_have_been(folder):
    w = windows(folder)
    loader = Loader(w, 4, 2, 0, 1, torch.device("cpu"))
    again = Loader(w, 4, 2, 0, 1, torch.device("cpu"))
    stream, resumed = loader.stream(0), again.stream(5)
    first = [next(stream) for _ in range(14)]
    assert first[0].keys() == {"idx", "targets"}
    assert first[0]["idx"].dtype == torch.int64
    assert first[0]["idx"].shape == first[0]["targets"].shape == (2, T)
    torch.testing.assert_close(first[0]["idx"][:, 1:], first[0]["targets"][:, :-1])
    for batch in first[10:]:
        torch.testing.assert_close(next(resumed), batch, rtol=0, atol=0)


def test_documents_begin_at_the_token_before_them():
    batch = torch.tensor([[5, 6, 9, 7, 9, 9, 4], [9, 1, 2, 3, 4, 5, 9]])
    got = arguments(batch, end_of_text=9)
    assert got["doc_start"].dtype == torch.int32
    assert got["doc_start"].tolist() == [[0, 0, 2, 2, 4, 5], [0, 0, 0, 0, 0, 0]]
    assert got["targets"].tolist() == batch[:, 1:].tolist()  # the next token, also across documents


def write_documents(folder, lengths):
    """Write documents of random tokens, each tagged with its number, to two shards per split."""
    rng, folder = np.random.default_rng(0), folder / f"of_{len(lengths)}"
    folder.mkdir()
    documents = [[END, i, *rng.integers(100, END, n - 2)] for i, n in enumerate(lengths)]
    for split in ("train", "val"):
        for i, part in enumerate((documents[:40], documents[40:])):
            tokens = np.concatenate([*part, [END]])[1:]  # as data.pack writes them
            file = folder / f"{split}_0000{i}.bin"
            write_shard(file, [tokens], 500, len(part), TOKENIZER.fingerprint)
    return folder, documents


@pytest.mark.parametrize("together", [16, 65536])
def test_best_fit_cuts_no_document_that_fits(tmp_path, monkeypatch, together):
    monkeypatch.setattr(loader, "FIT_DOCUMENTS", together)
    lengths = np.random.default_rng(1).integers(3, 4 * T, 90)
    folder, documents = write_documents(tmp_path, lengths)
    w = Windows([folder], "train", T, TOKENIZER, 0, best_fit=True)
    got = {k: v.numpy() for k, v in arguments(torch.from_numpy(w[np.arange(len(w))]), END).items()}
    found, want = [], []  # tokens and targets of each piece
    for idx, targets, doc_start in zip(*(got[k] for k in ("idx", "targets", "doc_start"))):
        for start in np.unique(doc_start):
            piece = (doc_start == start) & (targets >= 0)
            if piece.any():
                found.append((*idx[piece], *targets[piece]))
    for number, document in enumerate(documents):
        tokens = document[number in (0, 40) :]  # a shard starts without END
        for at in range(0, len(tokens), T):
            idx, targets = tokens[at : at + T], [*tokens, END][at + 1 : at + T + 1]
            want.append((*idx, *targets))
    assert sorted(found) == sorted(want)
    assert w.padding_frac == pytest.approx((got["targets"] == -1).mean(), abs=2 / got["idx"].size)
    halves = np.array_split((got["doc_start"] == np.arange(T)).sum(1), 2)  # pieces per row
    assert halves[0].mean() == pytest.approx(halves[1].mean(), rel=0.2)  # a prefix is a fair sample
    assert w.padding_frac < (0.02 if together > 16 else 0.1)
    shuffled = w.order(np.arange(2 * len(w))).reshape(2, -1) % len(w)
    assert (np.sort(shuffled) == np.arange(len(w))).all()  # each row once per pass
    assert (shuffled[0] != shuffled[1]).any()
    val = [Windows([folder], "val", T, TOKENIZER, seed, best_fit=True) for seed in (0, 1)]
    assert (val[0][np.arange(9)] == val[1][np.arange(9)]).all()  # the same for every seed


def test_best_fit_takes_the_fullest_row_with_room():
    assert best_fit(np.array([5, 0, 3, 8, 2, 4, 3]), 8) == [[3], [0, 2], [5, 6], [4]]
    assert best_fit(np.zeros(3, int), 8) == []
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    sums = [lengths[row].sum() for row in rows]
    assert max(sums) <= 64
    assert len(rows) <= 1.02 * lengths.sum() / 64


def test_every_change_to_a_shard_in_use_is_noticed(folder):
    w = windows(folder)
    every, file = np.arange(len(w)), folder / "train_00001.bin"
    whole = file.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :] for i in range(1024, len(whole))]
    for content in [*flipped, b"", whole[:1026], whole[:-1]]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"train_00001\.bin was damaged while it was in use"):
            w[every]


def test_clear_errors(folder):
    with pytest.raises(UserError, match=r"no val_\*\.bin"):
        windows(folder, split="val")
    with pytest.raises(UserError, match="fewer than one sequence"):
        Windows([folder], "train", 4096, TOKENIZER, 0)
    with pytest.raises(UserError, match="61 tokens, fewer than one sequence"):
        mixture(folder, 1, 0.01)


def mixture(folder, *epochs):
    """Make the two shards of `folder` two sources."""
    sources = [
        {"source": name, "shards": [f"train_0000{i}.bin"], "epochs": e}
        for i, (name, e) in enumerate(zip("ab", epochs))
    ]
    (folder / "mixture.json").write_text(json.dumps({"sources": sources}))
    return windows(folder)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 3), (0.5, 2), (2.5, 0.3)])
def test_a_mixture_goes_through_each_source_evenly(folder, a, b):
    plain, mixed = windows(folder), mixture(folder, a, b)
    sizes = (100 - 1) // T, (61 - 1) // T
    in_pass = [round(e * n) for e, n in zip((a, b), sizes)]
    assert len(mixed) == sum(in_pass)
    assert mixed.tokens == round(100 * a + 61 * b)
    assert mixed.checksum != plain.checksum
    passes = 10
    order = mixed.order(np.arange(passes * len(mixed)))
    assert len(np.unique(order)) == len(order)  # repeats are numbered by pass
    seen = order % sum(sizes)
    of_pass = seen.reshape(passes, -1)
    for n, in_b in zip(in_pass[::-1], (True, False)):
        assert (((of_pass >= sizes[0]) == in_b).sum(1) == n).all()
    counts = np.bincount(seen, minlength=sum(sizes))
    for of, n, size in [(counts[: sizes[0]], in_pass[0], sizes[0]),
                        (counts[sizes[0] :], in_pass[1], sizes[1])]:  # fmt: skip
        assert of.sum() == passes * n
        assert of.max() - of.min() <= 1, size
    # The order is random, and any slice of it is the same.
    np.testing.assert_array_equal(mixed.order(np.arange(30, 50)), order[30:50])
    other = windows(folder, seed=1)
    assert (other.order(np.arange(len(mixed))) != order[: len(mixed)]).any()


def test_weights_are_shares_of_the_tokens(tmp_path):
    """Two folders, one of them a mixture; the same sequences for any ranks, from any step."""
    (a, _), (b, _) = (write_documents(tmp_path, [9] * n) for n in (50, 90))
    write = {"sources": [{"shards": [x], "epochs": e} for x, e in zip(BOTH, (1, 3))]}
    (b / "mixture.json").write_text(json.dumps(write))
    w = Windows([a, b], "train", T, TOKENIZER, 0, (3.0, 1.0))
    assert w.checksum != Windows([a, b], "train", T, TOKENIZER, 0, (2.0, 1.0)).checksum
    sizes = [len(windows(a)), *np.diff(mixture(b, 1, 1).first)]
    assert np.diff(w.first).tolist() == sizes
    source = np.searchsorted(w.first, w.order(np.arange(4000)) % w.first[-1], side="right") - 1
    share = np.bincount(source) / 4000
    assert share == pytest.approx([0.75, 0.25 * 40 / 190, 0.25 * 150 / 190], abs=0.02)
    whole = Loader(w, 8, 8, 0, 1, torch.device("cpu"))
    halves = [Loader(w, 8, 2, rank, 2, torch.device("cpu")) for rank in range(2)]
    for step in (700, 3, 2000):
        parts = [h.sequences(step, m) for m in range(2) for h in halves]
        np.testing.assert_array_equal(np.concatenate(parts), whole.sequences(step, 0))
    val = Windows([a, b], "val", T, TOKENIZER, 0, (3.0, 1.0))
    assert len(val) == len(windows(a, split="val")) + len(windows(b, split="val"))


def test_a_small_source_makes_no_other_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "SHARE_WINDOWS", 10)
    (a, _), (b, _) = (write_documents(tmp_path, [9] * n) for n in (41, 42))
    write = {"sources": [{"shards": [x], "epochs": 1} for x in BOTH]}  # the second has one window
    (a / "mixture.json").write_text(json.dumps(write))
    w = Windows([a, b], "train", T, TOKENIZER, 0, (1.0, 1.0))
    assert (w.in_epoch <= np.diff(w.first)).all()


def test_read_weights(tmp_path, monkeypatch):
    for name in ("a", "b/c", "odd:2"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert read_weights([Path("a:0.7"), Path("b/c:1")]) == ([Path("a"), Path("b/c")], (0.7, 1.0))
    assert read_weights([Path("a"), Path("odd:2")]) == ([Path("a"), Path("odd:2")], ())
    for wrong in (["a:1", "b/c"], ["a:0", "b/c:1"]):
        with pytest.raises(UserError, match="want a weight above 0 for each folder, or none"):
            read_weights([*map(Path, wrong)])
    with pytest.raises(UserError, match="data a:-1: no such folder"):
        read_weights([Path("a:-1")])


BOTH = ["train_00000.bin", "train_00001.bin"]


@pytest.mark.parametrize(
    "sources",
    [
        [{"shards": BOTH[:1], "epochs": 1}],
        [{"shards": BOTH, "epochs": float("nan")}],
        [{"shards": BOTH}],
    ],
)
def test_a_mixture_that_is_wrong(folder, sources):
    (folder / "mixture.json").write_text(json.dumps({"sources": sources}))
    with pytest.raises(UserError, match=r"mixture\.json does not describe"):
        windows(folder)
