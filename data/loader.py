"""Read batches from token shards: what step k sees is a pure function of k.

Shards are cut into windows of seq_len + 1 tokens at stride seq_len (a shard's last, incomplete one
is dropped). Sequence g of a run, counted over all steps and ranks, is window `permute(g mod n)` of
epoch `g div n`. Resuming at step k, or with other ranks, needs no state: start at sequence
k * seqs_per_step.

A folder with a mixture.json (data.pack) holds several sources, each with the number of epochs that
a pass over the whole sees of it; where a pass ends within a source, the next one goes on there.

Shards are memory-mapped. Reading a window compares its CRC-32 with that of the verified shard, and
the file's size: under the map of a file cut short, reading ends in SIGBUS.
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
from pathlib import Path

import numpy as np
import torch

from common.config import UserError
from data.shards import HEADER_BYTES, MIXTURE, open_shard, read_header

PREFETCH = 4  # micro-batches made ahead of the one in use
ORDER = 4096  # sequences whose places are computed at once: numpy takes a millisecond for a few too
ROUNDS = 4  # of the Feistel network; 4 give a permutation indistinguishable from random


class Windows:
    """The windows of `folder/{split}_*.bin`; indexed by an int array [n], gives uint16 [n, T+1]."""

    def __init__(self, folder: Path, split: str, seq_len: int, vocab_size: int, fingerprint: str):
        files = sorted(Path(folder).glob(f"{split}_*.bin"))
        if not files:
            raise UserError(f"no {split}_*.bin in {folder}; make token shards with data.pack")
        self.seq_len, self.files = seq_len, files
        self.shards = [open_shard(file, vocab_size, fingerprint) for file in files]
        windows = [(len(shard) - 1) // seq_len for shard in self.shards]
        self.first = np.cumsum([0, *windows])  # window of each shard
        self.crcs = np.array([zlib.crc32(shard[i * seq_len : (i + 1) * seq_len + 1].data)
                              for shard, n in zip(self.shards, windows)
                              for i in range(n)], np.uint32)  # fmt: skip
        self.handles = [os.open(file, os.O_RDONLY) for file in files]
        headers = b"".join(read_header(f).tobytes() for f in files)
        self.checksum = f"{zlib.crc32(headers):08x}"  # headers hold each shard's own checksum
        # Of each source: its first shard, then its first window, windows, and windows in a pass.
        shard, epochs = self._mixture(Path(folder), split, [f.name for f in files])
        tokens = [sum(map(len, self.shards[a:b])) for a, b in itertools.pairwise(shard)]
        self.source_first, self.source_windows = self.first[shard[:-1]], np.diff(self.first[shard])
        self.in_pass = np.rint(self.source_windows * epochs).astype(np.int64)
        self.tokens = round(sum(n * e for n, e in zip(tokens, epochs)))  # of a pass
        if self.in_pass.min() == 0:
            n = tokens[int(self.in_pass.argmin())]
            raise UserError(
                f"{folder}: the {split} split has {n:,} tokens, fewer than one sequence "
                f"of {seq_len:,} + 1; add documents or lower seq_len"
            )

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

    def __len__(self) -> int:
        return int(self.in_pass.sum())

    def order(self, g: np.ndarray, seed: int) -> np.ndarray:
        """Return the window of each sequence of a run, int64 like `g`."""
        epoch, n = g // len(self), len(self)
        place = permute(g % n, n, seed, epoch)
        ends = np.cumsum(self.in_pass)
        source = np.searchsorted(ends, place, side="right")
        in_source = place - (ends - self.in_pass)[source]
        seen = epoch * self.in_pass[source] + in_source  # of this source, in this and other passes
        return self.source_first[source] + seen % self.source_windows[source]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), self.seq_len + 1), np.uint16)
        for row, i in zip(out, index.tolist()):
            shard = int(np.searchsorted(self.first, i, side="right")) - 1
            start = self.seq_len * (i - int(self.first[shard]))
            whole = HEADER_BYTES + 2 * len(self.shards[shard])
            if os.fstat(self.handles[shard]).st_size == whole:
                row[:] = self.shards[shard][start : start + self.seq_len + 1]
                if zlib.crc32(row.data) == self.crcs[i]:
                    continue
            raise UserError(
                f"{self.files[shard]} was damaged while it was in use (window {i}, token "
                f"{start:,}); make it again with data.pack, and --resume"
            )
        return out


@dataclass
class Loader:
    """One rank's micro-batches, for steps from any start."""

    windows: Windows
    seqs_per_step: int
    micro_batch: int
    seed: int
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
            self.order = self.windows.order(g, self.seed)
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
