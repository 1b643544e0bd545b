"""Read batches from token shards: the data of step k is a pure function of k.

Each pass over the training documents concatenates them in a new random order and cuts windows of
seq_len + 1 tokens at stride seq_len (the last, incomplete window is dropped). Sequence g of a run,
counted over all steps and ranks, is window `permute(g mod n)` of epoch `g div n`. Resuming at step
k, or with a different number of ranks, needs no state: start at sequence k * seqs_per_step.

`best_fit` cuts no document that fits into a window: best-fit decreasing packs documents and the
tails of longer ones (Ding et al. 2024, arXiv 2404.10830). All passes see the same windows, in a
different order.

A folder with a mixture.json (data.pack) holds several sources and the passes over each per epoch of
the mixture; if an epoch ends within a source, the next epoch continues there. Several folders are
read the same way; a folder's weight is its share of the tokens.

Shards are memory-mapped. Every document read checks the CRC-32 from verification, and the file size
first: reading past the end of a truncated file raises SIGBUS.
"""

import itertools
import json
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common.config import UserError
from data.shards import HEADER_BYTES, MIXTURE, open_shard, read_header
from tokenizer import Tokenizer

PREFETCH = 4  # micro-batches prepared ahead
ORDER = 4096  # sequences ordered per numpy call, which takes 1 ms even for a few
FIT_DOCUMENTS = 65536  # documents that best_fit packs together
SHARE_WINDOWS = 1000  # minimum windows of a weighted folder per epoch: shares are right to 0.1%
STARTS = 1 << 16  # added to the first token of a packed piece without <|endoftext|>, and to padding
ROUNDS = 4  # Feistel rounds; 4 give a permutation indistinguishable from random


class Windows:
    """Windows of `folder/{split}_*.bin`: index with an int array [n] to get int64 [n, T+1]."""

    def __init__(
        self, folders: Sequence[Path], split: str, seq_len: int, tokenizer: Tokenizer, seed: int,
        weights: Sequence[float] = (), best_fit: bool = False,
    ):  # fmt: skip
        """Open one or more folders; `weights` are their shares of the tokens of the train split.

        Without weights, a pass over each folder is an epoch.
        """
        self.seq_len, self.split, self.seed = seq_len, split, seed
        self.end_of_text = tokenizer.end_of_text
        by_folder = [sorted(folder.glob(f"{split}_*.bin")) for folder in folders]
        if empty := [folder for folder, files in zip(folders, by_folder) if not files]:
            raise UserError(f"no {split}_*.bin in {empty[0]}; make token shards with data.pack")
        self.files = files = list(itertools.chain(*by_folder))
        made_by = tokenizer.vocab_size, tokenizer.fingerprint
        # Plain arrays slice faster than memmaps.
        self.shards = [open_shard(file, *made_by).view(np.ndarray) for file in files]
        self.handles = [os.open(file, os.O_RDONLY) for file in files]
        headers = b"".join(read_header(f).tobytes() for f in files)
        self.checksum = f"{zlib.crc32(headers):08x}"  # headers hold each shard's own checksum
        documents = []  # per document: shard, start in the shard, tokens, CRC-32
        for i, shard in enumerate(self.shards):
            start = np.union1d(0, np.flatnonzero(shard == tokenizer.end_of_text))
            length = np.diff(start, append=len(shard))
            parts = (shard[a : a + n].data for a, n in zip(start.tolist(), length.tolist()))
            crc = np.fromiter(map(zlib.crc32, parts), np.int64, len(start))
            documents.append([np.full_like(start, i), start, length, crc])
        self.shard, self.start, self.length, self.crc = np.concatenate(documents, axis=1)
        # Per source: first document, first window, windows per epoch.
        sources = list(map(self._sources, folders, by_folder))
        n_shards, epochs = (np.concatenate(x) for x in zip(*sources))
        self.first_document = np.searchsorted(self.shard, np.cumsum([0, *n_shards]))
        tokens = np.diff(np.cumsum([0, *self.length])[self.first_document])
        self.rows = self._best_fit() if best_fit else None
        windows = np.maximum(tokens - 1, 0) // seq_len
        if self.rows:
            windows = np.array([len(ends) for *_, ends in self.rows])
        self.first = np.cumsum([0, *windows])
        if weights and split == "train":
            folder = np.repeat(np.arange(len(folders)), [len(n) for n, _ in sources])
            epochs = epochs * (weights / np.bincount(folder, tokens * epochs))[folder]
            some = np.maximum(windows, 1) * epochs  # per source and epoch, up to a factor
            fewest = min(some.min(), np.bincount(folder, some).min() / SHARE_WINDOWS)
            epochs *= max(1 / epochs.max(), 1 / fewest)
            self.checksum = f"{zlib.crc32(repr(weights).encode(), int(self.checksum, 16)):08x}"
        self.in_epoch = np.rint(windows * epochs).astype(np.int64)
        self.tokens = round(float(tokens @ epochs))  # per epoch
        if self.in_epoch.min() == 0:
            worst = self.in_epoch.argmin()
            raise UserError(
                f"{files[np.cumsum(n_shards)[worst] - 1].parent}: the {split} split has "
                f"{tokens[worst]:,} tokens, fewer than one sequence of {seq_len:,} + 1; add "
                "documents or lower seq_len"
            )
        passes = -(-self.in_epoch // windows) + 2  # in use near an epoch's end
        self.documents = lru_cache(int(passes.sum()))(self._documents)

    def _sources(self, folder: Path, files: list[Path]) -> tuple[list[int], list[float]]:
        """Return each source's number of shards, and passes over it per epoch of the folder."""
        path = folder / MIXTURE
        if self.split != "train" or not path.exists():
            return [len(files)], [1.0]
        content = path.read_bytes()
        self.checksum = f"{zlib.crc32(content, int(self.checksum, 16)):08x}"
        try:
            sources = json.loads(content)["sources"]
            epochs = [float(source["epochs"]) for source in sources]
            named = [source["shards"] for source in sources]
            if not all(0 < e < np.inf for e in epochs) or (
                list(itertools.chain(*named)) != [f.name for f in files]
            ):
                raise ValueError(f"epochs {epochs} of {named}")
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} does not describe {folder} ({e!r}); pack it again") from None
        return list(map(len, named)), epochs

    def _best_fit(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return, per source, pieces int64 [P, 2] and the start and end of each row in them.

        A piece is (document, tokens to skip). A piece that continues in another fills a row alone.
        Rows are in random order, so a fraction of a pass is a fair sample.
        """
        found, seed = [], self.seed * (self.split == "train")
        for source, (a, b) in enumerate(itertools.pairwise(self.first_document.tolist())):
            order = a + permute(np.arange(b - a), b - a, seed + 1 + source, 0)
            order = order[self.length[order] > 1]  # a lone <|endoftext|> has no target
            pieces, sizes = [np.empty((0, 2), np.int64)], []
            for part in np.split(order, range(FIT_DOCUMENTS, len(order), FIT_DOCUMENTS)):
                full, left = np.divmod(self.length[part], self.seq_len)
                document = np.repeat(part, full)
                skip = np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)
                pieces.append(np.stack([document, skip * self.seq_len], 1))
                sizes += [1] * len(document)
                rows = best_fit(left, self.seq_len)
                packed = np.array(list(itertools.chain(*rows)), np.int64)
                pieces.append(np.stack([part, self.length[part] - left], 1)[packed])
                sizes += map(len, rows)
            ends = np.cumsum(sizes, dtype=np.int64)
            order = permute(np.arange(len(ends)), len(ends), seed + 1 + source, 1)
            found.append((np.concatenate(pieces), (ends - sizes)[order], ends[order]))
        return found

    @property
    def padding_frac(self) -> float:
        """Return the padding share of the packed rows."""
        rows = self.first[-1] * self.seq_len
        return 1 - float(self.length[self.length > 1].sum()) / rows

    def _documents(self, source: int, passed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a source's documents in the order of one pass, and their end offsets."""
        a, b = self.first_document[source : source + 2].tolist()
        i = np.arange(b - a)
        if self.split == "train":
            i = permute(i, b - a, self.seed + 1 + source, passed)
        return a + i, np.cumsum(self.length[a + i])

    def __len__(self) -> int:
        return int(self.in_epoch.sum())

    def order(self, g: np.ndarray) -> np.ndarray:
        """Return the window of each sequence of a run, int64 like `g`.

        Pass p over a source numbers its windows p * (windows of all sources) higher than pass 0.
        """
        epoch, n = g // len(self), len(self)
        place = permute(g % n, n, self.seed, epoch)
        ends = np.cumsum(self.in_epoch)
        source = np.searchsorted(ends, place, side="right")
        in_source = place - (ends - self.in_epoch)[source]
        seen = epoch * self.in_epoch[source] + in_source  # in all passes
        passed, window = np.divmod(seen, np.diff(self.first)[source])
        return passed * self.first[-1] + self.first[source] + window

    def _pieces(self, i: int) -> Iterator[tuple[int, int]]:
        """Yield (document, tokens to skip) for window i, from its first document on."""
        passed, i = divmod(i, self.first[-1])
        source = int(np.searchsorted(self.first, i, side="right") - 1)
        i -= self.first[source]
        if self.rows:
            pieces, first, ends = self.rows[source]
            yield from pieces[first[i] : ends[i]].tolist()
            return
        documents, ends = self.documents(source, int(passed))
        start = self.seq_len * i
        d = np.searchsorted(ends, start, side="right")
        yield documents[d], start - ends[d] + self.length[documents[d]]
        yield from ((document, 0) for document in documents[d + 1 :])

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        # Padding, until pieces overwrite it.
        out = np.full((len(index), self.seq_len + 1), self.end_of_text + STARTS)
        for row, i in zip(out, index):
            filled = 0
            for document, skip in self._pieces(i):
                part = self._read(document)[skip : skip + len(row) - filled]
                row[filled : filled + len(part)] = part
                if self.rows and part[0] != self.end_of_text:
                    row[filled] += STARTS
                filled += len(part)
                if filled == len(row):
                    break
        return out

    def _read(self, document: int) -> np.ndarray:
        """Return a document's tokens. Raises UserError if they changed since verification."""
        shard, start, n = self.shard[document], self.start[document], self.length[document]
        whole = HEADER_BYTES + 2 * len(self.shards[shard])
        if os.fstat(self.handles[shard]).st_size == whole:
            tokens = np.array(self.shards[shard][start : start + n])
            if zlib.crc32(tokens.data) == self.crc[document]:
                return tokens
        raise UserError(
            f"{self.files[shard]} was damaged while it was in use (token {start:,} or later); "
            "rebuild it with data.pack, then --resume"
        )


@dataclass
class Loader:
    """One rank's micro-batches, from any step on."""

    windows: Windows
    seqs_per_step: int
    micro_batch: int
    rank: int
    world_size: int
    device: torch.device
    end_of_text: int | None = None  # token id; set it to keep attention within documents
    waited_s: float = 0.0  # time the training loop waited for data

    def __post_init__(self):
        self.micro_batch = min(self.micro_batch, max(1, self.seqs_per_step // self.world_size))
        self.micro_steps = self.seqs_per_step // (self.micro_batch * self.world_size)
        if self.seqs_per_step != self.micro_steps * self.micro_batch * self.world_size:
            raise UserError(
                f"seqs_per_step {self.seqs_per_step} is not divisible by micro_batch "
                f"{self.micro_batch} x {self.world_size} ranks; change micro_batch"
            )
        self.order, self.order_from = np.empty(0, np.int64), 0  # cached slice

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
        """Yield micro-batches from `start_step` on, forever, prefetched by a thread.

        Each holds a model's arguments on the loader's device: idx and targets, int64
        [micro_batch, T], and with `end_of_text` doc_start, int32 [micro_batch, T].
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
        batch = torch.from_numpy(self.windows[self.sequences(step, micro_step)])
        return batch.pin_memory() if self.device.type == "cuda" else batch


def arguments(batch: torch.Tensor, end_of_text: int | None) -> dict[str, torch.Tensor]:
    """Split windows, int64 [B, T+1], into a model's arguments; see Loader.stream.

    A document begins at the <|endoftext|> before it, as in generation; the first in a window, which
    may be cut, at 0. In a packed window, a token with STARTS added begins a document too: as a
    target it becomes <|endoftext|>. Targets of padding are -1.
    """
    idx, targets = batch[:, :-1], batch[:, 1:]
    if end_of_text is None:
        return {"idx": idx, "targets": targets}
    t = torch.arange(idx.shape[1], device=idx.device, dtype=torch.int32)
    begins = (idx == end_of_text) | (idx >= STARTS)
    targets = torch.where(targets >= STARTS, end_of_text, targets)
    targets = torch.where(idx == end_of_text + STARTS, -1, targets)
    doc_start = torch.where(begins, t, 0).cummax(1).values.int()
    return {"idx": idx % STARTS, "targets": targets, "doc_start": doc_start}


def best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Pack pieces of these lengths into rows of `room`: longest first, each into the fullest row
    that fits it. Return the piece indexes per row, without those of length 0."""
    rows, with_left, lefts = [], [[] for _ in range(room + 1)], 0  # lefts: bitset of lefts in use
    for i in np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)].tolist():
        n = int(lengths[i])
        if fitting := lefts >> n:
            left = n + (fitting & -fitting).bit_length() - 1
            row = with_left[left].pop()
            lefts ^= (not with_left[left]) << left
        else:
            left, row = room, []
            rows.append(row)
        row.append(i)
        with_left[left - n].append(row)
        lefts |= 1 << left - n
    return rows


def read_weights(data: Sequence[Path]) -> tuple[list[Path], tuple[float, ...]]:
    """Split each FOLDER or FOLDER:WEIGHT. Raises UserError unless all have a weight, or none."""
    found = [None if d.is_dir() else re.fullmatch(r"(.+):(\d*\.?\d+)", str(d)) for d in data]
    weights = tuple(float(m[2]) for m in found if m)
    if weights and (len(weights) < len(data) or min(weights) == 0):
        named = ", ".join(map(str, data))
        raise UserError(f"data {named}: want a weight above 0 for each folder, or none")
    folders = [Path(m[1]) if m else d for m, d in zip(found, data)]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(
            f"data {missing[0]}: no such folder; `make tokens` builds out/demo/tokens, data.pack "
            "any other (docs/data.md); or name one with --data"
        )
    return folders, weights


def permute(i: np.ndarray, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """Return the image of each i in [0, n) under a random permutation keyed by (seed, epoch).

    A Feistel network over the smallest 2^(2k) >= n, cycle-walked until it lands below n: needs no
    table, and is the same on every machine and numpy version.
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
    """Mix uint64 with SplitMix64's finaliser (Steele et al. 2014), a bijection."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
