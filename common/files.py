"""Read and atomically write JSON, JSON lines (plain, gzip, zstd) and folders."""

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
# A .json file holds one value, but a .json.gz is usually JSON lines.
NAMES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*NAMES[:2], *(f"{name}{end}" for name in NAMES for end in PACKED))
MARK = ".nanophi"  # empty file in every folder a stage wrote: marks it as replaceable
MAX_LINE_BYTES = 16 << 20  # per .jsonl line: a 1 MiB document, fully escaped, takes 6 MiB
PIECE_BYTES = 1 << 16  # bytes split into lines at once: a zip bomb may be all empty lines
FEED_BYTES = 1 << 10  # zstd can turn 4 bytes into 128 KiB: this caps one output at 32 MiB
PADDING = b"\0\r\n"  # may follow a frame: tar pads with NULs, editors add a newline
DAMAGED = (EOFError, zlib.error, OSError)

# bad(reason, position, content): the position is a line, row or element number, from 1.
Bad = Callable[[str, int, bytes | str], None]


def read_json(path: Path, strict: bool = True):
    """Return the JSON value in a file, or None if the file is absent.

    Raise UserError if it cannot be read or is not JSON; if not `strict`, return None instead.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        if not strict:
            return None
        what = e.strerror if isinstance(e, OSError) else f"not JSON ({e}); rerun its stage"
        raise UserError(f"{path}: {what}") from None


def write_json(path: Path, value) -> None:
    """Write JSON to a temporary file, then rename it: a reader never sees half a file."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp-{os.getpid()}")
    temporary.write_bytes(dumps(value, indent=2))
    temporary.replace(path)


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines."""
    with open(path, "wb") as f:
        f.writelines(map(dumps, records))


def dumps(value, **options) -> bytes:
    """Return a JSON line; escape lone surrogates, as in a file name that is not UTF-8."""
    line = json.dumps(value, ensure_ascii=False, **options) + "\n"
    return line.encode(errors="backslashreplace")


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the objects in a JSON lines file, plain, .gz or .zst.

    Raise UserError for a line that is not an object, and for a damaged or truncated file.
    """

    def bad(reason: str, number: int, start: bytes | str) -> None:
        raise UserError(f"{path} line {number}: {reason}: {start[:80]!r}")

    return (record for _, record in json_lines(path, bad))


def json_lines(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object); report anything else to `bad` and continue."""
    number = 0
    try:
        for number, line in enumerate(lines(path), 1):
            if line is None:
                bad("line too long", number, f"over {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))  # some editors write a BOM
                except (ValueError, RecursionError) as e:  # ValueError also for a 5,000-digit int
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
    """Raise UserError if replacing `out` would destroy an input, or files no stage wrote."""
    where, out = out, Path(out).resolve()
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {where} exists but no nanophi stage wrote it; use a new folder")
    for path in reads:
        if Path(os.path.realpath(path)).is_relative_to(out):  # resolve() fails on a link to itself
            raise UserError(f"--out {where} holds the input {path}; use another folder")


@contextlib.contextmanager
def work_folder(out: Path, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Lock and yield the folder .OUT.work, in which to build `out`; raise as check_out does."""
    check_out(out, reads)
    place = Path(out).resolve()
    work = place.with_name(f".{place.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    (work / MARK).touch()
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {out}: another run is writing it; wait for it") from None
        if (work / "old").exists() and not place.exists():  # killed between the two renames
            (work / "old").rename(place)
        shutil.rmtree(work / "old", ignore_errors=True)
        yield work


def replace_folder(out: Path, made: Path) -> None:
    """Move `made`, a folder in work_folder(out), to `out`."""
    out = Path(out).resolve()
    if out.exists():
        out.rename(made.with_name("old"))
    made.rename(out)


@contextlib.contextmanager
def new_folder(out: Path, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder and rename it to `out` if the block succeeds; single process only.

    Until then the old `out` is untouched, and it stays if the block fails. Raise as check_out does.
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
            if Path(out).exists() or not (work / "old").exists():  # else the next run restores old
                shutil.rmtree(work, ignore_errors=True)


def mpi_size() -> int:
    """Return the number of processes mpirun started, or 1 without mpirun."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)


def lines(path: Path) -> Iterator[bytes | None]:
    """Yield a file's lines without line ends, None for one too long; raise as `chunks` does."""
    begun = bytearray()
    for chunk in chunks(path):
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            begun += part
            yield bytes(begun) if len(begun) <= MAX_LINE_BYTES else None
            begun.clear()
        begun += rest
        del begun[MAX_LINE_BYTES + 1 :]  # already too long: bound the memory
    if begun:
        yield bytes(begun) if len(begun) <= MAX_LINE_BYTES else None


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a plain, gzip or zstd file in pieces.

    Raise UserError if it cannot be opened, and one of DAMAGED where it cannot be read further.
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
    """Yield the content of gzip members or zstd frames, up to any damage.

    Raise EOFError for a frame that is damaged or truncated.
    """
    frame, rest, whole = new_frame(), b"", False
    while fed := rest or f.read(FEED_BYTES):
        if whole:
            frame, fed = new_frame(), fed.lstrip(PADDING)
        try:
            piece = frame.decompress(fed)
        except Exception as e:  # zlib.error or ZstdError; zstandard may not be imported
            raise EOFError(str(e)) from None
        rest, whole = frame.unused_data, frame.eof or (whole and not fed)
        yield from (piece[i : i + PIECE_BYTES] for i in range(0, len(piece), PIECE_BYTES))
    if not whole:
        raise EOFError("it is cut short")
