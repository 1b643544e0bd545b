"""Stream documents from external files; report unreadable records and continue.

    .jsonl, .ndjson, .json.gz   JSON lines (.gz, .zst) with a string `text` or `content`
    .parquet                    rows with `text` or `content`, as in The Stack (extra: parquet)
    Posts.xml (.gz, .zst)       StackExchange dump: questions about Python, with their best answer

Our own documents, with origin and matching sha256, keep all fields. Documents edited after their
id was computed are skipped.
"""

import contextlib
import html
import io
import json
import os
import re
import sqlite3
import sys
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree.ElementTree import ParseError, XMLPullParser

from common.config import UserError
from common.files import DAMAGED, SUFFIXES, Bad, chunks, json_lines
from data.base.documents import WANTED, as_utf8, document, source_shards
from data.base.syntax import parse_python

PARQUET_ROWS = 64  # rows decoded at once
TEXTS = ("text", "content")  # text fields, in order of preference
THE_STACK_ORIGIN = ("max_stars_repo_name", "max_stars_repo_path")
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
QUESTION, ANSWER = "1", "2"  # PostTypeId; the others are wikis and moderator notes
MIN_VOTES = 1  # for questions and answers: someone besides the author found it useful
# StackExchange escapes every other < in a body. Possessive quantifiers keep this linear.
TAG = re.compile(r"<(/?[a-zA-Z0-9]++)[^<>]*+>")
PRE = re.compile(r"(</?pre\b[^<>]*+>)")
BLOCKS = ("p", "ul", "ol", "blockquote", "hr", "table", "h1", "h2", "h3", "h4", "h5", "h6")
TAG_TEXT = {f"{end}{tag}": "\n\n" for tag in BLOCKS for end in ("", "/")}
TAG_TEXT |= {"li": "\n- ", "br": "\n", "/tr": "\n", "/td": " | ", "/th": " | ", "code": "`",
             "/code": "`"}  # fmt: skip


def read_documents(sources: Iterable[Path]) -> Iterator[dict]:
    """Yield the documents of files and folders; count skipped records by reason on stderr.

    Raises UserError for a source without readable files.
    """
    skipped: Counter = Counter()
    try:
        for path in source_shards(*sources):
            yield from read_documents_of(path, lambda why, *_, p=path: skipped.update([(p, why)]))
    finally:  # also if the consumer stops early
        for (path, why), n in skipped.items():
            print(f"{path}: skipped {n:,}: {why}", file=sys.stderr)


def read_documents_of(path: Path, bad: Bad = lambda *_: None, name: str = "") -> Iterator[dict]:
    """Yield the documents of a file; our own keep all fields.

    External documents get the origin "name:position"; `name` defaults to the file name.
    Raises UserError for an unknown format or a missing extra.
    """
    name = as_utf8(name or path.name)
    # Skip dangling links, unreadable files and named pipes, which would block.
    if not (path.is_file() and os.access(path, os.R_OK)):
        bad("unreadable", 1, "no file that can be opened")
        return
    for position, record in read_records(path, bad):
        try:
            yield _document(record, f"{name}:{position}")
        except UserError as e:
            bad(str(e), position, repr(record)[:200])
        except (ValueError, RecursionError) as e:
            reason = "lone surrogate" if isinstance(e, UnicodeEncodeError) else "not JSON"
            bad(reason, position, repr(record)[:200])


def _document(record: dict, origin: str) -> dict:
    """Make a document from a record. Raises UserError, or ValueError for bad values."""
    text = next((t for key in TEXTS if isinstance(t := record.get(key), str)), None)
    if text is None:
        raise UserError("no text or content")
    if "\0" in text:
        raise UserError("NUL")
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # check that it can be written
    made, given = document(text, origin), record.get("sha256")
    if given == made["sha256"] and isinstance(record.get("origin"), str):
        return record | made | {"origin": record["origin"]}
    if isinstance(given, str) and record.get("id") == given[:16]:  # only our documents have this id
        raise UserError("wrong sha256")
    where = [record.get(key) for key in THE_STACK_ORIGIN]
    if all(isinstance(w, str) for w in where):
        made["origin"] = "/".join(where)
    return document(text[1:], made["origin"]) if text.startswith("\ufeff") else made


def decode(data: bytes) -> str:
    """Decode text by byte order mark, else PEP 263 cookie, else as UTF-8.

    Raises UnicodeDecodeError, also for a cookie with an unknown encoding.
    """
    if data.startswith(UTF16):
        return data.decode("utf-16")
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, LookupError, UnicodeError) as e:
        raise UnicodeDecodeError("utf-8", data[:100], 0, 1, str(e)) from None


def read_records(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    """Yield (position, record) for each line or row; the file name gives the format."""
    if path.name.endswith(SUFFIXES):
        return json_lines(path, bad)
    if path.name.endswith(".parquet"):
        return _parquet(path, bad)
    if path.name.removesuffix(".gz").removesuffix(".zst").endswith("Posts.xml"):
        return _posts(path, bad)
    raise UserError(f"{path}: want {WANTED}")


def _parquet(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow") from None
    position = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = [n for n in (*TEXTS, *THE_STACK_ORIGIN) if n in names]
            if not set(TEXTS) & set(columns):
                bad("no text or content", 1, f"columns {', '.join(names)}")
                return
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                for i in range(batch.num_rows):
                    position += 1
                    try:
                        row = {n: batch.column(n)[i].as_py() for n in columns}
                        texts = {n: decode(v) for n, v in row.items() if isinstance(v, bytes)}
                    except UnicodeDecodeError:
                        bad("not UTF-8", position, "")
                        continue
                    yield position, row | texts
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as e:
        bad("damaged file", position + 1, f"cannot be read past row {position}: {e}")


# ---- StackExchange


def _posts(path: Path, bad: Bad) -> Iterator[tuple[int, dict]]:
    """Yield (id, record) for each Python question with its best answer, by id.

    The best answer is the accepted one, else the one with most votes. Questions wait on disk.
    """
    parser, root, number, left_out = XMLPullParser(["start", "end"]), None, 0, Counter()
    with contextlib.closing(sqlite3.connect("")) as db:  # a temporary file, deleted on close
        db.execute("create table questions (id integer primary key, accepted, text)")
        db.execute("create table answers (question integer primary key, accepted, votes, text)")
        try:
            for piece in chunks(path):
                parser.feed(piece)
                for event, element in parser.read_events():
                    root = element if root is None else root
                    if event == "end" and element.tag == "row":
                        number += 1
                        try:
                            left_out[_store(db, element.attrib)] += 1
                        except (LookupError, ValueError, OverflowError):
                            left_out["malformed"] += 1
                    if event == "end" and element is not root:
                        root.clear()
            parser.close()
        except (*DAMAGED, ParseError, ValueError, LookupError) as e:  # LookupError: bad encoding
            bad("damaged file", number + 1, f"cannot be read past row {number}: {e}")
        joined = "select id, q.text, a.text from questions q join answers a on question = id"
        for id_, question, answer in db.execute(f"{joined} order by id"):
            left_out[""] -= 2
            yield id_, {"text": f"{question}\n## Answer\n\n{answer}"}
    left_out["question without an answer"] = left_out.pop("", 0)
    if told := ", ".join(f"{n:,} {why}" for why, n in left_out.most_common() if n):
        bad("posts left out", number, told)  # one line: a dump has tens of millions


def _store(db: sqlite3.Connection, post: dict[str, str]) -> str:
    """Store a question, or its best answer so far; return "" or why a post was left out."""
    body, votes = post.get("Body", ""), int(post.get("Score", MIN_VOTES))
    kind = post.get("PostTypeId")
    if kind not in (QUESTION, ANSWER):
        return "neither question nor answer"
    if votes < MIN_VOTES:
        return "of low score"
    if kind == QUESTION:
        tags = re.split(r"[<>|]+", post.get("Tags", "python"))
        if not any(re.fullmatch(r"python([-_.\d].*)?", tag) for tag in tags):
            return "not about Python"
        if "ClosedDate" in post:
            return "closed, as duplicates are"
        row = int(post["Id"]), int(post.get("AcceptedAnswerId") or 0)
        text = f"# {post.get('Title', '').strip() or 'Question'}\n\n{post_text(body)}"
        db.execute("insert or replace into questions values (?, ?, ?)", (*row, text))
        return ""
    known = "select q.accepted = ?, a.accepted, a.votes from questions q left join answers a "
    found = db.execute(
        f"{known} on question = id where id = ?", (int(post["Id"]), int(post.get("ParentId", 0)))
    ).fetchone()
    if not found:
        return "answer without its question"
    accepted, *other = found
    if other[0] is not None and (accepted, votes) <= tuple(other):
        return "answer that is not the best"
    db.execute("insert or replace into answers values (?, ?, ?, ?)",
               (int(post["ParentId"]), accepted, votes, post_text(body)))  # fmt: skip
    return "answer that is not the best" if other[0] is not None else ""


def post_text(markup: str) -> str:
    """Convert a post body to Markdown; fence its code, tagged python if it parses."""
    blocks, inside = [], False
    for piece in PRE.split(markup):
        if PRE.fullmatch(piece):
            inside = piece[1] != "/"
            continue
        text = html.unescape(TAG.sub("" if inside else _markdown, piece))
        if not inside:
            text = re.sub(r"\n{3,}", "\n\n", re.sub(r"( \|)? *$", "", text, flags=re.MULTILINE))
        if text := text.strip("\n").rstrip():
            blocks.append(fenced(text) if inside else text)
    return "\n\n".join(blocks) + "\n"


def _markdown(tag: re.Match) -> str:
    return TAG_TEXT.get(tag[1].lower(), "")


def fenced(code: str) -> str:
    code, language = textwrap.dedent(code), ""
    with contextlib.suppress(SyntaxError):
        language = "python" * bool(parse_python(code).body)
    return f"```{language}\n{code}\n```"
