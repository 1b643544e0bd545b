"""Documents on disk: `.jsonl.zst` shards, one JSON object per line, passed between data stages.

Fields of every document (a stage may add its own):
    id      str   first 16 hex digits of sha256
    origin  str   human-readable source ("stdlib:json/decoder.py")
    sha256  str   hash of the UTF-8 text
    text    str
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
    """Make a document from `text`. Raises UnicodeEncodeError for lone surrogates."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"id": sha256[:16], "origin": origin, "sha256": sha256, "text": text, **fields}


def as_utf8(name: str) -> str:
    """Return a file name as valid UTF-8, for an origin."""
    return os.fsencode(name).decode(errors="replace")


def source_shards(*sources: Path) -> list[Path]:
    """List source files and all shards in source folders, in any format. Raises UserError for a
    source without shards."""
    shards = []
    for source in sources:
        found = [source] if source.is_file() else shard_files(source)
        if not found or not found[0].name.endswith(FORMATS):
            there = "no shard there" if source.exists() else "no such file or folder"
            raise UserError(f"--source {source}: {there}; want {WANTED}")
        shards += found
    return shards


def shard_files(folder: Path) -> list[Path]:
    """List the shards in and below a folder, sorted; in a stage's output, only at the top level.

    Skip hidden files and folders, and stage outputs below the folder: a stage may write next to its
    input. Links to folders are not followed.
    """
    found = []
    for where, folders, files in os.walk(folder):
        ours = MARK in files
        if not ours or where == str(folder):
            found += [Path(where, f) for f in files if f.endswith(FORMATS) and f[0] != "."]
        folders[:] = [] if ours else [f for f in folders if f[0] != "."]
    return sorted(found)


class DocumentFile(ExitStack):
    """Write documents to one .jsonl.zst file, created by the first write."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self._file = path, None
        self.documents = self.bytes = self.line_bytes = 0  # bytes of text; bytes of JSON lines

    def write(self, record: dict) -> None:
        if self._file is None:
            import zstandard  # here: training on packed shards does not need it

            compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
            self._file = self.enter_context(zstandard.open(self.path, "wb", cctx=compressor))
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self.documents += 1
        self.bytes += len(record.get("text", "").encode())
        self.line_bytes += len(line)


class ShardWriter(ExitStack):
    """Write documents to `folder/shard-00000.jsonl.zst`, ...: a new shard every `shard_bytes`."""

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
    """Yield lists of items; end each list once its total size reaches `limit`."""
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
