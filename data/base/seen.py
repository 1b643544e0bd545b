"""Near-duplicates as texts come in: is this one like any that was accepted before?

data.dedup answers the same for a whole corpus at once; data.synthesize has to know as it goes.
"""

import hashlib

import numpy as np

from data.base import minhash

PERMUTATIONS, RECALL = 128, 0.99  # of the search for candidates, as in data.dedup


class Seen:
    """The texts accepted so far, to find near-duplicates among: MinHash, then the exact index."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.bands = minhash.choose_bands(threshold, PERMUTATIONS, RECALL)
        self.hashes: set[bytes] = set()
        self.sets: list[np.ndarray] = []  # shingles
        self.buckets: dict[tuple[int, int], list[int]] = {}  # (band, key): indexes of sets

    def add(self, texts: list[str], always: bool = False) -> list[str]:
        """Why each text is refused, "" if it is accepted and known from now on."""
        shingles, starts = minhash.shingles([text.encode() for text in texts])
        signatures = minhash.signatures(shingles, starts, self.bands.permutations)
        keys = [minhash.band_keys(signatures, self.bands, b) for b in range(self.bands.bands)]
        reasons = []
        for i, text in enumerate(texts):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            mine = shingles[starts[i] : starts[i + 1]]
            places = [(b, int(keys[b][i])) for b in range(self.bands.bands)]
            reason = "duplicate" if digest in self.hashes else ""
            if not reason and not always and self.near(mine, places):
                reason = "near-duplicate"
            if not reason:
                self.hashes.add(digest)
                for place in places:
                    self.buckets.setdefault(place, []).append(len(self.sets))
                self.sets.append(mine)
            reasons.append(reason)
        return reasons

    def near(self, mine: np.ndarray, places: list[tuple[int, int]]) -> bool:
        others = {i for place in places for i in self.buckets.get(place, ())[: minhash.LEADERS]}
        if not others:
            return False
        alike = minhash.jaccard([mine] * len(others), [self.sets[i] for i in others])
        return bool((alike >= self.threshold).any())
