"""Base of every data script: resume, shard work across ranks, quarantine bad input.

A script maps functions over numbered items, usually input shards:

    with Stage(config, source_shards(config.source)) as stage:
        results = stage.map("filter", stage.shards, filter_shard)
        summary = stage.finish(total(results))

Under `mpirun -n 8 python -m mpi4py -m data.filter ...` rank i mod 8 processes item i. A result
depends only on its item, so the output is byte-identical for any number of ranks. A finished item's
files move into place and a file under state/ records it: after a kill, the same command repeats
only unfinished items.

.OUT.work/ holds result/ (becomes OUT at the end), scratch/ (passed from one map to the next),
state/ and a lock. OUT holds the items' files, quarantine/ (file, position and reason of unreadable
records), lineage.json (script, code hash, arguments) and, written last, summary.json.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from common.code import ROOT, code_hash
from common.config import UserError, printable
from common.files import MARK, read_json, read_jsonl, replace_folder, work_folder, write_json
from data.base.documents import DocumentFile
from data.base.ranks import Ranks
from data.base.readers import read_documents_of

SHOWN = 3  # quarantined records a failed run prints, as it deletes their folder
MAX_ITEMS = 100_000  # file names have five digits, so they sort in item order


class Stage:
    """One run of a data script, on all ranks."""

    def __init__(self, config, shards: Iterable[Path], reads: Iterable[Path] = (), also: str = ""):
        """Take the script's dataclass, with a field `out`; input shards; other files read; and, on
        rank 0, a hash of anything else the output depends on."""
        self.ranks, self.config, self.also = Ranks(), config, also
        self.shards, self.reads = [Path(p) for p in shards], [Path(p) for p in reads]
        self.out = Path(config.out).resolve()
        self.work = self.out.with_name(f".{self.out.name}.work")
        self.result, self.scratch = self.work / "result", self.work / "scratch"
        self.lock = ExitStack()

    def __enter__(self) -> "Stage":
        if self.ranks.rank == 0:
            self.prepare()
        self.ranks.gather(None)  # barrier: the folders exist
        return self

    def prepare(self) -> None:
        """Lock OUT; keep the work of an identical earlier run, else start over."""
        self.lock.enter_context(work_folder(self.config.out, [*self.shards, *self.reads]))
        self.identity = self.identify()
        known = read_json(self.work / "identity.json", strict=False)
        if known != self.identity or not self.result.exists():
            self.forget()
            write_json(self.work / "identity.json", self.identity)
        shutil.rmtree(self.work / "tmp", ignore_errors=True)
        for folder in ("result", "scratch", "state", "tmp"):
            (self.work / folder).mkdir(exist_ok=True)
        (self.result / MARK).touch()
        if any((self.work / "state").iterdir()):
            print(f"resuming from {self.work}", file=sys.stderr)

    def __exit__(self, kind, error, trace) -> None:
        if self.ranks.rank == 0:
            folder = self.result if kind else self.out
            for reason, n in reasons(quarantine(folder)).items():
                print(f"quarantined: {n:,} {reason}", file=sys.stderr)
            for line in itertools.islice(quarantine(folder), SHOWN if kind else 0):
                told = "  {path} at {position}: {reason} {start!r}".format(**line)
                print(printable(told), file=sys.stderr)
            # A user error calls for another command; after any other error the run may resume.
            if kind is None or issubclass(kind, UserError):
                self.forget()
                shutil.rmtree(self.work, ignore_errors=True)
            self.lock.close()

    def identify(self) -> dict:
        """Return everything the output depends on; a run resumes only if all of it is equal."""
        script = Path(sys.modules[type(self.config).__module__].__file__).resolve()
        arguments = {k: v for k, v in dataclasses.asdict(self.config).items() if k != "out"}
        reads = [file for path in self.reads for file in files_in(path)]
        inputs = [(str(p), *size_and_time(p)) for p in self.shards + reads] + [self.also]
        identity = {
            "script": script.relative_to(ROOT).as_posix(),
            "code": code_hash(script),
            "python": platform.python_version(),
            "arguments": arguments,
            "inputs": hashlib.blake2b(repr(inputs).encode(), digest_size=16).hexdigest(),
        }
        return json.loads(json.dumps(identity, default=str))

    def forget(self) -> None:
        """Remove finished work, identity first, so that no run resumes from half of it."""
        (self.work / "identity.json").unlink(missing_ok=True)
        for folder in ("state", "result", "scratch", "tmp"):
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def map(self, name: str, items: list, work: Callable[["Part"], dict | None]) -> list[dict]:
        """Return `work(part)` for every item, JSON dicts in item order, on every rank.

        `work` must depend only on part.item and part.index. Items finished by an earlier run are
        not repeated.
        """
        if len(items) >= MAX_ITEMS:
            raise UserError(f"{len(items):,} input shards, want below {MAX_ITEMS:,}: merge some")
        mine = range(self.ranks.rank, len(items), self.ranks.size)
        done: dict[int, dict] = {}
        with tqdm(mine, name, unit=" items", disable=True if self.ranks.rank else None) as bar:
            for i in bar:
                path = self.work / "state" / f"{name}-{i:05d}.json"
                done[i] = read_json(path, strict=False)
                if done[i] is None:
                    part = Part(self, name, i, items[i], bar)
                    done[i] = part.close(work(part))
                    write_json(path, done[i])
        joined = {i: result for of in self.ranks.gather(done) for i, result in of.items()}
        return [joined[i] for i in range(len(items))]

    def finish(self, summary: dict) -> dict:
        """Write `summary` with quarantine counts, and move the result to OUT."""
        if self.ranks.rank == 0:
            summary = {**summary, "quarantined": reasons(quarantine(self.result))}
            del self.identity["inputs"]  # file times, which change without the content
            write_json(self.result / "lineage.json", self.identity)
            write_json(self.result / "summary.json", summary)
            replace_folder(self.out, self.result)
        self.ranks.gather(None)  # barrier: OUT exists
        return summary


class Part:
    """Work on one item: reads documents, writes files, reports unreadable records."""

    def __init__(self, stage: Stage, name: str, index: int, item, bar: tqdm):
        self.stage, self.index, self.item, self.bar = stage, index, item, bar
        self.folder = stage.work / "tmp" / f"{name}-{index:05d}"
        shutil.rmtree(self.folder, ignore_errors=True)
        # close() moves files from these two to stage.result and stage.scratch.
        self.result, self.scratch = self.folder / "result", self.folder / "scratch"
        self.result.mkdir(parents=True)
        self.scratch.mkdir()
        self.name = f"shard-{index:05d}"

    def documents(self, path: Path | None = None, name: str = "") -> Iterator[dict]:
        """Yield the documents of `path` (default: the item), with origins under `name`; quarantine
        unreadable records."""
        path = Path(path or self.item)
        found = read_documents_of(path, lambda why, *at: self.bad(why, str(path), *at), name)
        for n, record in enumerate(found, 1):
            if n % 1000 == 0:
                self.bar.set_postfix_str(f"{n:,} documents of {path.name}")
            yield record

    def writer(self) -> DocumentFile:
        """Open result/shard-INDEX.jsonl.zst, created by the first document."""
        return DocumentFile(self.result / f"{self.name}.jsonl.zst")

    def bad(self, reason: str, path: str, position: int, what: bytes | str = b"") -> None:
        """Log an unreadable record to quarantine; a later map may log it again."""
        start = what[:200] if isinstance(what, str) else what[:200].decode(errors="replace")
        line = {"path": path, "position": position, "reason": reason, "start": start}
        folder = self.result / "quarantine"
        folder.mkdir(exist_ok=True)
        with open(folder / f"{self.name}.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")

    def close(self, result: dict | None) -> dict:
        """Move written files into place; return `result`."""
        for name in ("result", "scratch"):
            for file in files_in(self.folder / name):
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
                target = self.stage.work / name / file.relative_to(self.folder / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        shutil.rmtree(self.folder)
        return result or {}


def total(counts: Iterable[dict]) -> dict:
    """Sum nested dicts of numbers key by key, keys in order of first occurrence."""
    added: dict = {}
    for count in counts:
        for key, value in count.items():
            if isinstance(value, dict):
                added[key] = total([added.get(key, {}), value])
            else:
                added[key] = added.get(key, 0) + value
    return added


def quarantine(folder: Path) -> Iterator[dict]:
    """Yield an output's quarantined records: path, position, reason and start of the content."""
    files = sorted((folder / "quarantine").glob("*.jsonl"))
    return itertools.chain.from_iterable(map(read_jsonl, files))


def reasons(bad: Iterable[dict]) -> Counter:
    return Counter(line["reason"] for line in bad)


def files_in(path: Path) -> list[Path]:
    """Return [path] for a file, else all files under it, sorted."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def size_and_time(path: Path) -> tuple[int, int]:
    """Return a file's size and modification time (ns), zeros for a broken link."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
