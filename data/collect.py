"""Collect raw Python code, from folders on this machine, into one folder of documents.

    python -m data.collect --out out/raw --max_mb 30            # what every machine has
    python -m data.collect --out out/raw --source ~/code --source stack/train-00000.parquet

Files come in the order of a hash of their origin, a shuffle that is the same on every machine.
`--max_mb` cuts that order short: a small sample is the beginning of a larger one, and each source
gives in proportion to its size. The documents of one file stay in their order.

Left out are tests and vendored copies by their path, generated files by what their first lines say,
exact copies, and text that is no text. Files are read in groups of about 16 MB, each by one rank,
and what is left of a group becomes a shard.
"""

import contextlib
import hashlib
import math
import os
import re
import sqlite3
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.config import UserError, parse, run
from common.files import check_out, read_jsonl, write_jsonl
from data.base.documents import as_utf8, batched, document, source_shards
from data.base.ranks import Ranks, say
from data.base.readers import decode
from data.base.stage import Part, Stage, size_and_time, total
from data.base.unique import Candidates, choose, write_chosen

SYSTEM = {"stdlib": ("stdlib",), "site-packages": ("purelib", "platlib")}  # names of sysconfig
MAX_DOCUMENT_BYTES = 1 << 20  # a larger source file is a table or a bundle; also bounds memory
# Tests assert about code elsewhere, and vendored copies come again under their own name. Of the
# standard library's folders, idlelib and turtledemo are applications, encodings is tables and
# lib2to3 a grammar.
LEFT_OUT_FOLDERS = re.compile(
    r"_?tests?|testing|_?vendor(ed)?|third_party|extern(als)?|idlelib|lib2to3|encodings|turtledemo"
)
NOT_OF_THE_SOURCE = re.compile(r"\..*|site-packages|dist-packages|node_modules")  # not even counted
LEFT_OUT_FILES = re.compile(r"(test_.*|.*_tests?|tests?|conftest|.*_pb2(_grpc)?)\.py")
GENERATED = re.compile(
    r"auto(matically)?[- ]?generated|(file|configuration|codec)( is| was)? generated"
    r"|@generated|do not (edit|modify)",
    re.IGNORECASE,
)
GENERATED_CHARS = 1000  # how far in that may stand: room for a licence header before it
GROUP_BYTES = 16_000_000  # read by one rank: small enough that a laptop's two have work
IN_ORDER = "from files order by key, rowid"  # the order of a sample
UNREADABLE = ("NUL", "too large")  # reasons that are named in quarantine/


@dataclass(frozen=True)
class Config:
    """Collect raw Python code into a folder of documents."""

    out: Path  # folder to write
    source: tuple[str, ...] = tuple(SYSTEM)  # stdlib, site-packages, a folder (its *.py files or,
    # where it has none, its shards), or a shard: .jsonl, .parquet, Posts.xml; several may be given
    max_mb: float = 0.0  # stop after the document that reaches this many 10^6 bytes, 0 = take all


class File(NamedTuple):
    """A file to read: a document if it is a *.py, else a shard of documents."""

    path: Path
    origin: str  # where it came from, for a person
    bytes: int
    time_ns: int  # of its last change


def collect(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError for a source without files."""
    max_bytes = config.max_mb * 1e6 or math.inf
    with contextlib.ExitStack() as exits:  # the list is on disk: there may be millions of files
        db = exits.enter_context(contextlib.closing(sqlite3.connect("")))
        by_path, digest = list_all(config, db) if Ranks().rank == 0 else ({}, "")
        stage = exits.enter_context(Stage(config, [], also=digest))
        [groups] = stage.map("list", [by_path], lambda part: write_groups(part, db))
        read, chosen = [], {"documents": 0, "bytes": 0, "left_out": {}, "items": []}
        while len(read) < len(groups["sizes"]) and chosen["bytes"] < max_bytes:
            # As many groups as should suffice: a matter of their sizes, not of the number of ranks.
            sizes = np.cumsum(groups["sizes"][len(read) :])
            n = len(read) + 1 + int((sizes < max_bytes - chosen["bytes"]).sum())
            items = range(len(groups["sizes"]))[:n]
            read = stage.map("read", items, lambda part: read_group(part, max_bytes))
            [chosen] = stage.map(f"choose-{n}", [len(read)], lambda part: choose(part, max_bytes))
        left_out = total([groups["left_out"], *read, chosen.pop("left_out")])
        if not chosen["documents"]:
            raise UserError(f"no document in {', '.join(config.source)}; left out: {left_out}")
        stage.map("write", chosen.pop("items"), write_chosen)
        return stage.finish({**chosen, "left_out": left_out})


def list_all(config: Config, db: sqlite3.Connection) -> tuple[Counter, str]:
    """List all files to read in `db`; return counts of those that their path rules out, and a hash.

    Raises UserError as list_files and check_out do.
    """
    left_out, digest = Counter(), hashlib.sha256()
    db.execute("create table files (key, path, origin, bytes, time_ns)")
    for source in dict.fromkeys(config.source):
        for path, name, *about in list_files(source, left_out):
            origin = as_utf8(name)
            key = hashlib.sha256(f"0:{origin}".encode()).digest()
            row = key, os.fsencode(path), origin, *about
            db.execute("insert into files values (?, ?, ?, ?, ?)", row)
    for row in db.execute(f"select * {IN_ORDER}"):
        digest.update(repr(row).encode())
    check_out(config.out, (os.fsdecode(path) for (path,) in db.execute("select path from files")))
    return left_out, digest.hexdigest()


def write_groups(part: Part, db: sqlite3.Connection) -> dict:
    """Leave the groups of files in scratch; return their sizes in bytes, and counts by path."""
    sizes = []
    rows = db.execute(f"select path, origin, bytes, time_ns {IN_ORDER}")
    for group in batched(rows, GROUP_BYTES, lambda row: row[2]):
        named = ({"path": os.fsdecode(path), "about": about} for path, *about in group)
        write_jsonl(part.scratch / f"group-{len(sizes):05d}.jsonl", named)
        sizes.append(sum(row[2] for row in group))
    return {"sizes": sizes, "left_out": part.item}


def list_files(source: str, left_out: Counter) -> Iterator[File]:
    """Yield the files of `source`, less those that their path rules out.

    An origin holds no absolute path: "stdlib:json/decoder.py", "code:pkg/module.py" for ~/code.
    Links to folders are not followed.
    """
    path = Path(source).expanduser()  # a shell leaves the ~ of --source=~/code as it is
    if source not in SYSTEM and not path.is_dir():
        yield from (File(f, f.name, *size_and_time(f)) for f in source_shards(path))
        return
    roots = [Path(sysconfig.get_path(key)) for key in SYSTEM.get(source, ())] or [path]
    name = source if source in SYSTEM else path.resolve().name
    found = source in SYSTEM  # an environment without packages is no error
    for root in dict.fromkeys(root.resolve() for root in roots):  # purelib is often platlib
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [s for s in subfolders if not NOT_OF_THE_SOURCE.fullmatch(s)]
            for file in (Path(folder, file) for file in files if file.endswith(".py")):
                found = True
                inside = file.relative_to(root).as_posix()
                if left_out_path(inside):
                    left_out["path"] += 1
                else:
                    yield File(file, f"{name}:{inside}", *size_and_time(file))
    for file in [] if found else source_shards(path):
        yield File(file, f"{name}:{file.relative_to(path)}", *size_and_time(file))


def left_out_path(inside: str) -> bool:
    """Return whether a path ("pkg/tests/test_x.py") says test, vendored or generated."""
    *folders, file = inside.split("/")
    return bool(LEFT_OUT_FILES.fullmatch(file) or any(map(LEFT_OUT_FOLDERS.fullmatch, folders)))


def read_group(part: Part, max_bytes: float) -> dict:
    """Write up to `max_bytes` of candidates of a group to scratch; return counts of the rest."""
    left_out, seen = Counter(), set()
    with Candidates(part) as candidates:
        rows = read_jsonl(part.stage.scratch / f"group-{part.item:05d}.jsonl")
        files = (File(Path(row["path"]), *row["about"]) for row in rows)
        for text, origin in (text for file in files for text in read_texts(part, file)):
            text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads source
            record, reason = document(text, origin), why_not(text)
            if reason in UNREADABLE:
                part.bad(reason, origin, 1, text)
            elif reason or record["id"] in seen:
                left_out[reason or "duplicate"] += 1
            else:
                seen.add(record["id"])
                candidates.write(record)
            if candidates.bytes >= max_bytes:
                break
    return left_out


def read_texts(part: Part, file: File) -> Iterator[tuple[str, str]]:
    """Yield the (text, origin) of a file's documents; quarantine what cannot be read."""
    if file.path.suffix != ".py":
        for record in part.documents(file.path, file.origin):
            yield record["text"], record["origin"]
    elif file.bytes > MAX_DOCUMENT_BYTES:
        part.bad("too large", file.origin, 1)
    else:
        try:
            if not file.path.is_file():  # a dangling link, or a named pipe, which would block
                raise OSError
            yield decode(file.path.read_bytes()), file.origin
        except (OSError, UnicodeDecodeError) as e:
            part.bad("unreadable" if isinstance(e, OSError) else "not UTF-8", file.origin, 1)


def why_not(text: str) -> str:
    """Return why a text is no document, "" if it is one."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "NUL"
    if len(text.encode()) > MAX_DOCUMENT_BYTES:
        return "too large"
    return "generated" if GENERATED.search(text[:GENERATED_CHARS]) else ""


def main() -> None:
    config = parse(Config)
    s = collect(config)
    left_out = ", ".join(f"{n:,} {why}" for why, n in s["left_out"].items() if n)
    mb = s["bytes"] / 1e6
    say(f"{config.out}: {s['documents']:,} documents, {mb:.1f} MB; left out: {left_out or 'none'}")


if __name__ == "__main__":
    run(main)
