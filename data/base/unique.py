"""Drop exact duplicates: write candidates to scratch, then the first of each to the result."""

import itertools
import math
from array import array

import numpy as np

from common.files import read_jsonl
from data.base.documents import DocumentFile
from data.base.stage import Part


class Candidates(DocumentFile):
    """Writer for one item's candidates in scratch, plus their keys and bytes, uint64 [n, 3]."""

    def __init__(self, part: Part):
        super().__init__(part.scratch / f"{part.name}.jsonl.zst")
        self.log = array("Q")
        self.callback(lambda: np.save(
            part.scratch / f"{part.name}.npy", np.array(self.log, np.uint64).reshape(-1, 3)
        ))  # fmt: skip

    def write(self, record: dict) -> None:
        super().write(record)
        sha256 = record["sha256"]
        key = int(sha256[:16], 16), int(sha256[16:32], 16)
        self.log.extend((*key, len(record["text"].encode())))


def choose(part: Part, max_bytes: float = math.inf) -> dict:
    """Save masks of the candidates to keep, the first of each key over part.item items, to scratch.

    Stop after the document that reaches `max_bytes`. Return counts and the items with any kept.
    """
    logs = [np.load(part.stage.scratch / f"shard-{i:05d}.npy") for i in range(part.item)]
    chosen = {"documents": 0, "bytes": 0, "left_out": {"duplicate": 0}, "items": []}
    for i, (log, first) in enumerate(zip(logs, first_of_each([log[:, :2] for log in logs]))):
        size = log[:, 2].astype(np.int64)
        before = chosen["bytes"] + np.cumsum(size * first) - size * first
        keep = first & (before < max_bytes)
        np.save(part.scratch / f"keep-{i:05d}.npy", keep)
        chosen["documents"] += int(keep.sum())
        chosen["bytes"] += int(size[keep].sum())
        chosen["left_out"]["duplicate"] += int((~first & (before < max_bytes)).sum())
        chosen["items"] += [i] * bool(keep.any())
    return chosen


def first_of_each(keys: list[np.ndarray]) -> list[np.ndarray]:
    """Return bool masks of the first occurrence of each row over all `keys`, each uint64 [n, 2]."""
    rows = np.concatenate(keys)
    first = np.zeros(len(rows), bool)
    first[np.unique(rows, axis=0, return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(some) for some in keys])[:-1])


def write_chosen(part: Part) -> None:
    """Write the kept candidates of item part.item as a result shard."""
    keep = np.load(part.stage.scratch / f"keep-{part.item:05d}.npy")
    candidates = read_jsonl(part.stage.scratch / f"shard-{part.item:05d}.jsonl.zst")
    with part.writer() as out:
        for record in itertools.compress(candidates, keep):
            out.write(record)
