"""Collect raw Python code from local folders into one folder of documents.

    python -m data.collect --out out/raw --max_mb 30            # what every machine has
    python -m data.collect --out out/raw --source ~/code --source stack/train-00000.parquet

Files are sorted by a hash of their origin: the same shuffle on every machine. `--max_mb` truncates
that order, so a small sample is a prefix of a larger one and each source contributes in proportion
to its size. Documents in one file keep their order.

Left out: tests and vendored copies (by path), generated files (by their first lines), exact copies
and text that is empty, binary or over 1 MiB. Ranks read files in groups of about 16 MB; the
documents left in a group become one shard.
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

SYSTEM = {"stdlib": ("stdlib",), "site-packages": ("purelib", "platlib")}  # sysconfig path names
MAX_DOCUMENT_BYTES = 1 << 20  # larger source files are tables or bundles; also bounds memory
# Tests are about code elsewhere; vendored packages also exist under their own name. In the standard
# library, idlelib and turtledemo are applications, encodings holds tables and lib2to3 a grammar.
LEFT_OUT_FOLDERS = re.compile(
    r"_?tests?|testing|_?vendor(ed)?|third_party|extern(als)?|idlelib|lib2to3|encodings|turtledemo"
)
NOT_OF_THE_SOURCE = re.compile(r"\..*|site-packages|dist-packages|node_modules")  # not counted
LEFT_OUT_FILES = re.compile(r"(test_.*|.*_tests?|tests?|conftest|.*_pb2(_grpc)?)\.py")
GENERATED = re.compile(
    r"auto(matically)?[- ]?generated|(file|configuration|codec)( is| was)? generated"
    r"|@generated|do not (edit|modify)",
    re.IGNORECASE,
)
GENERATED_CHARS = 1000  # searched prefix: leaves room for a licence header
GROUP_BYTES = 16_000_000  # per work item: small enough to keep both ranks of a laptop busy
IN_ORDER = "from files order by key, rowid"  # sample order
UNREADABLE = ("NUL", "too large")  # reasons reported in quarantine/


@dataclass(frozen=True)
class Config:
    """Collect raw Python code into a folder of documents."""

    out: Path  # folder to write
    source: tuple[str, ...] = tuple(SYSTEM)  # stdlib, site-packages, a folder (its *.py files, or
    # its shards if it has none), or a shard (.jsonl, .parquet, Posts.xml); repeatable
    max_mb: float = 0.0  # stop after the document that reaches this size, 10^6 bytes; 0 = no limit


class File(NamedTuple):
    """A file to read: one document if *.py, else a shard of documents."""

    path: Path
    origin: str  # human-readable location
    bytes: int
    time_ns: int  # modification time


def collect(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there are no documents."""
    max_bytes = config.max_mb * 1e6 or math.inf
    with contextlib.ExitStack() as exits:  # file list on disk: there may be millions
        db = exits.enter_context(contextlib.closing(sqlite3.connect("")))
        by_path, digest = list_all(config, db) if Ranks().rank == 0 else ({}, "")
        stage = exits.enter_context(Stage(config, [], also=digest))
        [groups] = stage.map("list", [by_path], lambda part: write_groups(part, db))
        read, chosen = [], {"documents": 0, "bytes": 0, "left_out": {}, "items": []}
        while len(read) < len(groups["sizes"]) and chosen["bytes"] < max_bytes:
            # Estimate the groups needed from sizes alone: the output must not depend on the ranks.
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
    """Fill `db` with the files to read; return left-out counts and a hash of the list.

    Raises UserError for a source without files or an unusable `config.out`.
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
    """Write the file groups to scratch; return their sizes in bytes and the left-out counts."""
    sizes = []
    rows = db.execute(f"select path, origin, bytes, time_ns {IN_ORDER}")
    for group in batched(rows, GROUP_BYTES, lambda row: row[2]):
        named = ({"path": os.fsdecode(path), "about": about} for path, *about in group)
        write_jsonl(part.scratch / f"group-{len(sizes):05d}.jsonl", named)
        sizes.append(sum(row[2] for row in group))
    return {"sizes": sizes, "left_out": part.item}


def list_files(source: str, left_out: Counter) -> Iterator[File]:
    """Yield the files of `source`; count those left out by path.

    An origin holds no absolute path: "stdlib:json/decoder.py", "code:pkg/module.py" for ~/code.
    Symlinked folders are not followed.
    """
    path = Path(source).expanduser()  # shells do not expand the ~ in --source=~/code
    if source not in SYSTEM and not path.is_dir():
        yield from (File(f, f.name, *size_and_time(f)) for f in source_shards(path))
        return
    roots = [Path(sysconfig.get_path(key)) for key in SYSTEM.get(source, ())] or [path]
    name = source if source in SYSTEM else path.resolve().name
    found = source in SYSTEM  # an environment without packages is fine
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
    """Return whether a path ("pkg/tests/test_x.py") names test, vendored or generated code."""
    *folders, file = inside.split("/")
    return bool(LEFT_OUT_FILES.fullmatch(file) or any(map(LEFT_OUT_FOLDERS.fullmatch, folders)))


def read_group(part: Part, max_bytes: float) -> dict:
    """Write up to `max_bytes` of a group's candidates to scratch; return left-out counts."""
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
    """Yield (text, origin) of each document in a file; quarantine unreadable ones."""
    if file.path.suffix != ".py":
        for record in part.documents(file.path, file.origin):
            yield record["text"], record["origin"]
    elif file.bytes > MAX_DOCUMENT_BYTES:
        part.bad("too large", file.origin, 1)
    else:
        try:
            if not file.path.is_file():  # a dangling link, or a named pipe (would block)
                raise OSError
            yield decode(file.path.read_bytes()), file.origin
        except (OSError, UnicodeDecodeError) as e:
            part.bad("unreadable" if isinstance(e, OSError) else "not UTF-8", file.origin, 1)


def why_not(text: str) -> str:
    """Return why a text is rejected, or ""."""
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
