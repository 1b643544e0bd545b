"""Documents on disk: one JSON object a line in `.jsonl.zst` shards, the seam between data stages.

Every document has
    id      str   the first 16 hex digits of sha256
    origin  str   where it came from, for a person to find it again ("stdlib:json/decoder.py")
    sha256  str   of the UTF-8 text
    text    str
and a stage may add fields of its own. A stage writes its folder under a temporary name and renames
it when complete, so that a folder that is there is whole; `summary.json` in it holds the counts.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from common.config import UserError
from common.files import SUFFIXES, shard_files

T = TypeVar("T")
COLUMN = 78  # characters of each side of side_by_side
FORMATS = (*SUFFIXES, ".parquet", "Posts.xml", "Posts.xml.gz", "Posts.xml.zst")  # readers.py


def document(text: str, origin: str, **fields) -> dict:
    """Return the document of `text`. Raises UnicodeEncodeError if it holds lone surrogates."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"id": sha256[:16], "origin": origin, "sha256": sha256, "text": text, **fields}


class Seen:
    """A set of 64-bit hashes in 16 to 32 bytes each, where Python's takes 70.

    Of 35 million documents, two different ones have the same hash with a chance of 3e-5.
    """

    def __init__(self):
        self.table, self.size = array("Q", bytes(8 << 10)), 0

    def add(self, key: int) -> bool:
        """Insert `key`; return True if it was absent."""
        if 2 * self.size >= len(self.table):
            old, self.table, self.size = self.table, array("Q", bytes(16 * len(self.table))), 0
            for known in filter(None, old):
                self.add(known)
        key = key or 1  # 0 is an empty place
        mask = len(self.table) - 1
        at = key & mask
        while self.table[at] != key:
            if not self.table[at]:
                self.table[at] = key
                self.size += 1
                return True
            at = (at + 1) & mask
        return False


def source_shards(*sources: Path) -> list[Path]:
    """List the shards of all `sources`, in any format. Raises UserError where one has none."""
    shards = []
    for source in sources:
        found = shard_files(source, FORMATS)
        if not found or not all(p.is_file() and p.name.endswith(FORMATS) for p in found):
            there = "no such file or folder" if not source.exists() else "no shard there"
            raise UserError(f"--source {source}: {there}; want {', '.join(FORMATS)}")
        shards += found
    return shards


class DocumentFile(AbstractContextManager):
    """Write documents to one .jsonl.zst file, which is made by the first of them."""

    def __init__(self, path: Path):
        self.path = path
        self.documents = self.bytes = self.line_bytes = 0  # bytes of the texts, and of the lines
        self._file = None

    def write(self, record: dict) -> None:
        self.write_line(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self.bytes += len(record["text"].encode()) if "text" in record else 0

    def write_line(self, line: bytes) -> None:
        if self._file is None:
            import zstandard  # here: a machine that trains on shards packed elsewhere needs none

            compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
            self._file = zstandard.open(self.path, "wb", cctx=compressor)
        self._file.write(line)
        self.documents += 1
        self.line_bytes += len(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __exit__(self, *exc):
        self.close()


class ShardWriter(AbstractContextManager):
    """Write documents to `folder/shard-00000.jsonl.zst`, ..., a new one each `shard_bytes`."""

    def __init__(self, folder: Path, shard_bytes: int = 64 << 20):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.shards, self._file = 0, None

    def write(self, record: dict) -> None:
        if self._file is None or self._file.line_bytes >= self.shard_bytes:
            self.close()
            self._file = DocumentFile(self.folder / f"shard-{self.shards:05d}.jsonl.zst")
            self.shards += 1
        self._file.write(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __exit__(self, *exc):
        self.close()


def batched(
    items: Iterable[T], limit: int, size: Callable[[T], int] = lambda item: 1
) -> Iterator[list[T]]:
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


def side_by_side(left: str, right: str) -> str:
    """Set two texts in columns of COLUMN characters for a person to compare; long lines go on."""

    def cut(line: str) -> list[str]:
        line = line.expandtabs(4)
        return [line[i : i + COLUMN] for i in range(0, max(len(line), 1), COLUMN)]

    columns = [[part for line in text.split("\n") for part in cut(line)] for text in (left, right)]
    rows = zip_longest(*columns, fillvalue="")
    return "".join(f"{a:{COLUMN}} | {b}".rstrip() + "\n" for a, b in rows)
