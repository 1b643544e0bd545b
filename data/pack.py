"""Token shards from documents: every document, then <|endoftext|>, end to end.

    python -m data.pack --source out/demo/filtered --tokenizer out/demo/tokenizer \
        --out out/demo/tokens/filtered

Writes `train_00000.bin`, ..., `val_00000.bin` (format: data/shards.py) and a copy of the tokenizer.
A document is in the validation split if the first bytes of its sha256 say so, so that equal texts
fall on the same side in every packing, and no document is in both.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, parse, run
from data.documents import new_folder, read_documents, write_json
from data.shards import write_shard
from tokenizer import Tokenizer

BATCH_DOCUMENTS = 512  # encoded at once, so that threads have work and memory stays flat


@dataclass(frozen=True)
class Config:
    """Encode documents and write them as token shards for train.py."""

    out: Path  # folder to write
    source: tuple[Path, ...]  # document shards, files or folders; may be given several times
    tokenizer: Path  # folder with tokenizer.model
    val_frac: float = 0.02  # share of the documents held out for the validation loss
    shard_tokens: int = 100_000_000  # tokens in a shard
    threads: int = 2  # threads that encode


class TokenWriter:
    """Collects the tokens of one split and writes a shard whenever `shard_tokens` are there."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.shard_tokens = shard_tokens
        self.shards = self.tokens = self.documents = 0
        self._pending, self._pending_tokens, self._pending_documents = [], 0, 0

    def write(self, ids: list[int]) -> None:
        self._pending.append(np.array([*ids, self.tokenizer.end_of_text], np.uint16))
        self._pending_tokens += len(ids) + 1
        self._pending_documents += 1
        if self._pending_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        write_shard(
            self.folder / f"{self.split}_{self.shards:05d}.bin",
            np.concatenate(self._pending),
            self.tokenizer.vocab_size,
            self._pending_documents,
            self.tokenizer.fingerprint,
        )
        self.shards += 1
        self.tokens += self._pending_tokens
        self.documents += self._pending_documents
        self._pending, self._pending_tokens, self._pending_documents = [], 0, 0


def main() -> None:
    config = parse(Config)
    if not 0 < config.val_frac < 1:
        raise UserError(f"--val_frac {config.val_frac}: want a share between 0 and 1")
    if config.shard_tokens < 1:
        raise UserError(f"--shard_tokens {config.shard_tokens}: want at least 1")
    tokenizer = Tokenizer(config.tokenizer)
    began, text_bytes = time.perf_counter(), 0
    with new_folder(config.out, [*config.source, config.tokenizer]) as folder:
        train, val = (
            TokenWriter(folder, split, tokenizer, config.shard_tokens) for split in ("train", "val")
        )
        batch: list[dict] = []

        def encode_batch() -> None:
            texts = [document["text"] for document in batch]
            for document, ids in zip(batch, tokenizer.encode_batch(texts, config.threads)):
                held_out = int(document["sha256"][:8], 16) < config.val_frac * 2**32
                (val if held_out else train).write(ids)
            batch.clear()

        with tqdm(unit="B", unit_scale=True, desc="pack", disable=None) as bar:
            for document in read_documents(list(config.source)):
                batch.append(document)
                size = len(document["text"].encode())
                text_bytes += size
                bar.update(size)
                if len(batch) == BATCH_DOCUMENTS:
                    encode_batch()
            encode_batch()
        for writer in (train, val):
            writer.flush()
            if not writer.documents:
                raise UserError(
                    f"no document in the {writer.split} split ({train.documents + val.documents} "
                    "in all); add documents or change --val_frac"
                )
        tokenizer.save(folder)
        summary = {
            "train_tokens": train.tokens,
            "train_documents": train.documents,
            "val_tokens": val.tokens,
            "val_documents": val.documents,
            "bytes": text_bytes,
            "bytes_per_token": round(text_bytes / (train.tokens + val.tokens), 3),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "sources": [str(source) for source in config.source],
            "seconds": round(time.perf_counter() - began, 1),
        }
        write_json(folder / "summary.json", summary)
    print(
        f"pack: {train.tokens:,} train and {val.tokens:,} val tokens, "
        f"{summary['bytes_per_token']} bytes each -> {config.out}"
    )


if __name__ == "__main__":
    run(main)
