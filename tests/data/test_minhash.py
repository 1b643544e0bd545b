import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base import minhash
from data.base.minhash import (
    Bands,
    bucket_pairs,
    choose_bands,
    components,
    jaccard,
    shingles,
    signatures,
)

TEXTS = st.lists(st.text("ab_1é€ \t\n(+.", max_size=60), max_size=6)
TOKEN = re.compile(r"[A-Za-z0-9_\x80-\U0010ffff]+|[!-/:-@\[-^`{-~]")


def sets_of(texts, width):
    """What `shingles` hashes, in plain Python."""
    out = []
    for text in texts:
        tokens = TOKEN.findall(text)
        windows = [tuple(tokens[i : i + width]) for i in range(max(1, len(tokens) - width + 1))]
        out.append(set(windows) if tokens else set())
    return out


def split(hashes, starts):
    return [hashes[a:b] for a, b in itertools.pairwise(starts)]


@settings(max_examples=200)
@given(TEXTS, st.integers(1, 6), st.sampled_from([1, 20, 1 << 18]))
def test_shingles_are_those_of_plain_python(texts, width, block_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "BLOCK_BYTES", block_bytes)
        hashes, starts = shingles([t.encode() for t in texts], width)
    assert hashes.dtype == np.uint32
    want = sets_of(texts, width)
    for got, windows in zip(split(hashes, starts), want, strict=True):
        assert (np.diff(got.astype(np.int64)) > 0).all()
        assert len(got) == len(windows)
    for i, a in enumerate(split(hashes, starts)):
        for j, b in enumerate(split(hashes, starts)):
            assert len(np.intersect1d(a, b)) == len(want[i] & want[j])


def test_a_shingle_is_the_same_wherever_it_stands():
    # Among texts, in its text, and in the order of a block.
    words = "one two three four five"
    (alone, _), (among, starts) = shingles([words.encode()]), shingles(
        [b"x" * 1000, f"zero {words}".encode(), words.encode()]
    )  # fmt: skip
    one, two = split(among, starts)[1:]
    assert alone.tolist() == two.tolist()
    assert alone[0] in one


def test_signatures_estimate_the_jaccard_index():
    rng = np.random.default_rng(0)
    for size, common in ((10, 9), (50, 40), (300, 150)):
        exact, pairs = common / (2 * size - common), 400
        pool = rng.integers(0, 1 << 32, (pairs, 2 * size - common), dtype=np.uint32)
        sets = np.concatenate([pool[:, :size], pool[:, size - common :]], 1)  # a then b, in turn
        signature = signatures(sets.ravel(), np.arange(0, sets.size + 1, size), 128)
        estimate = (signature[0::2] == signature[1::2]).mean(1)
        sigma = (exact * (1 - exact) / 128) ** 0.5
        assert abs(estimate.mean() - exact) < 5 * sigma / pairs**0.5
        assert estimate.std() < 1.2 * sigma


def test_an_empty_set_has_a_signature_of_ones():
    hashes, starts = shingles([b"", b"a b c", b" \n"])
    signature = signatures(hashes, starts, 8)
    assert (signature[[0, 2]] == 0xFFFFFFFF).all()
    assert (signature[1] != 0xFFFFFFFF).any()
    assert signatures(hashes[:0], starts[:1], 8).shape == (0, 8)


def test_bands():
    assert choose_bands(0.8, 128, 0.99) == Bands(21, 6)
    assert Bands(21, 6).recall(0.8) == pytest.approx(1 - (1 - 0.8**6) ** 21)
    for threshold in (0.05, 0.3, 0.5, 0.9, 1.0):
        for permutations in (16, 128, 256):
            bands = choose_bands(threshold, permutations, 0.99)
            assert bands.permutations <= permutations
            assert bands.recall(threshold) >= 0.99 or bands.rows == 1


def pairs_of(keys, members):
    return [(i, j) for a, b in bucket_pairs(keys, members) for i, j in zip(a.tolist(), b.tolist())]


@given(st.lists(st.integers(0, 5), max_size=30), st.sampled_from([1, 4, 1000]))
def test_all_pairs_of_a_bucket_once(keys, chunk):
    members = np.arange(len(keys)) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "CHUNK_PAIRS", chunk)
        got = pairs_of(np.array(keys, np.uint64), members)
    n = len(keys)
    want = [(3 * i, 3 * j) for i in range(n) for j in range(i + 1, n) if keys[i] == keys[j]]
    assert sorted(got) == want


def test_a_large_bucket_costs_no_square(monkeypatch):
    monkeypatch.setattr(minhash, "LEADERS", 3)
    got = pairs_of(np.zeros(50, np.uint64), np.arange(50))
    assert sorted(got) == [(i, j) for i in range(3) for j in range(i + 1, 50)]


@given(st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9))), max_size=5))
def test_jaccard(pairs):
    arrays = [[np.array(sorted(s), np.uint32) for s in pair] for pair in pairs]
    got = jaccard([a for a, _ in arrays], [b for _, b in arrays])
    assert got.tolist() == [len(a & b) / max(len(a | b), 1) for a, b in pairs]


@given(st.integers(1, 30), st.data())
def test_components(count, data):
    node = st.integers(0, count - 1)
    edges = data.draw(st.lists(st.tuples(node, node), max_size=40))
    want = list(range(count))
    for _ in range(count):
        for i, j in edges:
            want[i] = want[j] = min(want[i], want[j])
    i, j = np.array(edges, np.int64).reshape(-1, 2).T
    assert components(count, i, j).tolist() == want
