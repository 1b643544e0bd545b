"""Find near-duplicate texts: token shingles, MinHash signatures, LSH candidates, exact Jaccard.

Similarity is the Jaccard index |A & B| / |A | B| of two sets of shingles, runs of 5 tokens. A token
is a word ([A-Za-z0-9_] and all non-ASCII) or one punctuation character. MinHash (Broder 1997) with
banding (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4) proposes pairs; an exact
comparison follows, so a wrong candidate costs only time.

Texts are hashed together as one byte array. Shingles are 32-bit hashes: in a document of 1,000
shingles a collision has probability 1e-4 and shifts the index by 1e-3.
"""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.base.documents import batched

PERMUTATIONS = 128  # per signature
RECALL = 0.99  # share of pairs at the threshold that become candidates
SHINGLE = 5  # tokens; The Stack uses 5-grams too (Kocetkov 2022, arXiv 2211.15533)
LEADERS = 64  # bucket members compared with all others: avoids n^2 pairs
CHUNK_PAIRS = 1 << 16  # pairs per chunk
BLOCK_BYTES = 1 << 18  # text hashed at once; larger blocks fall out of cache
SEPARATOR = b"\n\n"  # between texts; no token spans it

_random = np.random.default_rng(20230620)  # fixed: the date of arXiv 2306.11644
BYTE_HASH = _random.integers(0, 1 << 64, 256, dtype=np.uint64)
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so invertible modulo 2^64
# Each permutes the 32-bit hashes: x -> x * odd, modulo 2^32.
MULTIPLIERS = _random.integers(0, 1 << 32, PERMUTATIONS, dtype=np.uint32) | np.uint32(1)
WORD, PUNCTUATION = 1, 2  # byte classes; 0 is whitespace and control
BYTE_CLASS = np.zeros(256, np.uint8)
BYTE_CLASS[33:127] = PUNCTUATION
BYTE_CLASS[[b for b in range(256) if b >= 128 or chr(b).isalnum() or chr(b) == "_"]] = WORD


class Bands(NamedTuple):
    """LSH banding of a signature: texts equal in all rows of one band are candidates."""

    bands: int
    rows: int

    @property
    def permutations(self) -> int:
        return self.bands * self.rows


def choose_bands(threshold: float) -> Bands:
    """Return the bands with the most rows, so the fewest false candidates, that keep RECALL."""
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            break
    return Bands(bands, rows)


def shingles(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the shingles of UTF-8 texts, concatenated: hashes uint32 [N], ascending and unique
    within each text, and starts int64 [texts + 1].

    A text shorter than SHINGLE tokens has one shingle; without tokens, none.
    """
    sets, sizes = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
    for block in batched(texts, BLOCK_BYTES, len):
        tokens, text = _tokens(block)
        bounds, place = np.searchsorted(text, np.arange(len(block) + 1)), np.arange(len(tokens))
        left = bounds[1:][text] - place  # tokens left in the text
        following = np.concatenate([tokens, np.zeros(SHINGLE, np.uint64)])
        total = np.zeros(len(tokens), np.uint64)
        for j in range(SHINGLE):
            total += following[j:][: len(tokens)] * (left > j) * BASE ** np.uint64(j)
        whole = (left >= SHINGLE) | (place == bounds[text])
        keys = text[whole].astype(np.uint64) << np.uint64(32) | _mix(total[whole]) >> np.uint64(32)
        keys.sort()  # np.unique is slower
        keys = keys[np.r_[True, keys[1:] != keys[:-1]][: len(keys)]]
        sets.append(keys.astype(np.uint32))
        sizes.append(np.bincount(keys >> np.uint64(32), minlength=len(block)))
    return np.concatenate(sets), np.cumsum(np.concatenate([[0], *sizes]))


def signatures(hashes: np.ndarray, starts: np.ndarray, permutations: int) -> np.ndarray:
    """Return MinHash signatures uint32 [texts, permutations]; all ones for an empty set."""
    out = np.full((permutations, len(starts) - 1), 0xFFFFFFFF, np.uint32)
    full = np.flatnonzero(np.diff(starts))
    where, row = starts[full], np.empty(len(full), np.uint32)
    permuted = np.empty_like(hashes)
    for i in range(permutations if len(full) else 0):
        np.multiply(hashes, MULTIPLIERS[i], out=permuted)
        np.minimum.reduceat(permuted, where, out=row)
        out[i, full] = row
    return np.ascontiguousarray(out.T)


def band_keys(signature: np.ndarray, bands: Bands, band: int) -> np.ndarray:
    """Hash each signature's rows in this band; return uint64 [texts]."""
    rows = signature[:, band * bands.rows : (band + 1) * bands.rows].astype(np.uint64)
    return _mix((rows * BASE ** np.arange(1, bands.rows + 1, dtype=np.uint64)).sum(1))


def shared(keys: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys that occur more than once, sorted, and their `members` (ascending)."""
    order = np.argsort(keys, kind="stable")
    members, keys = members[order], keys[order]
    same = np.r_[False, keys[1:] == keys[:-1], False][: len(keys) + 1]
    return keys[same[1:] | same[:-1]], members[same[1:] | same[:-1]]


def bucket_pairs(
    keys: np.ndarray, members: np.ndarray, leaders: range
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of (i, j), i < j, for members with equal keys, as returned by `shared`.

    Pair each bucket member only with members number `leaders`, at most LEADERS. A bucket of n then
    costs n pairs per leader, not n^2, and copies of one text still meet through the leaders.
    """
    first = np.searchsorted(keys, keys)  # index of the bucket start
    later = np.arange(len(keys))
    for leader in leaders:
        later = later[later - first[later] > leader]
        for begin in range(0, len(later), CHUNK_PAIRS):
            chunk = later[begin : begin + CHUNK_PAIRS]
            yield members[first[chunk] + leader], members[chunk]


def jaccard(sets: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    """Return the Jaccard index of each pair (set, other), float64 [pairs]; 0 for two empty sets."""
    sizes = np.array([len(a) + len(b) for a, b in zip(sets, others)], np.int64)
    pair = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    both = [s for ab in zip(sets, others) for s in ab]
    keys = np.sort(pair << np.uint64(32) | np.concatenate([*both, np.zeros(0, np.uint32)]))
    twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
    common = np.bincount(twice.astype(np.int64), minlength=len(sizes))
    return common / np.maximum(sizes - common, 1)


class Index:
    """Incremental near-duplicate index over accepted texts (data/synthesize.py)."""

    def __init__(self, threshold: float):
        self.threshold, self.bands = threshold, choose_bands(threshold)
        self.hashes: set[bytes] = set()
        self.sets: list[np.ndarray] = []  # shingles
        self.buckets = defaultdict(list)  # (band, key): indexes of sets

    def add(self, texts: list[str]) -> list[str]:
        """Add each text; return "" if added, else "duplicate" or "near-duplicate"."""
        hashes, starts = shingles([text.encode() for text in texts])
        signature = signatures(hashes, starts, self.bands.permutations)
        keys = [band_keys(signature, self.bands, b).tolist() for b in range(self.bands.bands)]
        reasons = []
        for i, text in enumerate(texts):
            mine = hashes[starts[i] : starts[i + 1]]
            places = [(band, of_band[i]) for band, of_band in enumerate(keys)]
            digest = hashlib.sha256(text.encode()).digest()
            near = {n for place in places for n in self.buckets.get(place, ())[:LEADERS]}
            alike = jaccard([mine] * len(near), [self.sets[n] for n in near])
            if digest in self.hashes:
                reasons.append("duplicate")
            elif (alike >= self.threshold).any():
                reasons.append("near-duplicate")
            else:
                reasons.append("")
                self.hashes.add(digest)
                for place in places:
                    self.buckets[place].append(len(self.sets))
                self.sets.append(mine)
        return reasons


def _tokens(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return all tokens as hashes, uint64, and text indexes, int64, both [tokens]."""
    data = np.frombuffer(SEPARATOR.join([b"", *texts, b""]), np.uint8)
    kind = BYTE_CLASS[data]
    word = kind == WORD
    single = kind == PUNCTUATION
    begin = np.flatnonzero(word[1:] & ~word[:-1] | single[1:]) + 1
    end = np.flatnonzero(word[:-1] & ~word[1:] | single[:-1]) + 1
    # Polynomial hash: sum of BYTE_HASH[data[i]] BASE^i over the token, divided by BASE^begin.
    powers, inverses = _powers(-(-len(data) // BLOCK_BYTES) * BLOCK_BYTES)
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(BYTE_HASH[data] * powers[: len(data)], out=prefix[1:])
    token_hash = _mix((prefix[end] - prefix[begin]) * inverses[begin])
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    text_begin = np.cumsum(lengths + len(SEPARATOR)) - lengths
    return token_hash, np.searchsorted(text_begin, begin, side="right") - 1


@functools.lru_cache(2)
def _powers(count: int) -> np.ndarray:
    """Return powers 0 to count - 1 of BASE and of its inverse, uint64 [2, count], modulo 2^64."""
    powers = np.ones((2, count), np.uint64)
    powers[:, 1:] = [[BASE], [pow(int(BASE), -1, 1 << 64)]]
    return np.multiply.accumulate(powers, axis=1, out=powers)


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finaliser (Steele 2014): every input bit affects every output bit."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
