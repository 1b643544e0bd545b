"""Remove duplicates: exact ones by hash, near ones by MinHash, LSH and exact Jaccard.

    python -m data.dedup --source out/filtered --out out/unique

Two documents are duplicates if the Jaccard index of their 5-token shingles reaches `--threshold`
(base/minhash.py). Connected duplicates form a group, which keeps the document with the highest
`quality` (data.classify score); without quality the longest, and on ties the first. Output shard i
is input shard i minus the removed; removed/ names the kept document for each of them.

Groups can drift: a is like b, b like c, a not like c. "drifted" counts removed documents with a
Jaccard index below the threshold to the one kept in their place.

Each rank holds about 220 bytes per document in memory. Signatures (0.5 kB per document) and
shingles (about the size of the text) are memory-mapped files in the working folder.
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from data.base import minhash
from data.base.documents import DocumentFile, batched, chars, source_shards
from data.base.minhash import Bands
from data.base.ranks import say
from data.base.stage import Part, Stage, total

BATCH_CHARS = 1 << 20  # sketched per batch
MATCH_SHINGLES = 1 << 22  # compared per batch
VERIFY_PARTS = 16  # work items that share the exact comparisons
# Search rounds: (bands, which members of a bucket to compare the others with). A round skips pairs
# that earlier rounds connected, so most of a thousand copies of one text are compared once or twice
# instead of with LEADERS in each band.
ROUNDS = [(slice(0, 3), range(1)), (slice(3, None), range(1))]
ROUNDS += [(slice(None), range(a, b)) for a, b in ((1, 8), (8, minhash.LEADERS))]
FIELDS = ("shingles", "signatures", "sizes", "sha256", "quality", "chars")  # arrays of a sketch


@dataclass(frozen=True)
class Config:
    """Remove exact and near duplicates; keep the best document of each group."""

    source: tuple[Path, ...]  # files or folders of documents; repeatable
    out: Path  # folder to write
    threshold: float = 0.8  # minimum Jaccard index of duplicates, over 5-token shingles


class Corpus:
    """Sketches of all documents, indexed across all shards."""

    def __init__(self, folder: Path, shards: int, threshold: float, bands: Bands):
        def load(name: str) -> list[np.ndarray]:
            files = (folder / f"{name}-{i:05d}.npy" for i in range(shards))
            return [np.asarray(np.load(file, mmap_mode="r")) for file in files]  # faster to slice

        self.threshold, self.bands, self.scratch = threshold, bands, folder
        self.shingles, self.signatures, sizes = map(load, FIELDS[:3])  # by shard
        self.sizes = np.concatenate(sizes)
        self.sha256, self.quality, self.chars = (np.concatenate(load(name)) for name in FIELDS[3:])
        # Offset of each document's shingles in its shard's file; first document of each shard.
        self.place = np.concatenate([np.cumsum(s) - s for s in sizes])
        self.begin = np.cumsum([0, *map(len, sizes)])  # [shards + 1]
        # First document with the same sha256 (lexsort is stable).
        order = np.lexsort((self.sha256[:, 1], self.sha256[:, 0]))
        self.first, _ = leaders(order, self.sha256[order])
        self.group = self.first  # group id per document; `search` merges groups

    def search(self, stage: Stage) -> None:
        """Merge groups connected by pairs that reach the threshold."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        for self.round, (bands, paired) in enumerate(ROUNDS):
            items = [(band, paired) for band in range(self.bands.bands)[bands]]
            found = stage.map(f"candidates-{self.round}", items, self.candidates)
            if total(found).get("pairs"):
                stage.map(f"verify-{self.round}", [*range(VERIFY_PARTS)], self.verify)
                i, j = self.group[np.stack(np.divmod(self.load_pairs("edges"), len(self.sizes)))]
                graph = coo_array((np.ones(len(i), bool), (i, j)), (len(self.sizes),) * 2)
                self.group = connected_components(graph, directed=False)[1][self.group]

    def load_pairs(self, name: str) -> np.ndarray:
        """Return the pairs saved by a map of this round, coded as i * documents + j."""
        return np.concatenate([*map(np.load, self.scratch.glob(f"{name}-{self.round}-*.npy"))])

    def candidates(self, part: Part) -> dict:
        """Save pairs from different groups that share a band and may reach the threshold."""
        band, paired = part.item
        name = f"bucket-{band:05d}.npy"
        if paired.start:
            keys, members = np.load(self.scratch / name)
        else:
            keys = np.concatenate([minhash.band_keys(s, self.bands, band) for s in self.signatures])
            members = np.flatnonzero((self.first == np.arange(len(keys))) & (self.sizes > 0))
            keys, members = minhash.shared(keys[members], members)
            np.save(part.scratch / name, [keys, members.astype(np.uint64)])
        # Slack of 3 standard deviations: misses one in 700 pairs that lie at the threshold.
        sigma = (self.threshold * (1 - self.threshold) / self.bands.permutations) ** 0.5
        pairs = [np.zeros(0, np.int64)]
        for i, j in minhash.bucket_pairs(keys, members.astype(np.int64), paired):
            i, j = (of[self.group[i] != self.group[j]] for of in (i, j))
            agreement = (self.signatures_of(i) == self.signatures_of(j)).mean(1)
            pairs.append((i * len(self.sizes) + j)[agreement >= self.threshold - 3 * sigma])
        pairs = np.concatenate(pairs)
        np.save(part.scratch / f"candidates-{self.round}-{band:05d}.npy", pairs)
        return {"pairs": len(pairs)}

    def signatures_of(self, indexes: np.ndarray) -> np.ndarray:
        """Return signatures, uint32 [indexes, permutations]."""
        out = np.empty((len(indexes), self.bands.permutations), np.uint32)
        shard = np.searchsorted(self.begin, indexes, side="right") - 1
        for s in np.unique(shard):
            here = np.flatnonzero(shard == s)
            out[here] = self.signatures[s][indexes[here] - self.begin[s]]
        return out

    def verify(self, part: Part) -> None:
        """Save this part's candidate pairs that do reach the threshold."""
        pairs = self.load_pairs("candidates")
        pairs = np.unique(pairs[pairs % VERIFY_PARTS == part.item])
        edges = pairs[self.jaccard(*np.divmod(pairs, len(self.sizes))) >= self.threshold]
        np.save(part.scratch / f"edges-{self.round}-{part.index:05d}.npy", edges)

    def jaccard(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return the exact Jaccard index float64 [pairs] of documents i and j."""
        pairs = ((self.shingles_of(a), self.shingles_of(b)) for a, b in zip(i, j))
        batches = batched(pairs, MATCH_SHINGLES, lambda pair: len(pair[0]) + len(pair[1]))
        found = [minhash.jaccard(*zip(*batch)) for batch in batches]
        return np.concatenate([*found, np.zeros(0)])

    def shingles_of(self, index: int) -> np.ndarray:
        shard = np.searchsorted(self.begin, index, side="right") - 1
        return self.shingles[shard][self.place[index] :][: self.sizes[index]]

    def choose(self) -> dict:
        """Choose the keeper of each document (the best of its group); return group counts."""
        order = np.lexsort((-self.chars, -self.quality, self.group))  # stable
        self.keeper, sizes = leaders(order, self.group[order])
        return {"groups": int((sizes > 1).sum()), "largest_group": int(sizes.max())}

    def write(self, part: Part) -> dict:
        """Write the shard's kept documents, and a line for each removed one."""
        mine = np.arange(*self.begin[part.index : part.index + 2])
        gone = mine[self.keeper[mine] != mine]
        jaccard = dict(zip(gone.tolist(), self.jaccard(gone, self.keeper[gone]).tolist()))
        count = Counter(documents=0, bytes=0, exact=0, near=0, drifted=0)
        (part.result / "removed").mkdir()
        removed = part.result / "removed" / f"{part.name}.jsonl.zst"
        with part.writer() as kept, DocumentFile(removed) as lines:
            records = part.documents()
            for index, record in zip(mine.tolist(), records, strict=True):
                if index not in jaccard:
                    kept.write(record)
                    continue
                keeper = self.keeper[index]
                same = self.first[keeper] == self.first[index]
                alike = 1.0 if same else jaccard[index]  # that is 0 for texts without tokens
                count["exact" if same else "near"] += 1
                count["drifted"] += bool(alike < self.threshold)
                line = {"id": record["id"], "origin": record["origin"]}
                line["kept"] = f"{self.sha256[keeper, 0]:016x}"
                lines.write(line | {"jaccard": round(alike, 4)})
        return {**count, "documents": kept.documents, "bytes": kept.bytes}


def leaders(order: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each document's leader (the first in `order` with its key) and the group sizes."""
    new = np.r_[True, (keys[1:] != keys[:-1]).reshape(len(keys) - 1, keys[0].size).any(1)]
    leader = np.empty(len(order), np.int64)
    leader[order] = order[new][np.cumsum(new) - 1]
    return leader, np.diff(np.r_[np.flatnonzero(new), len(order)])


def dedup(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there are no documents."""
    if not 0 < config.threshold <= 1:
        raise UserError(f"--threshold {config.threshold:g}: want above 0 and at most 1")
    bands = minhash.choose_bands(config.threshold)
    with Stage(config, source_shards(*config.source)) as stage:
        read = stage.map("sketch", stage.shards, lambda part: sketch(part, bands))
        if not sum(r["documents_in"] for r in read):
            raise UserError(f"--source {config.source[0]}: no documents found")
        corpus = Corpus(stage.scratch, len(stage.shards), config.threshold, bands)
        corpus.search(stage)
        groups = corpus.choose()
        written = stage.map("write", stage.shards, corpus.write)
        options = {"threshold": config.threshold, "bands": bands.bands, "rows": bands.rows}
        return stage.finish(total(read) | total(written) | groups | {"options": options})


def sketch(part: Part, bands: Bands) -> dict:
    """Save the FIELDS arrays of a shard's documents; return counts."""
    sketched, count = [], Counter(documents_in=0, bytes_in=0)
    # Start with an empty batch, so an empty shard saves empty arrays.
    for batch in itertools.chain([[]], batched(part.documents(), BATCH_CHARS, chars)):
        texts = [record["text"].encode() for record in batch]
        hashes, starts = minhash.shingles(texts)
        signatures = minhash.signatures(hashes, starts, bands.permutations)
        digests = b"".join(bytes.fromhex(record["sha256"][:32]) for record in batch)
        sha256 = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)
        known = [record.get("quality") for record in batch]
        quality = np.array([q if isinstance(q, (int, float)) else -np.inf for q in known], float)
        lengths = np.array([len(record["text"]) for record in batch], np.int64)
        sketched.append((hashes, signatures, np.diff(starts), sha256, quality, lengths))
        count.update(documents_in=len(batch), bytes_in=sum(map(len, texts)))
    for name, arrays in zip(FIELDS, zip(*sketched)):
        np.save(part.scratch / f"{name}-{part.index:05d}.npy", np.concatenate(arrays))
    return dict(count)


def main() -> None:
    config = parse(Config)
    s = dedup(config)
    say(
        f"{config.out}: {s['documents']:,} of {s['documents_in']:,} documents; removed "
        f"{s['exact']:,} exact and {s['near']:,} near duplicates in {s['groups']:,} groups, the "
        f"largest of {s['largest_group']:,}; {s['drifted']:,} drifted below the threshold"
    )


if __name__ == "__main__":
    run(main)
