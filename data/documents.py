"""Documents on disk: one JSON object a line in `.jsonl.zst` shards, the seam between data stages.

Every document has
    id      str   the first 16 hex digits of sha256
    origin  str   where it came from, for a person to find it again ("stdlib:json/decoder.py")
    sha256  str   of the UTF-8 text
    text    str
and a stage may add fields of its own. A stage writes its folder under a temporary name and renames
it when complete, so that a folder that is there is whole; `summary.json` in it holds the counts.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from config import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MARK = ".nanophi"  # an empty file in every folder that a stage wrote: it may be replaced


def document(text: str, origin: str, **fields) -> dict:
    """A document dict for `text`. Raises UnicodeEncodeError if it holds lone surrogates."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"id": sha256[:16], "origin": origin, "sha256": sha256, "text": text, **fields}


def read_jsonl(path: Path) -> Iterator[dict]:
    """The JSON objects of a .jsonl, .jsonl.gz or .jsonl.zst file, streamed.

    Raises UserError naming the file and line for a line that is not a JSON object, and for a
    compressed file that ends early.
    """
    path, number = Path(path), 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                record = json.loads(line.decode())
                if not isinstance(record, dict):
                    raise UserError(f"{path} line {number}: got {record!r:.40}, want a JSON object")
                yield record
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:  # bad UTF-8, bad JSON, an int of 5,000 digits
        raise UserError(f"{path} line {number}: not valid JSON ({e})") from None
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as e:
        raise UserError(f"{path}: cannot be read past line {number}: {e}") from None


def read_documents(paths: list[Path]) -> Iterator[dict]:
    """The documents of files, and of the shards in folders, in the order of sorted names."""
    for path in paths:
        files = shard_files(path)
        if not files:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} file there")
        for file in files:
            yield from read_jsonl(file)


def shard_files(path: Path) -> list[Path]:
    """The document shards that `path` names: itself if a file, the sorted shards of a folder."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))


class ShardWriter:
    """Writes documents to `folder/shard-00000.jsonl.zst`, ..., a new one each `shard_bytes`."""

    def __init__(self, folder: Path, shard_bytes: int = 64 << 20):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.shards = self.documents = self.bytes = 0
        self._file, self._room = None, 0

    def write(self, record: dict) -> None:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if self._file is None or self._room <= 0:
            self.close()
            path = self.folder / f"shard-{self.shards:05d}.jsonl.zst"
            compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
            self._file = zstandard.open(path, "wb", cctx=compressor)
            self.shards, self._room = self.shards + 1, self.shard_bytes
        self._file.write(line)
        self._room -= len(line)
        self.documents += 1
        self.bytes += len(record["text"].encode()) if "text" in record else len(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


@contextlib.contextmanager
def new_folder(out: Path, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """A temporary folder beside `out` that takes the name `out` if the block succeeds.

    What stood at `out` stays whole until then, and stays if the block fails. Raises UserError if
    `out` is there and was not written by this function, or if it holds one of the inputs `reads`:
    it would be replaced.
    """
    where, out = out, Path(out).resolve()
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {where} is there and is no output of ours; name a new folder")
    for path in reads:
        if Path(path).resolve().is_relative_to(out):
            raise UserError(f"--out {where} holds the input {path}; name another folder")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / MARK).touch()
    try:
        yield temporary
        old = out.with_name(f".{out.name}.old-{os.getpid()}")
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a plain, gzip or zstd file, without their ends."""
    if path.suffix == ".gz" and path.stat().st_size == 0:
        raise EOFError("it is empty")  # which gzip takes for no lines
    if path.suffix != ".zst":
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            yield from f
        return
    decompressor = zstandard.ZstdDecompressor()
    frame, rest = decompressor.decompressobj(), b""
    with open(path, "rb") as f:
        while chunk := f.read(1 << 16):
            while chunk:
                if frame.eof:
                    frame = decompressor.decompressobj()
                *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
                yield from lines
                chunk = frame.unused_data
    yield rest
    if not frame.eof:  # zstandard's own file reader takes a frame cut short for a whole one
        raise EOFError("the last zstd frame is cut short")
