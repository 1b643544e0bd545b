"""Read and write files that are whole or absent: JSON, JSON lines (plain, gzip, zstd), folders."""

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.config import UserError

PACKED = (".gz", ".zst")
# A .json file is one value, but .json.gz is how lines of JSON are published.
NAMES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*NAMES[:2], *(f"{name}{end}" for name in NAMES for end in PACKED))
MARK = ".nanophi"  # an empty file in every folder that a stage wrote: it may be replaced
MAX_LINE_BYTES = 16 << 20  # of a .jsonl file: a document of 1 MiB, all of it escaped, has 6 MiB
PIECE_BYTES = 1 << 16  # split into lines at once: a bomb may be lines of nothing
FEED_BYTES = 1 << 10  # zstd makes 128 KiB of 4 bytes: at most 32 MiB at once, whatever it is
PADDING = b"\0\r\n"  # may follow a frame: tar pads with NULs, an editor ends with a newline
DAMAGED = (EOFError, zlib.error, OSError)

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
    temporary.write_bytes(dumps(value, indent=2))
    temporary.replace(path)


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON, one a line."""
    with open(path, "wb") as f:
        f.writelines(map(dumps, records))


def dumps(value, **options) -> bytes:
    """Return a line of JSON; lone surrogates, as in a file name that is no UTF-8, are escaped."""
    line = json.dumps(value, ensure_ascii=False, **options) + "\n"
    return line.encode(errors="backslashreplace")


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the objects of a file of JSON lines, plain, .gz or .zst.

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


def check_out(out: Path, reads: Iterable[Path] = ()) -> None:
    """Raise UserError if `out` is no output of ours or holds an input: it would be replaced."""
    where, out = out, Path(out).resolve()
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {where} is there and is no output of ours; name a new folder")
    for path in reads:
        if Path(os.path.realpath(path)).is_relative_to(out):  # resolve() fails on a link to itself
            raise UserError(f"--out {where} holds the input {path}; name another folder")


@contextlib.contextmanager
def work_folder(out: Path, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield the folder .OUT.work, locked, in which `out` is made; raises as check_out does."""
    check_out(out, reads)
    place = Path(out).resolve()
    work = place.with_name(f".{place.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    (work / MARK).touch()
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {out}: another run is writing it; wait for its end") from None
        if (work / "old").exists() and not place.exists():  # killed between the two renames
            (work / "old").rename(place)
        shutil.rmtree(work / "old", ignore_errors=True)
        yield work


def replace_folder(out: Path, made: Path) -> None:
    """Give `made`, a folder in work_folder(out), the name `out`."""
    out = Path(out).resolve()
    if out.exists():
        out.rename(made.with_name("old"))
    made.rename(out)


@contextlib.contextmanager
def new_folder(out: Path, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `out` if the block succeeds, in one process.

    The old `out` stays whole until then, and stays if the block fails. Raises as check_out does.
    """
    if mpi_size() > 1:
        raise UserError("this command runs in one process; start it without mpirun")
    with work_folder(out, reads) as work:
        made = work / "result"
        shutil.rmtree(made, ignore_errors=True)
        try:
            made.mkdir()
            (made / MARK).touch()
            yield made
            replace_folder(out, made)
        finally:
            if Path(out).exists() or not (work / "old").exists():  # else the next run restores it
                shutil.rmtree(work, ignore_errors=True)


def mpi_size() -> int:
    """Return how many processes mpirun started, 1 without it."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)


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
            import zstandard

            yield from _unpacked(f, lambda: zstandard.ZstdDecompressor().decompressobj())
        elif path.suffix == ".gz":
            yield from _unpacked(f, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16))
        else:
            yield from iter(lambda: f.read(PIECE_BYTES), b"")


def _unpacked(f, new_frame: Callable) -> Iterator[bytes]:
    """Yield the content of gzip members or zstd frames, all that stands before a damaged place.

    Raises EOFError for a frame that is damaged or cut short.
    """
    frame, rest, whole = new_frame(), b"", False
    while fed := rest or f.read(FEED_BYTES):
        if whole:
            frame, fed = new_frame(), fed.lstrip(PADDING)
        try:
            piece = frame.decompress(fed)
        except Exception as e:  # zlib.error, or ZstdError, which needs zstandard to be named
            raise EOFError(str(e)) from None
        rest, whole = frame.unused_data, frame.eof or (whole and not fed)
        yield from (piece[i : i + PIECE_BYTES] for i in range(0, len(piece), PIECE_BYTES))
    if not whole:
        raise EOFError("it is cut short")
