"""Raw Python code, from folders on this machine, into one folder of documents.

    python -m data.collect --out out/raw --max_mb 30            # what every machine has
    python -m data.collect --out out/raw --source ~/code --source stack/train-00000.parquet

Files come in the order of a hash of their origin, a shuffle that depends neither on the machine nor
on how a folder is walked. `--max_mb` cuts that order short, so a small sample is the beginning of a
larger one. It is one cap for all sources together: each gives in proportion to its size. A file of
many documents counts as one file there, and its documents stay in their order.

Only what is certain without parsing is left out here: tests and vendored copies by their path,
generated files by what their first lines say, exact copies, and text that is no text. Taste is
data.filter's job. What should be text and is none is named in quarantine/.

Files are read in groups of about 16 MB, each by one rank, up to the group that reaches `--max_mb`;
then the hashes of all groups are compared, and what is left of each becomes a shard. Hashes are
held in memory, about 100 bytes a document, shared among the ranks.
"""

import hashlib
import math
import os
import re
import sysconfig
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import lines, shard_files
from data.base.documents import FORMATS, Seen, ShardWriter, document
from data.base.ranks import Ranks, digest_key, say
from data.base.stage import Part, Stage, size_and_time, total

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
GROUP_BYTES = 16_000_000  # read by one rank: small enough that a laptop's two have work
UNREADABLE = frozenset(["NUL", "lone surrogate", "not UTF-8", "unreadable"])  # named in quarantine/
KEPT, DUPLICATE = 0, 1  # what a Log says of a document; other reasons come after
GENERATED_CHARS = 1000  # how far in that may stand: room for a licence header before it


@dataclass(frozen=True)
class Config:
    """Collect raw Python code into a folder of documents."""

    out: Path  # folder to write
    source: tuple[str, ...] = tuple(SYSTEM)  # stdlib, site-packages, a folder (its *.py files or,
    # where it has none, its shards), or a shard: .jsonl (.gz, .zst) or .parquet with text or
    # content, or StackExchange's Posts.xml (.gz, .zst); may be given several times
    max_mb: float = 0.0  # stop after the document that reaches this many 10^6 bytes, 0 = take all
    seed: int = 0  # another seed is another order of the files


@dataclass(frozen=True)
class File:
    """A file to read: a document if it is a *.py, else a shard of documents."""

    source: str
    path: Path
    origin: str  # where it came from, for a person
    bytes: int


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
    ranks = Ranks()
    tallies, groups = ranks.gather(list_groups(config) if ranks.rank == 0 else None)[0]
    with Stage(config, [file.path for group in groups for file in group]) as stage:
        pieces, counts = select(config, stage, groups)
        stage.map("write", pieces, write_piece)
        sources = {s: Tally(**total([vars(t), counts.get(s, {})])) for s, t in tallies.items()}
        for source, tally in sources.items():
            reached = not tally.files_past_max_mb and source not in SYSTEM
            if reached and not tally.documents and not tally.left_out.get("duplicate"):
                raise UserError(f"--source {source}: no code to keep there: {describe(tally)}")
        summary = {
            "documents": sum(tally.documents for tally in sources.values()),
            "bytes": sum(tally.bytes for tally in sources.values()),
            "max_mb": config.max_mb,
            "seed": config.seed,
            "sources": {source: vars(tally) for source, tally in sources.items()},
        }
        if not summary["documents"]:
            raise UserError(f"no documents in {', '.join(sources)}; name a --source with code")
        return stage.finish(summary)


def list_groups(config: Config) -> tuple[dict[str, Tally], list[list[File]]]:
    """List the sources: a tally of each, and all files to read, in order and in groups."""
    tallies = {source: Tally() for source in config.source}
    listed = [file for source, tally in tallies.items() for file in list_files(source, tally)]
    listed.sort(key=lambda f: hashlib.sha256(f"{config.seed}:{f.origin}".encode()).digest())
    groups, room = [], 0
    for file in listed:
        if room <= 0:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(file)
        room -= file.bytes
    return tallies, groups


def select(config: Config, stage: Stage, groups: list[list[File]]) -> tuple[list[tuple], dict]:
    """Read what is needed of `groups`; the pieces to write and the counts of each source.

    A piece is (group, number, first document, last document + 1) as read_group wrote it; which of
    its documents to keep is in scratch/keep-GROUP.npy.
    """
    ranks, max_bytes = stage.ranks, config.max_mb * 1e6 or math.inf
    read: list[dict] = []  # what read_group said
    kept_bytes: list[int] = []  # of the groups read
    logs: dict[int, Log] = {}  # of this rank's share of them
    while len(read) < len(groups) and sum(kept_bytes) < max_bytes:
        # As many groups as should suffice: a matter of their sizes, not of the number of ranks.
        first, missing_bytes = len(read), max_bytes - sum(kept_bytes)
        sizes = np.cumsum([sum(file.bytes for file in group) for group in groups[first:]])
        wave = groups[first : first + 1 + int((sizes < missing_bytes).sum())]
        read += stage.map("read", wave, lambda part: read_group(max_bytes, part), first)
        logs = {i: Log.load(stage, i) for i in range(ranks.rank, len(read), ranks.size)}
        is_first = ranks.first_seen({i: log.key[log.reason == KEPT] for i, log in logs.items()})
        for i, log in logs.items():
            log.reason[np.flatnonzero(log.reason == KEPT)[~is_first[i]]] = DUPLICATE
        mine = {i: int(log.bytes[log.reason == KEPT].sum()) for i, log in logs.items()}
        kept_bytes = ranks.gather_items(mine)

    decided = {}
    for i, log in logs.items():
        tallies, end = log.count(groups[i], read[i]["reasons"], max_bytes - sum(kept_bytes[:i]))
        candidate, kept = log.key.any(1), log.reason == KEPT
        keep = (kept & (np.arange(len(kept)) < end))[candidate]
        np.save(stage.scratch / f"keep-{i:05d}.npy", keep)
        ends = pairwise(np.cumsum([0, *read[i]["pieces"]]).tolist())
        pieces = [(i, n, a, b) for n, (a, b) in enumerate(ends) if keep[a:b].any()]
        decided[i] = pieces, {source: vars(tally) for source, tally in tallies.items()}
    decided = ranks.gather_items(decided)
    unread = [file for group in groups[len(read) :] for file in group]
    past = ({file.source: {"files_past_max_mb": 1}} for file in unread)
    return [p for pieces, _ in decided for p in pieces], total([*(c for _, c in decided), *past])


class Log:
    """What was in a group of files, an entry for each document and for each file left out."""

    def __init__(self):
        self.number = array("I")  # of the file in the group
        self.reason = array("B")  # why it was left out; KEPT for a candidate
        self.bytes = array("I")  # of the text
        self.key = array("Q")  # digest_key of the text, zeros if it is no candidate
        self.reasons = {"": KEPT, "duplicate": DUPLICATE}

    def add(self, number: int, reason: str, size: int = 0, key: tuple[int, int] = (0, 0)) -> None:
        self.number.append(number)
        self.reason.append(self.reasons.setdefault(reason, len(self.reasons)))
        self.bytes.append(size)
        self.key.extend(key)

    def save(self, path: Path) -> None:
        key = np.array(self.key, np.uint64).reshape(-1, 2)
        np.savez(path, number=self.number, reason=self.reason, bytes=self.bytes, key=key)

    @classmethod
    def load(cls, stage: Stage, group: int) -> "Log":
        """Return the log that read_group left, its columns as arrays."""
        log = cls()
        vars(log).update(np.load(stage.scratch / f"shard-{group:05d}.npz"))
        return log

    def count(self, group: list[File], reasons: list[str], left_bytes: float):
        """Tally each source if `left_bytes` of text may be kept; also the entry after the last.

        The document that reaches the limit is the last one; nothing after it is counted.
        """
        kept_bytes = np.cumsum(self.bytes * (self.reason == KEPT), dtype=np.int64)
        end = int((kept_bytes < left_bytes).sum()) + 1 if left_bytes > 0 else 0
        tallies = {file.source: Tally() for file in group}
        for number, why, size in zip(self.number[:end], self.reason[:end], self.bytes[:end]):
            tally = tallies[group[number].source]
            if why == KEPT:
                tally.documents += 1
                tally.bytes += int(size)
            else:
                tally.left_out[reasons[why]] += 1
        if end <= len(self.number):  # the limit is reached here, or was before
            for file in group[int(self.number[end - 1]) + 1 if end else 0 :]:
                tallies[file.source].files_past_max_mb += 1
        return tallies, end


def read_group(max_bytes: float, part: Part) -> dict:
    """Write the candidates of a group of files to scratch, with a log of all that was there.

    Stops at `max_bytes` of different texts: whatever the groups before it hold, no more is needed.
    """
    log, pieces, kept_bytes, seen = Log(), [], 0, Seen()
    folder = part.scratch / part.name
    folder.mkdir()
    with ShardWriter(folder) as shards:
        for number, file in enumerate(part.item):
            for text, origin in read_texts(part, file, lambda why, n=number: log.add(n, why)):
                reason = left_out(text)
                record = {} if reason else document(text, origin)
                key = digest_key(record["sha256"]) if record else None
                if reason in UNREADABLE:
                    part.bad(reason, origin, 1, text)
                if reason or not seen.add(key[0]):
                    log.add(number, reason or "duplicate")
                    continue
                shards.write(record)
                pieces += [0] * (shards.shards - len(pieces))
                pieces[-1] += 1
                size = len(text.encode())
                log.add(number, "", size, key)
                kept_bytes += size
                if kept_bytes >= max_bytes:
                    break
            if kept_bytes >= max_bytes:
                break
    log.save(part.scratch / f"{part.name}.npz")
    return {"pieces": pieces, "reasons": list(log.reasons)}


def write_piece(part: Part) -> None:
    """Write what is kept of a piece as a shard of the output."""
    group, number, first, end = part.item
    keep = np.load(part.stage.scratch / f"keep-{group:05d}.npy")[first:end]
    path = part.stage.scratch / f"shard-{group:05d}" / f"shard-{number:05d}.jsonl.zst"
    with part.writer() as out:
        for line, kept in zip(lines(path), keep, strict=True):
            if kept:
                out.write_line(line + b"\n")


def list_files(source: str, tally: Tally) -> Iterator[File]:
    """Yield the files of `source`, less those that their path rules out.

    An origin holds no absolute path: "stdlib:json/decoder.py", "code:pkg/module.py" for ~/code.
    """
    path = Path(os.path.expanduser(source))  # a shell leaves the ~ of --source=~/code as it is
    if source in SYSTEM:
        name, roots = source, [Path(sysconfig.get_path(key)) for key in SYSTEM[source]]
    elif os.path.isdir(path):
        name, roots = path.resolve().name, [path]
    elif not os.path.exists(path):
        raise UserError(f"--source {source}: no such file or folder, nor stdlib or site-packages")
    elif not path.name.endswith(FORMATS):
        raise UserError(f"--source {source}: a file must be one of {', '.join(FORMATS)}")
    else:
        tally.files += 1
        yield File(source, path, path.name, size_and_time(path)[0])
        return
    for root in dict.fromkeys(root.resolve() for root in roots):  # purelib is often platlib
        for file in python_files(root, tally):
            # A file name need not be UTF-8, but an origin is written as UTF-8.
            inside = os.fsencode(file.relative_to(root).as_posix()).decode(errors="replace")
            tally.files += 1
            if left_out_path(inside):
                tally.left_out["path"] += 1
            else:
                yield File(source, file, f"{name}:{inside}", size_and_time(file)[0])
    if not tally.files and source not in SYSTEM:
        for file in shard_files(path, FORMATS):
            tally.files += 1
            yield File(source, file, f"{name}:{file.name}", size_and_time(file)[0])


def python_files(root: Path, tally: Tally) -> Iterator[Path]:
    """Yield the *.py files under `root`, at any depth; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        tally.left_out["unreadable folder"] += 1

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        subfolders[:] = [s for s in subfolders if not NOT_OF_THE_SOURCE.fullmatch(s)]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def left_out_path(inside: str) -> bool:
    """Return whether a path ("pkg/tests/test_x.py") says test, vendored or generated."""
    *folders, file = inside.split("/")
    return bool(LEFT_OUT_FILES.fullmatch(file) or any(map(LEFT_OUT_FOLDERS.fullmatch, folders)))


def read_texts(
    part: Part, file: File, left_out: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """Yield (text, origin) of a file's documents, newlines as `\\n`; tell what has none."""
    path, text, reason = file.path, "", ""
    if path.suffix != ".py":
        for record in part.documents(path, file.origin, left_out):
            yield newlines(record["text"]), record["origin"]
        return
    try:
        if not path.is_file():  # a dangling link, or a named pipe, which would block
            reason = "unreadable"
        elif path.stat().st_size > MAX_DOCUMENT_BYTES:
            reason = "too large"
        else:
            text = newlines(part.read(path).decode("utf-8-sig"))
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except OSError:
        reason = "unreadable"
    if not reason:
        yield text, file.origin
        return
    left_out(reason)
    if reason in UNREADABLE:
        part.bad(reason, file.origin, 1)


def newlines(text: str) -> str:
    """Return `text` with the line ends of other systems as `\\n`, as Python itself reads source."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def left_out(text: str) -> str:
    """Return why a text is no document, "" if it is one."""
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
    """Describe a source in one line."""
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
        say(f"{source}: {describe(Tally(**tally))}")
    say(f"{config.out}: {summary['documents']:,} documents, {summary['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
