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
from pathlib import Path

from common.config import UserError
from common.files import SUFFIXES, shard_files

FORMATS = (*SUFFIXES, ".parquet", "Posts.xml", "Posts.xml.gz", "Posts.xml.zst")  # readers.py


def document(text: str, origin: str, **fields) -> dict:
    """A document dict for `text`. Raises UnicodeEncodeError if it holds lone surrogates."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"id": sha256[:16], "origin": origin, "sha256": sha256, "text": text, **fields}


class Seen:
    """A set of 64-bit hashes in 16 to 32 bytes each, where Python's takes 70.

    Of 35 million documents, two different ones have the same hash with a chance of 3e-5.
    """

    def __init__(self):
        self.table, self.size = array("Q", bytes(8 << 10)), 0

    def add(self, key: int) -> bool:
        """Whether `key` is new, which it then no longer is."""
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
    """The shards of all `sources`, in any format. Raises UserError where one has none."""
    shards = []
    for source in sources:
        found = shard_files(source, FORMATS)
        if not found or not all(p.is_file() and p.name.endswith(FORMATS) for p in found):
            there = "no such file or folder" if not source.exists() else "no shard there"
            raise UserError(f"--source {source}: {there}; want {', '.join(FORMATS)}")
        shards += found
    return shards


class DocumentFile:
    """Writes documents to one .jsonl.zst file, which is made by the first of them."""

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
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class ShardWriter:
    """Writes documents to `folder/shard-00000.jsonl.zst`, ..., a new one each `shard_bytes`."""

    def __init__(self, folder: Path, shard_bytes: int = 64 << 20):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.shards = self.documents = self.bytes = 0
        self._file = None

    def write(self, record: dict) -> None:
        if self._file is None or self._file.line_bytes >= self.shard_bytes:
            self.close()
            self._file = DocumentFile(self.folder / f"shard-{self.shards:05d}.jsonl.zst")
            self.shards += 1
        before = self._file.bytes
        self._file.write(record)
        self.documents += 1
        self.bytes += self._file.bytes - before

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


