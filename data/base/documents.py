"""Documents on disk: one JSON object a line in `.jsonl.zst` shards, the seam between data stages.

Every document has
    id      str   the first 16 hex digits of sha256
    origin  str   where it came from, for a person to find it again ("stdlib:json/decoder.py")
    sha256  str   of the UTF-8 text
    text    str
and a stage may add fields of its own.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from common.config import UserError
from common.files import MARK, PACKED, SUFFIXES

FORMATS = (*SUFFIXES, ".parquet", *(f"Posts.xml{end}" for end in ("", *PACKED)))  # readers.py
WANTED = ".jsonl or .ndjson (.gz, .zst), .json.gz, .parquet or Posts.xml (.gz, .zst)"


def document(text: str, origin: str, **fields) -> dict:
    """Return the document of `text`. Raises UnicodeEncodeError if it holds lone surrogates."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"id": sha256[:16], "origin": origin, "sha256": sha256, "text": text, **fields}


def as_utf8(name: str) -> str:
    """Return a file's name for an origin: it need not be UTF-8, but an origin is."""
    return os.fsencode(name).decode(errors="replace")


def source_shards(*sources: Path) -> list[Path]:
    """List files and the shards in folders, in any format. Raises UserError where there is none."""
    shards = []
    for source in sources:
        found = [source] if source.is_file() else shard_files(source)
        if not found or not found[0].name.endswith(FORMATS):
            there = "no shard there" if source.exists() else "no such file or folder"
            raise UserError(f"--source {source}: {there}; want {WANTED}")
        shards += found
    return shards


def shard_files(folder: Path) -> list[Path]:
    """List the shards in a folder and those below it, sorted; of an output of ours, its own alone.

    What is hidden is left out, and outputs of ours below another's folder: a stage's input may be
    beside its output. Links to folders are not followed.
    """
    found = []
    for where, folders, files in os.walk(folder):
        ours = MARK in files
        if not ours or where == str(folder):
            found += [Path(where, f) for f in files if f.endswith(FORMATS) and f[0] != "."]
        folders[:] = [] if ours else [f for f in folders if f[0] != "."]
    return sorted(found)


class DocumentFile(ExitStack):
    """Write documents to one .jsonl.zst file, which the first of them makes."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self._file = path, None
        self.documents = self.bytes = self.line_bytes = 0  # bytes of the texts, and of the lines

    def write(self, record: dict) -> None:
        if self._file is None:
            import zstandard  # here: a machine that trains on shards packed elsewhere needs none

            compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
            self._file = self.enter_context(zstandard.open(self.path, "wb", cctx=compressor))
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self.documents += 1
        self.bytes += len(record.get("text", "").encode())
        self.line_bytes += len(line)


class ShardWriter(ExitStack):
    """Write documents to `folder/shard-00000.jsonl.zst`, ..., a new one each `shard_bytes`."""

    def __init__(self, folder: Path, shard_bytes: int = 64 << 20):
        super().__init__()
        self.folder, self.shard_bytes, self.shards, self._file = folder, shard_bytes, 0, None

    def write(self, record: dict) -> None:
        if self._file is None or self._file.line_bytes >= self.shard_bytes:
            self.close()
            path = self.folder / f"shard-{self.shards:05d}.jsonl.zst"
            self._file = self.enter_context(DocumentFile(path))
            self.shards += 1
        self._file.write(record)


def batched(items: Iterable, limit: int, size: Callable = lambda item: 1) -> Iterator[list]:
    """Yield lists of items, each just long enough for its sizes to add up to `limit`."""
    batch, filled = [], 0
    for item in items:
        batch.append(item)
        filled += size(item)
        if filled >= limit:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def chars(record: dict) -> int:
    return len(record["text"])
