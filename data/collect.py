"""Raw Python code, from folders on this machine, into one folder of documents.

    python -m data.collect --out out/raw --max_mb 30            # what every machine has
    python -m data.collect --out out/raw --source ~/code --source stack.jsonl.zst

Files come in the order of a hash of their origin, a shuffle that depends neither on the machine nor
on how a folder is walked. `--max_mb` cuts that order short, so a small sample is the beginning of a
larger one. It is one cap for all sources together: each gives in proportion to its size. A .jsonl
file counts as one file there, and its documents stay in their order.

Only what is certain without parsing is left out here: tests and vendored copies by their path,
generated files by what their first lines say, exact copies, and text that is no text. Taste is
data.filter's job. Seen hashes are held in memory, about 100 bytes a document.
"""

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from config import UserError, parse, run
from data.documents import (
    SUFFIXES,
    ShardWriter,
    document,
    new_folder,
    read_jsonl,
    shard_files,
    write_json,
)

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


@dataclass(frozen=True)
class Config:
    """Collects raw Python code into a folder of documents."""

    out: Path  # folder to write
    source: tuple[str, ...] = tuple(SYSTEM)  # stdlib, site-packages, a folder (its *.py files or,
    # where it has none, its .jsonl files), or a .jsonl, .jsonl.gz or .jsonl.zst file of records
    # with the field text or content; may be given several times
    max_mb: float = 0.0  # stop after the document that reaches this many 10^6 bytes, 0 = take all
    seed: int = 0  # another seed is another order of the files


@dataclass
class Tally:
    """What became of one source."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    files_past_max_mb: int = 0
    left_out: Counter = field(default_factory=Counter)  # files by path, documents by the rest


def collect(config: Config) -> dict:
    """Write `config.out` and return its summary.

    Raises UserError for a source that is missing or has nothing to keep.
    """
    if not config.max_mb >= 0:
        raise UserError(f"--max_mb: got {config.max_mb:g}, want 0 (all) or more")
    tallies = {source: Tally() for source in config.source}
    listed = [(s, *file) for s, tally in tallies.items() for file in list_files(s, tally)]
    listed.sort(key=lambda file: hashlib.sha256(f"{config.seed}:{file[2]}".encode()).digest())
    seen, max_bytes = set(), config.max_mb * 1e6 or float("inf")
    with new_folder(config.out, config.source) as folder, ShardWriter(folder) as shards:
        for source, path, file_origin in tqdm(listed, "collect", unit=" files", disable=None):
            tally = tallies[source]
            if shards.bytes >= max_bytes:
                tally.files_past_max_mb += 1
                continue
            for text, origin in read_texts(path, file_origin, tally):
                reason = left_out(text)
                record = {} if reason else document(text, origin)
                if not reason and record["sha256"] in seen:
                    reason = "duplicate"
                if reason:
                    tally.left_out[reason] += 1
                    continue
                seen.add(record["sha256"])
                shards.write(record)
                tally.documents += 1
                tally.bytes += len(text.encode())
                if shards.bytes >= max_bytes:
                    break
        for source, tally in tallies.items():
            reached = not tally.files_past_max_mb and source not in SYSTEM
            if reached and not tally.documents and not tally.left_out["duplicate"]:
                raise UserError(f"--source {source}: no code to keep there: {describe(tally)}")
        if not shards.documents:
            raise UserError(f"no documents in {', '.join(tallies)}; name a --source with code")
        summary = {
            "documents": shards.documents,
            "bytes": shards.bytes,
            "max_mb": config.max_mb,
            "seed": config.seed,
            "sources": {source: vars(tally) for source, tally in tallies.items()},
        }
        write_json(folder / "summary.json", summary)
    return summary


def list_files(source: str, tally: Tally) -> Iterator[tuple[Path, str]]:
    """The (path, origin) of each file of `source`, less those that their path rules out.

    An origin holds no absolute path: "stdlib:json/decoder.py", "code:pkg/module.py" for ~/code.
    """
    path = Path(os.path.expanduser(source))  # a shell leaves the ~ of --source=~/code as it is
    if source in SYSTEM:
        name, roots = source, [Path(sysconfig.get_path(key)) for key in SYSTEM[source]]
    elif os.path.isdir(path):
        name, roots = path.resolve().name, [path]
    elif not os.path.exists(path):
        raise UserError(f"--source {source}: no such file or folder, nor stdlib or site-packages")
    elif not path.name.endswith(SUFFIXES):
        raise UserError(f"--source {source}: a file must be one of {', '.join(SUFFIXES)}")
    else:
        tally.files += 1
        yield path, path.name
        return
    for root in dict.fromkeys(root.resolve() for root in roots):  # purelib is often platlib
        for file in python_files(root, tally):
            # A file name need not be UTF-8, but an origin is written as UTF-8.
            inside = os.fsencode(file.relative_to(root).as_posix()).decode(errors="replace")
            tally.files += 1
            if left_out_path(inside):
                tally.left_out["path"] += 1
            else:
                yield file, f"{name}:{inside}"
    if not tally.files and source not in SYSTEM:
        for file in shard_files(path):
            tally.files += 1
            yield file, f"{name}:{file.name}"


def python_files(root: Path, tally: Tally) -> Iterator[Path]:
    """The *.py files under `root`, at any depth; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        tally.left_out["unreadable folder"] += 1

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        subfolders[:] = [s for s in subfolders if not NOT_OF_THE_SOURCE.fullmatch(s)]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def left_out_path(inside: str) -> bool:
    """Whether the path inside a source ("pkg/tests/test_x.py") says test, vendored or generated."""
    *folders, file = inside.split("/")
    return bool(LEFT_OUT_FILES.fullmatch(file) or any(map(LEFT_OUT_FOLDERS.fullmatch, folders)))


def read_texts(path: Path, origin: str, tally: Tally) -> Iterator[tuple[str, str]]:
    """The (text, origin) of a file's documents, their newlines as `\\n`; counts what has none."""
    if path.suffix != ".py":
        for number, record in enumerate(read_jsonl(path), 1):
            text = record.get("text", record.get("content"))
            if isinstance(text, str):
                yield newlines(text), f"{origin}:{number}"
            else:
                tally.left_out["no text or content"] += 1
        return
    try:
        if not path.is_file():  # a dangling link, or a named pipe, which would block
            tally.left_out["unreadable"] += 1
        elif path.stat().st_size > MAX_DOCUMENT_BYTES:
            tally.left_out["too large"] += 1
        else:
            yield newlines(path.read_bytes().decode("utf-8-sig")), origin
    except UnicodeDecodeError:
        tally.left_out["not UTF-8"] += 1
    except OSError:
        tally.left_out["unreadable"] += 1


def newlines(text: str) -> str:
    """`text` with the line ends of other systems as `\\n`, as Python itself reads source."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def left_out(text: str) -> str:
    """Why a text is no document, "" if it is one."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "NUL"
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        return "lone surrogate"
    if size_bytes > MAX_DOCUMENT_BYTES:
        return "too large"
    return "generated" if GENERATED.search(text[:GENERATED_CHARS]) else ""


def describe(tally: Tally) -> str:
    """One line on a source, for a person."""
    line = f"{tally.documents:,} documents, {tally.bytes / 1e6:.1f} MB of {tally.files:,} files"
    if tally.left_out:
        line += "; left out: " + ", ".join(f"{n:,} {why}" for why, n in tally.left_out.items())
    if tally.files_past_max_mb:
        line += f"; {tally.files_past_max_mb:,} files past --max_mb"
    return line


def main() -> None:
    config = parse(Config)
    summary = collect(config)
    for source, tally in summary["sources"].items():
        print(f"{source}: {describe(Tally(**tally))}")
    print(f"{config.out}: {summary['documents']:,} documents, {summary['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
