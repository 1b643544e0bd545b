"""Read documents from files that others made: report what cannot be read, and go on.

    .jsonl, .jsonl.gz, .jsonl.zst   objects with `text` or `content`
    .parquet                        rows with `text` or `content`, as in The Stack (extra: parquet)
    Posts.xml, .gz, .zst            StackExchange's dump: title and body of each post

Everything streams. A document of our own is known by its sha256, and left out if its text has
another.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import ParseError, XMLPullParser

from common.config import UserError
from common.files import DAMAGED, Bad, chunks, json_lines
from data.base.documents import document

PARQUET_ROWS = 64  # decoded at once
# StackExchange escapes every other < in a body. Possessive: linear in whatever stands there.
TAG = re.compile(r"<(/?[a-zA-Z0-9]++)[^<>]*+>")
BLOCKS = ("p", "pre", "ul", "ol", "blockquote", "hr", "h1", "h2", "h3", "h4", "h5", "h6")
TAG_TEXT = {f"{end}{tag}": "\n\n" for tag in BLOCKS for end in ("", "/")} | {"li": "\n", "br": "\n"}
THE_STACK_ORIGIN = ("max_stars_repo_name", "max_stars_repo_path")


def read_documents_of(path: Path, bad: Bad = lambda *_: None, name: str = "") -> Iterator[dict]:
    """Yield the documents of a file; those of our own with all of their fields.

    The origin of another's is `name`, that of the file by default, and where in it.
    Raises UserError for a file that is not there, of an unknown format, or that needs an extra.
    """
    for position, record in read_records(path, bad):
        try:
            yield _document(record, f"{name or path.name}:{position}")
        except UserError as e:
            bad(str(e), position, repr(record)[:200])
        except (ValueError, RecursionError) as e:
            reason = "lone surrogate" if isinstance(e, UnicodeEncodeError) else "not JSON"
            bad(reason, position, repr(record)[:200])


def _document(record: dict, origin: str) -> dict:
    """Return the document of a record. Raises UserError, or ValueError for bad values."""
    text = record.get("text", record.get("content"))
    if not isinstance(text, str):
        raise UserError("no text or content")
    if "\0" in text:
        raise UserError("NUL")
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # it must be written again
    if not (isinstance(record.get("sha256"), str) and isinstance(record.get("origin"), str)):
        where = [record.get(key) for key in THE_STACK_ORIGIN]
        return document(text, "/".join(where) if all(isinstance(w, str) for w in where) else origin)
    made = document(text, record["origin"])
    if record["sha256"] != made["sha256"] or record.get("id", made["id"]) != made["id"]:
        raise UserError("wrong sha256")
    return record | made


def read_records(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    """Yield the (position, record) of each line or row of a file, by its name's format."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        return json_lines(path, bad)
    if name.endswith(".parquet"):
        return _parquet(path, bad)
    if name.endswith("Posts.xml"):
        return _posts(path, bad)
    raise UserError(f"{path}: want .jsonl (.gz, .zst), .parquet or Posts.xml (.gz, .zst)")


def _parquet(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; pip install 'nanophi[parquet]'") from None
    position = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = [n for n in ("text", "content", *THE_STACK_ORIGIN) if n in names]
            if "text" not in columns and "content" not in columns:
                bad("no text or content", 1, f"columns {', '.join(names)}")
                return
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                for i in range(batch.num_rows):
                    position += 1
                    try:
                        yield position, {n: batch.column(n)[i].as_py() for n in columns}
                    except UnicodeDecodeError:
                        bad("not UTF-8", position, "")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as e:
        bad("damaged file", position + 1, f"cannot be read past row {position}: {e}")


def _posts(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    """Yield posts as text: title, then body with its markup taken off."""
    parser, root, number = XMLPullParser(["start", "end"]), None, 0
    try:
        for piece in chunks(path):
            parser.feed(piece)
            for event, element in parser.read_events():
                root = element if root is None else root
                if event == "end" and element.tag == "row":
                    number += 1
                    if (body := element.get("Body")) is not None:
                        yield number, {"text": post_text(element.get("Title", ""), body)}
                if event == "end" and element is not root:
                    root.clear()
        parser.close()
    except (*DAMAGED, ParseError, ValueError, LookupError) as e:  # LookupError: of the encoding
        bad("damaged file", number + 1, f"cannot be read past row {number}: {e}")


def post_text(title: str, markup: str) -> str:
    """Return a post of StackExchange as plain text: blocks on lines of their own, code as it is."""
    text = html.unescape(TAG.sub(lambda tag: TAG_TEXT.get(tag[1].lower(), ""), markup))
    lines = map(str.rstrip, f"{title}\n\n{text}".split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
