"""Read and write files that are whole or absent: JSON, JSON lines (plain, gzip, zstd), folders."""

import contextlib
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.config import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MARK = ".nanophi"  # an empty file in every folder that a stage wrote: it may be replaced
MAX_LINE_BYTES = 16 << 20  # of a .jsonl file: a document of 1 MiB, all of it escaped, has 6 MiB
PIECE_BYTES = 1 << 16  # split into lines at once: a bomb may be lines of nothing
ZSTD_FEED_BYTES = 1 << 10  # zstd makes 128 KiB of 4 bytes: at most 32 MiB at once, whatever it is
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)

# bad(reason, position, what stands there): the position is a line, a row or an element, from 1.
Bad = Callable[[str, int, bytes | str], None]


def read_json(path: Path, strict: bool = True):
    """Return the JSON value in a file, None if it is absent.

    Raises UserError if it is not JSON; unless `strict`, an unreadable file counts as absent.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        if not strict:
            return None
        what = e.strerror if isinstance(e, OSError) else f"no JSON ({e}); run its stage again"
        raise UserError(f"{path}: {what}") from None


def write_json(path: Path, value) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)


def write_jsonl(path: Path, records: Iterable[dict], ensure_ascii: bool = False) -> None:
    """Write records as JSON, one a line; lone surrogates need `ensure_ascii`."""
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record, ensure_ascii=ensure_ascii) + "\n" for record in records)


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the objects of a .jsonl, .jsonl.gz or .jsonl.zst file.

    Raises UserError for a line that holds none, and for a compressed file that ends early.
    """

    def bad(reason: str, number: int, start: bytes | str) -> None:
        raise UserError(f"{path} line {number}: {reason}: {start[:80]!r}")

    return (record for _, record in json_lines(path, bad))


def json_lines(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object); tell `bad` about all else, and go on."""
    number = 0
    try:
        for number, line in enumerate(lines(path), 1):
            if line is None:
                bad("line too long", number, f"over {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))  # some editors write a BOM
                except (ValueError, RecursionError) as e:  # an int of 5,000 digits is one too
                    known = {UnicodeDecodeError: "not UTF-8", RecursionError: "nested too deeply"}
                    bad(known.get(type(e), "not JSON"), number, line[:200])
                    continue
                if isinstance(record, dict):
                    yield number, record
                else:
                    bad("not an object", number, line[:200])
    except DAMAGED as e:
        bad("damaged file", number + 1, f"cannot be read past line {number}: {e}")


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

    The old `out` stays whole until then, and stays if the block fails. Raises as check_out does.
    """
    check_out(out, reads)
    out = Path(out).resolve()
    temporary, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / MARK).touch()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lines(path: Path) -> Iterator[bytes | None]:
    """Yield the lines of a file without line ends, None for one too long; raises as `chunks`."""
    begun = bytearray()
    for chunk in chunks(path):
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            begun += part
            yield bytes(begun) if len(begun) <= MAX_LINE_BYTES else None
            begun.clear()
        begun += rest
        del begun[MAX_LINE_BYTES + 1 :]  # too long already, however it goes on
    if begun:
        yield bytes(begun) if len(begun) <= MAX_LINE_BYTES else None


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a plain, gzip or zstd file in pieces.

    Raises UserError if there is no such file, and one of DAMAGED where it cannot be read further.
    """
    path = Path(path)
    try:
        f = open(path, "rb")  # noqa: SIM115
    except OSError as e:
        raise UserError(f"{path}: {e.strerror.lower()}") from None
    with f:
        if path.suffix == ".zst":
            yield from _zstd(f)
            return
        if path.suffix == ".gz" and not os.fstat(f.fileno()).st_size:
            raise EOFError("it is empty")  # gzip.open would read it as no lines
        content = gzip.open(f) if path.suffix == ".gz" else f  # noqa: SIM115
        yield from iter(lambda: content.read(PIECE_BYTES), b"")


def _zstd(f) -> Iterator[bytes]:
    """Yield the content of zstd frames. Raises EOFError for one that is cut short or damaged."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    while fed := frame.unused_data or f.read(ZSTD_FEED_BYTES):
        if frame.eof:
            frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            piece = frame.decompress(fed)
        except zstandard.ZstdError as e:
            raise EOFError(str(e)) from None
        yield from (piece[i : i + PIECE_BYTES] for i in range(0, len(piece), PIECE_BYTES))
    if not frame.eof:
        raise EOFError("the last zstd frame is cut short")
