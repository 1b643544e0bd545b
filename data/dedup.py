"""Remove duplicates: exact ones by hash, near ones by MinHash, LSH and exact Jaccard.

    python -m data.dedup --source out/filtered --out out/unique
    mpirun -n 8 python -m mpi4py -m data.dedup --source out/filtered --out out/unique

Two documents whose Jaccard index over shingles of 5 tokens reaches `--threshold` are one (see
base/minhash.py), and so is what such pairs connect. Of each group the document with the highest
score stays; without scores the longest, and of equals the first. Output shard i is input shard i
less what was removed, so the result does not depend on the number of ranks.

Connected groups can drift: a is like b, b like c, a not like c. The summary counts the removed
documents that are below the threshold to the one that was kept in their place ("drifted"), and
removed/ has each with its Jaccard index. Read samples.txt before you trust the threshold.

Each rank holds about 220 bytes a document in memory (LOG.md); sketches of 0.5 kB and the shingles,
about as large as the text, are files in the working folder, read where they are needed.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from data.base import minhash
from data.base.documents import DocumentFile, batched, chars, side_by_side, source_shards
from data.base.minhash import Bands
from data.base.ranks import say
from data.base.readers import read_documents_of
from data.base.stage import Part, Stage, total

BATCH_CHARS = 1 << 20  # of text sketched at once
MATCH_SHINGLES = 1 << 22  # compared at once
VERIFY_PARTS = 16  # into which candidate pairs are dealt for the exact comparison
SAMPLES, SAMPLE_CHARS = 20, 2000  # pairs for a person to read


@dataclass(frozen=True)
class Config:
    """Remove exact and near duplicates; of each group of them the best document stays."""

    source: tuple[Path, ...]  # document shards, files or folders; may be given several times
    out: Path  # folder to write
    threshold: float = 0.8  # Jaccard index over 5-token shingles from which two documents are one
    permutations: int = 128  # of the MinHash signature; more find fewer wrong candidates, slower
    score: str = "score"  # field of a document's score: of duplicates the highest stays


class Sketches:
    """The sketches of all documents, on disk; a document's index counts through all shards."""

    def __init__(self, folder: Path, shards: int, permutations: int):
        folders = [folder / f"sketch-{i:05d}" for i in range(shards)]
        self.sha256 = np.concatenate([_load(f / "sha256", np.uint64) for f in folders])
        self.sha256 = self.sha256.reshape(-1, 2)  # its first 16 bytes
        self.score = np.concatenate([_load(f / "score", np.float64) for f in folders])
        self.chars = np.concatenate([_load(f / "chars", np.uint32) for f in folders])
        self.sizes = np.concatenate([_load(f / "sizes", np.uint32) for f in folders])
        counts = [_load(f / "sizes", np.uint32).size for f in folders]
        self.begin = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # [shards + 1]
        self.signature = [
            _map(f / "signatures", np.uint32).reshape(-1, permutations) for f in folders
        ]
        self.shingles = [_map(f / "shingles", np.uint32) for f in folders]
        # Where a document's shingles begin in its shard's file.
        before = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        shard_before = np.append(before, 0)[self.begin[:-1]]
        self.place = before - np.repeat(shard_before, counts)

    def __len__(self) -> int:
        return len(self.sizes)

    def id(self, index: int) -> str:
        return f"{self.sha256[index, 0]:016x}"

    def signatures(self, indexes: np.ndarray) -> np.ndarray:
        """Return uint32 [indexes, permutations]."""
        out = np.empty((len(indexes), self.signature[0].shape[1]), np.uint32)
        shard = np.searchsorted(self.begin, indexes, side="right") - 1
        for s in np.unique(shard):
            here = np.flatnonzero(shard == s)
            out[here] = self.signature[s][indexes[here] - self.begin[s]]
        return out

    def jaccard(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return the exact Jaccard index float64 [pairs] of documents i and j."""
        sizes = self.sizes[i].astype(np.int64) + self.sizes[j]
        parts = [
            minhash.jaccard([*map(self._set, i[part])], [*map(self._set, j[part])])
            for part in minhash.split(sizes, MATCH_SHINGLES)
        ]
        return np.concatenate([*parts, np.zeros(0)])

    def _set(self, index: int) -> np.ndarray:
        shard = np.searchsorted(self.begin, index, side="right") - 1
        place = self.place[index]
        return self.shingles[shard][place : place + self.sizes[index]]


def dedup(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there is nothing to read."""
    if not 0 < config.threshold <= 1:
        raise UserError(f"--threshold {config.threshold:g}: want above 0 and at most 1")
    if not 2 <= config.permutations <= len(minhash.MULTIPLIERS):
        raise UserError(f"--permutations: want 2 to {len(minhash.MULTIPLIERS)}")
    bands = minhash.choose_bands(config.threshold, config.permutations, minhash.RECALL)
    with Stage(config, source_shards(*config.source)) as stage:
        shards = len(stage.shards)
        read = stage.map("sketch", stage.shards, lambda part: sketch(part, config.score, bands))
        if not sum(r["documents_in"] for r in read):
            raise UserError(f"--source {config.source[0]}: no document there")
        sketches = Sketches(stage.scratch, shards, bands.permutations)
        assert len(sketches) < 1 << 32, "a pair of indexes is packed into 64 bits"
        stage.map("exact", [0], lambda part: exact(part, sketches))
        first = np.load(stage.scratch / "first.npy")
        stage.map(
            "candidates",
            [*range(bands.bands)],
            lambda part: candidates(part, sketches, first, bands, config.threshold),
        )
        stage.map(
            "verify",
            [*range(VERIFY_PARTS)],
            lambda part: verify(part, sketches, bands, config.threshold),
        )
        (groups,) = stage.map("choose", [0], lambda part: choose(part, sketches, first))
        keeper = np.load(stage.scratch / "keeper.npy", mmap_mode="r")
        wanted = [tuple(pair) for pair in groups.pop("samples")]
        written = stage.map(
            "write",
            stage.shards,
            lambda part: write(part, sketches, first, keeper, config.threshold, wanted),
        )
        texts = {int(k): v for result in written for k, v in result.pop("texts").items()}
        if stage.ranks.rank == 0:
            write_samples(stage.result / "samples.txt", sketches, wanted, texts)
        options = {"threshold": config.threshold, "bands": bands.bands, "rows": bands.rows}
        return stage.finish(total(read) | total(written) | groups | {"options": options})


def sketch(part: Part, score: str, bands: Bands) -> dict:
    """Hash the documents of a shard: what the comparison needs of them, as arrays on disk."""
    folder = part.scratch / f"sketch-{part.index:05d}"
    folder.mkdir()
    for name in ("shingles", "signatures", "sizes", "sha256", "score", "chars"):
        (folder / name).touch()  # also for a shard without documents
    count = Counter(documents_in=0, bytes_in=0)
    for batch in batched(part.documents(), BATCH_CHARS, chars):
        texts = [record["text"].encode() for record in batch]
        hashes, starts = minhash.shingles(texts)
        digests = b"".join(bytes.fromhex(record["sha256"][:32]) for record in batch)
        for name, array in (
            ("shingles", hashes),
            ("signatures", minhash.signatures(hashes, starts, bands.permutations)),
            ("sizes", np.diff(starts).astype(np.uint32)),
            ("sha256", np.frombuffer(digests, ">u8").astype(np.uint64)),
            ("score", np.array([_number(record.get(score)) for record in batch])),
            ("chars", np.array([len(record["text"]) for record in batch], np.uint32)),
        ):
            with open(folder / name, "ab") as file:
                array.tofile(file)
        count["documents_in"] += len(batch)
        count["bytes_in"] += sum(map(len, texts))
    return dict(count)


def exact(part: Part, sketches: Sketches) -> None:
    """Leave for each document the first one with the same sha256."""
    order = np.lexsort((sketches.sha256[:, 1], sketches.sha256[:, 0]))  # stable: first stays first
    ordered = sketches.sha256[order]
    new = np.r_[True, (ordered[1:] != ordered[:-1]).any(1)]
    first = np.empty(len(sketches), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    np.save(part.scratch / "first.npy", first)


def candidates(
    part: Part, sketches: Sketches, first: np.ndarray, bands: Bands, threshold: float
) -> None:
    """Leave pairs that are equal in this band and may, by their signatures, reach the threshold."""
    band = part.item
    keys = np.concatenate([minhash.band_keys(s, bands, band) for s in sketches.signature])
    members = np.flatnonzero((first == np.arange(len(first))) & (sketches.sizes > 0))
    # Of a pair at the threshold, one estimate in 700 is more than 3 standard deviations below it.
    lowest = threshold - 3 * (threshold * (1 - threshold) / bands.permutations) ** 0.5
    with open(part.scratch / f"candidates-{band:05d}", "wb") as f:
        for i, j in minhash.bucket_pairs(keys[members], members):
            alike = (sketches.signatures(i) == sketches.signatures(j)).mean(1) >= lowest
            (i[alike].astype(np.uint64) << np.uint64(32) | j[alike].astype(np.uint64)).tofile(f)


def verify(part: Part, sketches: Sketches, bands: Bands, threshold: float) -> None:
    """Leave the pairs among this part's candidates that do reach the threshold."""
    mine = []
    for band in range(bands.bands):
        pairs = _map(part.stage.scratch / f"candidates-{band:05d}", np.uint64)
        mine.append(pairs[(pairs >> np.uint64(32)) % np.uint64(VERIFY_PARTS) == part.item])
    pairs = np.unique(np.concatenate(mine))
    i, j = (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(int)
    pairs[sketches.jaccard(i, j) >= threshold].tofile(part.scratch / f"edges-{part.index:05d}")


def choose(part: Part, sketches: Sketches, first: np.ndarray) -> dict:
    """Leave for each document the one kept in its place: itself, or the best of its group."""
    edges = [_load(part.stage.scratch / f"edges-{i:05d}", np.uint64) for i in range(VERIFY_PARTS)]
    pairs = np.concatenate(edges)
    copies = np.flatnonzero(first != np.arange(len(first)))
    i = np.r_[(pairs >> np.uint64(32)).astype(np.int64), first[copies]]
    j = np.r_[(pairs & np.uint64(0xFFFFFFFF)).astype(np.int64), copies]
    group = minhash.components(len(sketches), i, j)
    order = np.lexsort((-sketches.chars.astype(np.int64), -sketches.score, group))  # stable
    new = np.r_[True, group[order][1:] != group[order][:-1]]
    keeper = np.empty(len(group), np.int64)
    keeper[order] = order[new][np.cumsum(new) - 1]
    np.save(part.scratch / "keeper.npy", keeper)
    sizes = np.diff(np.r_[np.flatnonzero(new), len(group)])
    near = np.flatnonzero(first[keeper] != first)
    some = near[np.argsort(sketches.sha256[near, 0], kind="stable")[:SAMPLES]]
    return {
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        "samples": [[int(keeper[k]), int(k)] for k in some],
    }


def write(
    part: Part,
    sketches: Sketches,
    first: np.ndarray,
    keeper: np.ndarray,
    threshold: float,
    wanted: list[tuple[int, int]],
) -> dict:
    """Write the shard's documents that stay, and a line for each that does not."""
    begin, end = sketches.begin[part.index : part.index + 2]
    mine = np.arange(begin, end)
    gone = mine[keeper[mine] != mine]
    jaccard = dict(zip(gone.tolist(), sketches.jaccard(gone, keeper[gone]).tolist()))
    texts, wanted_here = {}, {k for pair in wanted for k in pair if begin <= k < end}
    count = Counter(documents=0, bytes=0, exact=0, near=0, drifted=0)
    (part.result / "removed").mkdir()
    removed = part.result / "removed" / f"{part.name}.jsonl.zst"
    with part.writer() as kept, DocumentFile(removed) as lines:
        records = read_documents_of(part.item, progress=part.progress)  # what is bad was counted
        for index, record in enumerate(records, begin):
            if index in wanted_here:
                texts[str(index)] = [record["origin"], record["text"][:SAMPLE_CHARS]]
            if keeper[index] == index:
                kept.write(record)
                continue
            same = first[keeper[index]] == first[index]
            count["exact" if same else "near"] += 1
            count["drifted"] += bool(not same and jaccard[index] < threshold)
            lines.write(
                {
                    "id": record["id"],
                    "origin": record["origin"],
                    "kept": sketches.id(keeper[index]),
                    "jaccard": 1.0 if same else round(jaccard[index], 4),
                }
            )
    return count | {"documents": kept.documents, "bytes": kept.bytes, "texts": texts}


def write_samples(path: Path, sketches: Sketches, wanted: list[tuple[int, int]], texts: dict):
    """Write some removed documents beside the ones that were kept in their place."""
    with open(path, "w", encoding="utf-8") as f:
        for keep, gone in wanted:
            (alike,) = sketches.jaccard(np.array([keep]), np.array([gone]))
            (left, left_text), (right, right_text) = texts[keep], texts[gone]
            f.write(f"Jaccard {alike:.3f}; kept {left} | removed {right}\n")
            f.write(side_by_side(left_text, right_text) + "\n")


def _number(value) -> float:
    """Return a score as a float; a document without one comes after all that have one."""
    return float(value) if isinstance(value, (int, float)) else float("-inf")


def _load(path: Path, dtype) -> np.ndarray:
    return np.fromfile(path, dtype)


def _map(path: Path, dtype) -> np.ndarray:
    """Map a file as an array; an empty one, which cannot be mapped, is an empty array."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def main() -> None:
    config = parse(Config)
    s = dedup(config)
    say(
        f"{config.out}: {s['documents']:,} of {s['documents_in']:,} documents, "
        f"{s['bytes'] / 1e6:.1f} of {s['bytes_in'] / 1e6:.1f} MB; removed {s['exact']:,} exact "
        f"and {s['near']:,} near duplicates in {s['groups']:,} groups, the largest of "
        f"{s['largest_group']:,}; {s['drifted']:,} are below the threshold to what was kept"
    )


if __name__ == "__main__":
    run(main)
