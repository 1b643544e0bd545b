"""Resume, share among ranks, and quarantine: what every data script stands on.

A script is a few maps over numbered items, most often over input shards:

    with Stage(config, source_shards(config.source)) as stage:
        results = stage.map("filter", stage.shards, filter_shard)
        summary = stage.finish(total(results))

Under `mpirun -n 8 python -m mpi4py -m data.filter ...` item i belongs to rank i mod 8. An item's
result depends on the item alone, so the output is the same to the byte for any number of ranks. An
item's files move into place when its work is done, and a file under state/ says so: after a kill
the same command repeats only unfinished items.

.OUT.work/ holds result/ (OUT when all is done), scratch/ (what one map leaves for the next), state/
and a lock. OUT then holds the items' files, quarantine/ (file, position and reason of the
unreadable), lineage.json (script, hash of its code, arguments) and, written last, summary.json.
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

SHOWN = 3  # unreadable things that a run which fails shows: their folder goes with it
MAX_ITEMS = 100_000  # names are five digits wide, so that sorted names are the items' order


class Stage:
    """One run of a script, on all its ranks."""

    def __init__(self, config, shards: Iterable[Path], reads: Iterable[Path] = (), also: str = ""):
        """Take the script's dataclass, with a field `out`; its inputs; other files it reads; and
        on the first rank a hash of what else decides the output."""
        self.ranks, self.config, self.also = Ranks(), config, also
        self.shards, self.reads = [Path(p) for p in shards], [Path(p) for p in reads]
        self.out = Path(config.out).resolve()
        self.work = self.out.with_name(f".{self.out.name}.work")
        self.result, self.scratch = self.work / "result", self.work / "scratch"
        self.lock = ExitStack()

    def __enter__(self) -> "Stage":
        if self.ranks.rank == 0:
            self.prepare()
        self.ranks.gather(None)  # the folders are there before any rank goes on
        return self

    def prepare(self) -> None:
        """Lock OUT; keep an earlier run's work if it was the same, else start afresh."""
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
            print(f"going on with {self.work}", file=sys.stderr)

    def __exit__(self, kind, error, trace) -> None:
        if self.ranks.rank == 0:
            folder = self.result if kind else self.out
            for reason, n in reasons(quarantine(folder)).items():
                print(f"quarantined: {n:,} {reason}", file=sys.stderr)
            for line in itertools.islice(quarantine(folder), SHOWN if kind else 0):
                told = "  {path} at {position}: {reason} {start!r}".format(**line)
                print(printable(told), file=sys.stderr)
            # After a user's mistake another command comes; anything else may go on from here.
            if kind is None or issubclass(kind, UserError):
                self.forget()
                shutil.rmtree(self.work, ignore_errors=True)
            self.lock.close()

    def identify(self) -> dict:
        """Return what decides the output: an interrupted run goes on only if all is equal."""
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
        """Remove finished work; the identity first, so that no run goes on with half of it."""
        (self.work / "identity.json").unlink(missing_ok=True)
        for folder in ("state", "result", "scratch", "tmp"):
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def map(self, name: str, items: list, work: Callable[["Part"], dict | None]) -> list[dict]:
        """Return `work(part)` of every item, JSON dicts in the items' order, on every rank.

        `work` must depend on part.item and part.index alone. Items that an earlier run finished are
        not repeated.
        """
        if len(items) >= MAX_ITEMS:
            raise UserError(f"{len(items):,} input shards, want below {MAX_ITEMS:,}: join some")
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
        """Write `summary` with the quarantined counts, and give the folder its name."""
        if self.ranks.rank == 0:
            summary = {**summary, "quarantined": reasons(quarantine(self.result))}
            del self.identity["inputs"]  # times of files, which differ where their content does not
            write_json(self.result / "lineage.json", self.identity)
            write_json(self.result / "summary.json", summary)
            replace_folder(self.out, self.result)
        self.ranks.gather(None)  # no rank goes on before the folder is there
        return summary


class Part:
    """The work on one item: where it reads, writes, and reports what it cannot read."""

    def __init__(self, stage: Stage, name: str, index: int, item, bar: tqdm):
        self.stage, self.index, self.item, self.bar = stage, index, item, bar
        self.folder = stage.work / "tmp" / f"{name}-{index:05d}"
        shutil.rmtree(self.folder, ignore_errors=True)
        # Files written in these two appear under the same names in stage.result and stage.scratch.
        self.result, self.scratch = self.folder / "result", self.folder / "scratch"
        self.result.mkdir(parents=True)
        self.scratch.mkdir()
        self.name = f"shard-{index:05d}"

    def documents(self, path: Path | None = None, name: str = "") -> Iterator[dict]:
        """Yield the documents of `path` (default: the item), for origins named `name`.

        The unreadable go to quarantine.
        """
        path = Path(path or self.item)
        found = read_documents_of(path, lambda why, *at: self.bad(why, str(path), *at), name)
        for n, record in enumerate(found, 1):
            if n % 1000 == 0:
                self.bar.set_postfix_str(f"{n:,} documents of {path.name}")
            yield record

    def writer(self) -> DocumentFile:
        """Open result/shard-INDEX.jsonl.zst; without a document there is no file."""
        return DocumentFile(self.result / f"{self.name}.jsonl.zst")

    def bad(self, reason: str, path: str, position: int, what: bytes | str = b"") -> None:
        """Write down where something unreadable stands; a later map may tell it again."""
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
    """Add up dicts of numbers and of such dicts, with keys in the order of first sight."""
    added: dict = {}
    for count in counts:
        for key, value in count.items():
            if isinstance(value, dict):
                added[key] = total([added.get(key, {}), value])
            else:
                added[key] = added.get(key, 0) + value
    return added


def quarantine(folder: Path) -> Iterator[dict]:
    """Yield what was unreadable for an output: path, position, reason and what stands there."""
    files = sorted((folder / "quarantine").glob("*.jsonl"))
    return itertools.chain.from_iterable(map(read_jsonl, files))


def reasons(bad: Iterable[dict]) -> Counter:
    return Counter(line["reason"] for line in bad)


def files_in(path: Path) -> list[Path]:
    """Return [path] if it is a file, else all files under it, sorted."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def size_and_time(path: Path) -> tuple[int, int]:
    """Return the size and modification time (ns) of a file, zeros for a broken link."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
