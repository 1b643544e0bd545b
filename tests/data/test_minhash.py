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
    jaccard,
    shared,
    shingles,
    signatures,
)

TEXTS = st.lists(st.text("ab_1é€ \t\n(+.", max_size=60), max_size=6)
TOKEN = re.compile(r"[A-Za-z0-9_\x80-\U0010ffff]+|[!-/:-@\[-^`{-~]")


def sets_of(texts, width):
    """Return the shingle sets of `texts`, in plain Python."""
    out = []
    for text in texts:
        tokens = TOKEN.findall(text)
        windows = [tuple(tokens[i : i + width]) for i in range(max(1, len(tokens) - width + 1))]
        out.append(set(windows) if tokens else set())
    return out


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.integers(1, 6), st.sampled_from([1, 20, 1 << 18]))
def test_shingles_are_those_of_plain_python(texts, width, block_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "BLOCK_BYTES", block_bytes)
        patch.setattr(minhash, "SHINGLE", width)
        hashes, starts = shingles([t.encode() for t in texts])
    got = [hashes[a:b] for a, b in itertools.pairwise(starts)]
    want = sets_of(texts, width)
    for found, windows in zip(got, want, strict=True):
        assert (np.diff(found.astype(np.int64)) > 0).all()
        assert len(found) == len(windows)
    for (a, windows), (b, others) in itertools.product(zip(got, want), repeat=2):
        assert len(np.intersect1d(a, b)) == len(windows & others)


def test_hashes_and_signatures_stay_as_they_are():
    hashes, starts = shingles([b"one two three four five six", b"x", b""])
    assert hashes.tolist() == [633025369, 3268724137, 1348547264]
    assert starts.tolist() == [0, 2, 3, 3]
    want = [[648332627, 1325798833], [2272366144, 3192641728], [0xFFFFFFFF] * 2]
    assert signatures(hashes, starts, 2).tolist() == want
    assert signatures(hashes[:0], starts[:1], 8).shape == (0, 8)


def test_bands():
    assert choose_bands(0.8) == Bands(21, 6)
    bands, rows = choose_bands(0.5)
    assert bands * rows <= 128
    assert 1 - (1 - 0.5**rows) ** bands >= 0.99


@given(
    st.lists(st.integers(0, 5), max_size=30),
    st.sampled_from([1, 4, 1000]),
    st.sampled_from([range(3), range(1), range(1, 4)]),
)
def test_pairs_of_a_bucket_once_and_with_its_leaders_alone(keys, chunk, leaders):
    members = np.arange(len(keys)) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "CHUNK_PAIRS", chunk)
        chunks = list(bucket_pairs(*shared(np.array(keys, np.uint64), members), leaders))
    assert all(len(i) <= chunk for i, _ in chunks)
    n = len(keys)
    want = [(3 * i, 3 * j) for i in range(n) for j in range(i + 1, n)
            if keys[i] == keys[j] and keys[:i].count(keys[i]) in leaders]  # fmt: skip
    assert sorted((a, b) for i, j in chunks for a, b in zip(i.tolist(), j.tolist())) == want


@given(st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9))), max_size=5))
def test_jaccard(pairs):
    arrays = [[np.array(sorted(s), np.uint32) for s in pair] for pair in pairs]
    got = jaccard([a for a, _ in arrays], [b for _, b in arrays])
    assert got.tolist() == [len(a & b) / max(len(a | b), 1) for a, b in pairs]
