"""Documents from files that others made: what cannot be read is reported, and reading goes on.

    .jsonl, .jsonl.gz, .jsonl.zst   objects with `text` or `content`
    .parquet                        rows with `text` or `content`, as in The Stack (extra: parquet)
    Posts.xml, .gz, .zst            StackExchange's dump: title and body of each post

Everything streams. Nothing that a file says makes memory grow past a fixed bound: a line, a row, an
XML element or a document that is too long is left out, entities are refused, nesting is bounded.
A document of our own is known by its sha256, and is left out if its text has another.
"""

import html
import itertools
import json
import math
import re
import xml.parsers.expat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from common.config import UserError
from common.files import DAMAGED, MAX_LINE_BYTES, PIECE_BYTES, chunks, lines
from data.base.documents import Seen, document

# bad(reason, position, what stands there): the position is a line, a row or an element, from 1.
Bad = Callable[[str, int, bytes | str], None]

# Of a JSON line that is left when its strings are taken out. Empty lists and dicts take 20 times
# their text in memory; a megabyte of them is no document's metadata.
MAX_STRUCTURE_BYTES = 1 << 20
STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
PARQUET_ROWS = 64  # decoded at once
MAX_ROW_GROUP_BYTES = 1 << 30  # The Stack's have about 100 MB; it is held in memory while read
MAX_BETWEEN_ROWS_BYTES = 1 << 21  # expat holds an element until it ends
MAX_DEPTH = 8  # of XML elements; a row of Posts.xml is at 2
MAX_POST_BYTES = 1 << 18  # a post has up to 30,000 characters before they are escaped
# StackExchange escapes every other < in a body. Possessive: linear in whatever stands there.
TAG = re.compile(r"<(/?[a-zA-Z0-9]++)[^<>]*+>")
BLOCKS = ("p", "pre", "ul", "ol", "blockquote", "hr", "h1", "h2", "h3", "h4", "h5", "h6")
TAG_TEXT = {f"{end}{tag}": "\n\n" for tag in BLOCKS for end in ("", "/")} | {"li": "\n", "br": "\n"}
THE_STACK_ORIGIN = ("max_stars_repo_name", "max_stars_repo_path")


def read_documents_of(
    path: Path,
    bad: Bad = lambda *_: None,
    progress: Callable[[int], None] = lambda n: None,
    name: str = "",
) -> Iterator[dict]:
    """Yield the documents of a file; those of our own with all of their fields.

    The origin of another's is `name`, that of the file by default, and where in it.
    Raises UserError for a file that is not there, of an unknown format, or that needs an extra.
    """
    seen = Seen()  # ids of our own documents in this file
    for position, record in read_records(path, bad, progress):
        text = record.get("text", record.get("content"))
        if not isinstance(text, str):
            bad("no text or content", position, repr(record)[:200])
            continue
        if "\0" in text:
            bad("NUL", position, text)
            continue
        ours = isinstance(record.get("sha256"), str) and isinstance(record.get("origin"), str)
        try:
            made = document(
                text, record["origin"] if ours else origin(name or path.name, position, record)
            )
        except UnicodeEncodeError:
            bad("lone surrogate", position, text)
            continue
        if not ours:
            yield made
        elif record["sha256"] != made["sha256"] or record.get("id", made["id"]) != made["id"]:
            bad("wrong sha256", position, text)
        elif not seen.add(int(made["id"], 16)):
            bad("duplicate id", position, text)
        else:
            yield record | made


def origin(name: str, position: int, record: dict) -> str:
    """Return where a document of others came from, for a person to find it again."""
    where = [record.get(key) for key in THE_STACK_ORIGIN]
    return "/".join(where) if all(isinstance(w, str) for w in where) else f"{name}:{position}"


def read_records(
    path: Path, bad: Bad = lambda *_: None, progress: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[int, dict]]:
    """Yield the (position, record) of each line or row of a file, by its name's format."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        return _jsonl(path, bad, progress)
    if name.endswith(".parquet"):
        return _parquet(path, bad, progress)
    if name.endswith("Posts.xml"):
        return _posts(path, bad, progress)
    raise UserError(f"{path}: want .jsonl (.gz, .zst), .parquet or Posts.xml (.gz, .zst)")


def _jsonl(path: Path, bad: Bad, progress) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        for number, line in enumerate(lines(path, progress), 1):
            if line is None:
                bad("line too long", number, f"over {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                record = _record(line, number, bad)
                if record is not None:
                    yield number, record
    except DAMAGED as e:
        bad("damaged file", number + 1, f"cannot be read past line {number}: {e}")


def _record(line: bytes, number: int, bad: Bad) -> dict | None:
    """Return the object of a line, or None if it was bad."""
    if len(line) > MAX_STRUCTURE_BYTES and len(STRING.sub(b"", line)) > MAX_STRUCTURE_BYTES:
        bad("too many values", number, line[:200])
        return None
    try:
        record = json.loads(line.decode(), parse_float=_finite, parse_constant=_finite)
        if SURROGATE.search(line):  # half of a pair may be anywhere, also in a key
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        bad("lone surrogate", number, line[:200])
    except UnicodeDecodeError:
        bad("not UTF-8", number, line[:200])
    except RecursionError:
        bad("nested too deeply", number, line[:200])
    except ValueError:  # also an int of 5,000 digits
        bad("not JSON", number, line[:200])
    else:
        if isinstance(record, dict):
            return record
        bad("not an object", number, line[:200])
    return None


def _finite(text: str) -> float:
    """Return a JSON number that can be written again; NaN and 1e999 cannot."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


def _parquet(path: Path, bad: Bad, progress) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; pip install 'nanophi[parquet]'") from None
    if not path.exists():
        raise UserError(f"{path}: no such file")
    position = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = [n for n in ("text", "content", *THE_STACK_ORIGIN) if n in names]
            groups = file.metadata.num_row_groups
            if "text" not in columns and "content" not in columns:
                bad("no text or content", 1, f"columns {', '.join(names)}")
                return
            for group in range(groups):
                size = file.metadata.row_group(group).total_byte_size
                rows = file.metadata.row_group(group).num_rows
                if size > MAX_ROW_GROUP_BYTES:
                    bad("row group too large", position + 1, f"{size:,} bytes in {rows:,} rows")
                    position += rows
                    continue
                for batch in file.iter_batches(PARQUET_ROWS, [group], columns, use_threads=False):
                    for i in range(batch.num_rows):
                        position += 1
                        try:
                            yield position, {n: batch.column(n)[i].as_py() for n in columns}
                        except UnicodeDecodeError:
                            bad("not UTF-8", position, "")
                progress(path.stat().st_size // groups)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as e:
        bad("damaged file", position + 1, f"cannot be read past row {position}: {e}")


def _posts(path: Path, bad: Bad, progress) -> Iterator[tuple[int, dict]]:
    """Yield posts as text: title, then body with its markup taken off."""
    parser = xml.parsers.expat.ParserCreate("utf-8")  # whatever encoding the file claims to have
    rows: deque[dict] = deque()
    number, depth = 0, 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("elements nested too deeply")
        if tag == "row":
            rows.append(attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1

    def doctype(name: str, *rest) -> None:
        # StackExchange's dumps have none; all that it can bring is entities that expand.
        raise ValueError(f"a document type, {name:.40}")

    def parse() -> Iterator[None]:
        """Feed the parser until there are rows, again and again."""
        fed_bytes = 0  # since the last row
        for chunk in chunks(path, progress):
            for at in range(0, len(chunk), PIECE_BYTES):
                piece = chunk[at : at + PIECE_BYTES]
                parser.Parse(piece)
                fed_bytes = 0 if rows else fed_bytes + len(piece)
                if fed_bytes > MAX_BETWEEN_ROWS_BYTES:
                    raise ValueError(f"no row in {fed_bytes:,} bytes")
                yield
        parser.Parse(b"", True)

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = doctype
    fed, fault = parse(), None
    while fault is None:
        try:
            next(fed)
        except StopIteration:
            fault = ""
        except (*DAMAGED, xml.parsers.expat.ExpatError, ValueError) as e:
            fault = str(e)
        while rows:  # those before a fault too
            number, row = number + 1, rows.popleft()
            if len(row.get("Body", "")) > MAX_POST_BYTES:
                bad("document too long", number, row["Body"][:200])
            elif "Body" in row:
                yield number, {"text": post_text(row.get("Title", ""), row["Body"])}
    if fault:
        bad("damaged file", number + 1, f"cannot be read past row {number}: {fault}")


def post_text(title: str, markup: str) -> str:
    """Return a post of StackExchange as plain text: blocks on lines of their own, code as it is."""
    text = html.unescape(TAG.sub(lambda tag: TAG_TEXT.get(tag[1].lower(), ""), markup))
    stripped = (line.rstrip() for line in text.split("\n"))
    kept = [title] if title else []
    for line in itertools.chain([""] if title else [], stripped):
        if line or (kept and kept[-1]):  # of several empty lines, one
            kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n"
