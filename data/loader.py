"""Read batches from token shards: what step k sees is a pure function of k.

Each pass over the training documents joins them in a new random order, and cuts them into windows
of seq_len + 1 tokens at stride seq_len (the last, incomplete one is dropped). Sequence g of a run,
counted over all steps and ranks, is window `permute(g mod n)` of epoch `g div n`. Resuming at step
k, or with other ranks, needs no state: start at sequence k * seqs_per_step.

A folder with a mixture.json (data.pack) holds several sources, each with the number of passes over
it in an epoch of the whole; where an epoch ends within a source, the next one goes on there.

Shards are memory-mapped. Reading a document compares its CRC-32 with that of the verified shard,
and the file's size: under the map of a file cut short, reading ends in SIGBUS.
"""

import itertools
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common.config import UserError
from data.shards import HEADER_BYTES, MIXTURE, open_shard, read_header
from tokenizer import Tokenizer

PREFETCH = 4  # micro-batches made ahead of the one in use
ORDER = 4096  # sequences whose places are computed at once: numpy takes a millisecond for a few too
ROUNDS = 4  # of the Feistel network; 4 give a permutation indistinguishable from random


class Windows:
    """The windows of `folder/{split}_*.bin`; indexed by an int array [n], gives uint16 [n, T+1]."""

    def __init__(self, folder: Path, split: str, seq_len: int, tokenizer: Tokenizer, seed: int):
        files = sorted(Path(folder).glob(f"{split}_*.bin"))
        if not files:
            raise UserError(f"no {split}_*.bin in {folder}; make token shards with data.pack")
        self.seq_len, self.files, self.split, self.seed = seq_len, files, split, seed
        made_by = tokenizer.vocab_size, tokenizer.fingerprint
        # As plain arrays, of which a slice takes less time than of a memmap.
        self.shards = [open_shard(file, *made_by).view(np.ndarray) for file in files]
        self.handles = [os.open(file, os.O_RDONLY) for file in files]
        headers = b"".join(read_header(f).tobytes() for f in files)
        self.checksum = f"{zlib.crc32(headers):08x}"  # headers hold each shard's own checksum
        documents = []  # of each: its shard, its start there, its tokens, their CRC-32
        for i, shard in enumerate(self.shards):
            start = np.union1d(0, np.flatnonzero(shard == tokenizer.end_of_text))
            length = np.diff(start, append=len(shard))
            parts = (shard[a : a + n].data for a, n in zip(start.tolist(), length.tolist()))
            crc = np.fromiter(map(zlib.crc32, parts), np.int64, len(start))
            documents.append([np.full_like(start, i), start, length, crc])
        self.shard, self.start, self.length, self.crc = np.concatenate(documents, axis=1)
        # Of each source: its first document, its first window, and its windows in an epoch.
        shard, epochs = self._mixture(Path(folder), split, [f.name for f in files])
        self.first_document = np.searchsorted(self.shard, shard)
        tokens = np.diff(np.cumsum([0, *self.length])[self.first_document])
        windows = np.maximum(tokens - 1, 0) // seq_len
        self.first = np.cumsum([0, *windows])
        self.in_epoch = np.rint(windows * epochs).astype(np.int64)
        self.tokens = round(float(tokens @ epochs))  # of an epoch
        if self.in_epoch.min() == 0:
            n = tokens[self.in_epoch.argmin()]
            raise UserError(
                f"{folder}: the {split} split has {n:,} tokens, fewer than one sequence "
                f"of {seq_len:,} + 1; add documents or lower seq_len"
            )
        passes = -(-self.in_epoch // windows) + 2  # that are in use near an epoch's end
        self.documents = lru_cache(int(passes.sum()))(self._documents)

    def _mixture(self, folder: Path, split: str, files: list[str]) -> tuple[list[int], list[float]]:
        """Return the first shard of each source, then the number of shards; and the epochs."""
        path = folder / MIXTURE
        if split != "train" or not path.exists():
            return [0, len(files)], [1.0]
        content = path.read_bytes()
        self.checksum = f"{zlib.crc32(content, int(self.checksum, 16)):08x}"
        try:
            sources = json.loads(content)["sources"]
            epochs = [float(source["epochs"]) for source in sources]
            named = [source["shards"] for source in sources]
            if not all(0 < e < np.inf for e in epochs) or list(itertools.chain(*named)) != files:
                raise ValueError(f"epochs {epochs} of {named}")
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} does not describe {folder} ({e!r}); pack it again") from None
        shards = [0, *itertools.accumulate(map(len, named))]
        return shards, epochs

    def _documents(self, source: int, passed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a source's documents in the order of one pass, and where each ends in it."""
        a, b = self.first_document[source : source + 2].tolist()
        i = np.arange(b - a)
        if self.split == "train":
            i = permute(i, b - a, self.seed + 1 + source, passed)
        return a + i, np.cumsum(self.length[a + i])

    def __len__(self) -> int:
        return int(self.in_epoch.sum())

    def order(self, g: np.ndarray) -> np.ndarray:
        """Return the window of each sequence of a run, int64 like `g`.

        Where a pass over a source is `passed`, its windows' numbers are larger by `passed` times
        the number of all sources' windows.
        """
        epoch, n = g // len(self), len(self)
        place = permute(g % n, n, self.seed, epoch)
        ends = np.cumsum(self.in_epoch)
        source = np.searchsorted(ends, place, side="right")
        in_source = place - (ends - self.in_epoch)[source]
        seen = epoch * self.in_epoch[source] + in_source  # of this source, in all passes
        passed, window = np.divmod(seen, np.diff(self.first)[source])
        return passed * self.first[-1] + self.first[source] + window

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), self.seq_len + 1), np.uint16)
        for row, i in zip(out, index):
            passed, i = divmod(i, self.first[-1])
            source = np.searchsorted(self.first, i, side="right") - 1
            documents, ends = self.documents(int(source), int(passed))
            start = self.seq_len * (i - self.first[source])
            d = np.searchsorted(ends, start, side="right")
            skip, filled = start - ends[d] + self.length[documents[d]], 0
            while filled < len(row):
                part = self._read(documents[d])[skip : skip + len(row) - filled]
                row[filled : filled + len(part)] = part
                d, skip, filled = d + 1, 0, filled + len(part)
        return out

    def _read(self, document: int) -> np.ndarray:
        """Return a document's tokens. Raises UserError if they are no longer those verified."""
        shard, start, n = self.shard[document], self.start[document], self.length[document]
        whole = HEADER_BYTES + 2 * len(self.shards[shard])
        if os.fstat(self.handles[shard]).st_size == whole:
            tokens = np.array(self.shards[shard][start : start + n])
            if zlib.crc32(tokens.data) == self.crc[document]:
                return tokens
        raise UserError(
            f"{self.files[shard]} was damaged while it was in use (token {start:,} or later); "
            "make it again with data.pack, and --resume"
        )


@dataclass
class Loader:
    """One rank's micro-batches, for steps from any start."""

    windows: Windows
    seqs_per_step: int
    micro_batch: int
    rank: int
    world_size: int
    device: torch.device
    end_of_text: int | None = None  # its token, for attention that stays within documents
    waited_s: float = 0.0  # time the training loop spent waiting here

    def __post_init__(self):
        self.micro_batch = min(self.micro_batch, max(1, self.seqs_per_step // self.world_size))
        self.micro_steps = self.seqs_per_step // (self.micro_batch * self.world_size)
        if self.seqs_per_step != self.micro_steps * self.micro_batch * self.world_size:
            raise UserError(
                f"seqs_per_step {self.seqs_per_step} is not divisible by micro_batch "
                f"{self.micro_batch} x {self.world_size} ranks; change micro_batch"
            )
        self.order, self.order_from = np.empty(0, np.int64), 0  # a part of the run's order

    def sequences(self, step: int, micro_step: int) -> np.ndarray:
        """Return the window of each row of this rank's micro-batch, int64 [micro_batch]."""
        row = (micro_step * self.world_size + self.rank) * self.micro_batch
        i = step * self.seqs_per_step + row - self.order_from
        if not 0 <= i <= len(self.order) - self.micro_batch:
            self.order_from, i = self.order_from + i, 0
            g = self.order_from + np.arange(max(ORDER, self.micro_batch))
            self.order = self.windows.order(g)
        return self.order[i : i + self.micro_batch]

    def stream(self, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield micro-batches from `start_step` on, without end, made ahead by a thread.

        Each is the arguments of a model: idx and targets, int64 [micro_batch, T], and doc_start,
        int32 [micro_batch, T], if documents are told apart; on the loader's device.
        """
        where = ((s, m) for s in itertools.count(start_step) for m in range(self.micro_steps))
        with ThreadPoolExecutor(1, "loader") as thread:
            ahead = deque(thread.submit(self._make, *next(where)) for _ in range(PREFETCH))
            while True:
                began = time.perf_counter()
                batch = ahead.popleft().result()
                self.waited_s += time.perf_counter() - began
                ahead.append(thread.submit(self._make, *next(where)))
                yield arguments(batch.to(self.device, non_blocking=True), self.end_of_text)

    def _make(self, step: int, micro_step: int) -> torch.Tensor:
        batch = torch.from_numpy(self.windows[self.sequences(step, micro_step)].astype(np.int64))
        return batch.pin_memory() if self.device.type == "cuda" else batch


def arguments(batch: torch.Tensor, end_of_text: int | None) -> dict[str, torch.Tensor]:
    """Return a model's arguments from windows, int64 [B, T+1]: see Loader.stream.

    A document begins at the <|endoftext|> before it, as in generation; the first of a window, which
    the window may cut, at 0.
    """
    idx, targets = batch[:, :-1], batch[:, 1:]
    if end_of_text is None:
        return {"idx": idx, "targets": targets}
    t = torch.arange(idx.shape[1], device=idx.device, dtype=torch.int32)
    doc_start = torch.where(idx == end_of_text, t, 0).cummax(1).values.int()
    return {"idx": idx, "targets": targets, "doc_start": doc_start}


def permute(i: np.ndarray, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """Return the image of each i in [0, n) under a random permutation chosen by (seed, epoch).

    A Feistel network over the smallest 2^(2k) >= n, walked until it lands below n: no table, the
    same on every machine and numpy version.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.array(i, np.uint64)
    key = _mix(np.broadcast_to(np.asarray(epoch, np.uint64), x.shape) + _mix(np.uint64(seed)))
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key[todo] + np.uint64(r))) & mask)
        x[todo] = left << half | right
        todo = x >= n
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 by SplitMix64's finaliser (Steele et al. 2014), a bijection."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
