"""Files that are whole or not there: JSON, lines of JSON (plain, gzip, zstd), folders."""

import contextlib
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from common.config import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MARK = ".nanophi"  # an empty file in every folder that a stage wrote: it may be replaced
MAX_LINE_BYTES = 16 << 20  # of a .jsonl file: a document of 1 MiB, all of it escaped, has 6 MiB
# Compressed bytes that are decompressed at once. zstd makes 128 KiB of 4 bytes, so that this is at
# most 32 MiB whatever the file; on real code it is as fast as any larger number (LOG.md).
ZSTD_FEED_BYTES = 1 << 10
PIECE_BYTES = 1 << 16  # split into lines at once: a bomb may be lines of nothing


def read_json(path: Path, strict: bool = True):
    """Return the JSON value in a file, None if it is not there.

    Raises UserError if it is not JSON; unless `strict`, what cannot be read counts as absent.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        if isinstance(e, FileNotFoundError) or not strict:
            return None
        if isinstance(e, OSError):
            raise
        raise UserError(f"{path}: no JSON ({e}); delete it, and run its stage again") from None


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the JSON objects of a .jsonl, .jsonl.gz or .jsonl.zst file, streamed.

    Raises UserError naming the file and line for a line that is not a JSON object, and for a
    compressed file that ends early. (data.base.readers has the reader that goes on.)
    """
    path, number = Path(path), 0
    try:
        for number, line in enumerate(lines(path), 1):
            if line is None:
                raise UserError(f"{path} line {number}: longer than {MAX_LINE_BYTES:,} bytes")
            if line.strip():
                record = json.loads(line.decode())
                if not isinstance(record, dict):
                    raise UserError(f"{path} line {number}: got {record!r:.40}, want a JSON object")
                yield record
    except UserError:
        raise
    except (ValueError, RecursionError) as e:  # bad UTF-8, bad JSON, an int of 5,000 digits
        raise UserError(f"{path} line {number}: not valid JSON ({e})") from None
    except DAMAGED as e:
        raise UserError(f"{path}: cannot be read past line {number}: {e}") from None


def read_documents(paths: list[Path]) -> Iterator[dict]:
    """Yield the documents of files, and of the shards in folders, in the order of sorted names."""
    for path in paths:
        files = shard_files(path)
        if not files:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} file there")
        for file in files:
            yield from read_jsonl(file)


def shard_files(path: Path, formats: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """List the document shards at `path`: itself if a file, the sorted shards of a folder."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.iterdir() if p.name.endswith(formats))


def check_out(out: Path, reads: Iterable[Path] = ()) -> None:
    """Raise UserError if `out` is no output of ours or holds an input: it would be replaced."""
    where, out = out, Path(out).resolve()
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {where} is there and is no output of ours; name a new folder")
    for path in reads:
        if Path(path).resolve().is_relative_to(out):
            raise UserError(f"--out {where} holds the input {path}; name another folder")


@contextlib.contextmanager
def new_folder(out: Path, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that takes the name `out` if the block succeeds.

    What stood at `out` stays whole until then, and stays if the block fails. Raises UserError as
    check_out does.
    """
    check_out(out, reads)
    out = Path(out).resolve()
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


def write_jsonl(path: Path, records: Iterable[dict], ensure_ascii: bool = False) -> None:
    """Write records as JSON, one a line; lone surrogates need `ensure_ascii`."""
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record, ensure_ascii=ensure_ascii) + "\n" for record in records)


DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)  # what `chunks` raises


def lines(path: Path, progress: Callable[[int], None] = lambda n: None) -> Iterator[bytes | None]:
    """Yield the lines of a plain, gzip or zstd file without line ends, None for one too long.

    Raises UserError if there is no such file, and one of DAMAGED where it cannot be read further.
    """
    begun, too_long = bytearray(), False  # the line that is not yet whole
    for chunk in chunks(path, progress):
        for start in range(0, len(chunk), PIECE_BYTES):
            *whole, rest = chunk[start : start + PIECE_BYTES].split(b"\n")
            for part in whole:
                too_long |= len(begun) + len(part) > MAX_LINE_BYTES
                yield None if too_long else bytes(begun) + part if begun else part
                begun.clear()
                too_long = False
            too_long |= len(begun) + len(rest) > MAX_LINE_BYTES
            if too_long:
                begun.clear()
            else:
                begun += rest
    if too_long or begun:
        yield None if too_long else bytes(begun)


def chunks(path: Path, progress: Callable[[int], None] = lambda n: None) -> Iterator[bytes]:
    """Yield the content of a plain, gzip or zstd file in pieces of up to 32 MiB.

    `progress` is told how many bytes of the file itself were read.
    """
    path, told = Path(path), 0
    try:
        with open(path, "rb") as f:
            source = _zstd(f) if path.suffix == ".zst" else _gzip(f) if path.suffix == ".gz" else (
                iter(lambda: f.read(PIECE_BYTES), b""))  # fmt: skip
            for chunk in source:
                yield chunk
                progress(f.tell() - told)
                told = f.tell()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as e:
        raise UserError(f"{path}: {e.strerror.lower()}") from None


def _gzip(f: BinaryIO) -> Iterator[bytes]:
    with gzip.open(f) as inside:
        empty = True
        while chunk := inside.read(PIECE_BYTES):
            yield chunk
            empty = False
    if empty and f.tell() == 0:
        raise EOFError("it is empty")  # which gzip takes for no lines


def _zstd(f: BinaryIO) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    while fed := f.read(ZSTD_FEED_BYTES):
        while fed:
            if frame.eof:
                frame = decompressor.decompressobj()
            try:
                piece = frame.decompress(fed)
            except zstandard.ZstdError as e:
                raise EOFError(str(e)) from None
            yield piece
            fed = frame.unused_data
    if not frame.eof:  # zstandard's own file reader takes a frame cut short for a whole one
        raise EOFError("the last zstd frame is cut short")
