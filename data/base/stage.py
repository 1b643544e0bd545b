"""What every data script shares: ranks, resuming, quarantine and lineage.

A script is a few maps over numbered items, most often over input shards:

    with Stage(config, shard_files(config.source)) as stage:
        results = stage.map("filter", stage.shards, filter_shard)
        summary = stage.finish(total(results))

Alone it is one process; under `mpirun -n 8 python -m mpi4py -m data.filter ...` item i belongs to
rank i mod 8. What an item gives depends on the item alone, so the output is the same to the byte
for any number of ranks. What an item wrote is moved into place when its work is done, and a file
under state/ says so: the same command after a kill repeats only what was unfinished, also with
another number of ranks. `-m mpi4py` makes an exception on one rank end the job; without it, the
other ranks would wait for ever.

    .OUT.work/result/     becomes OUT when all is done; one run at a time holds .OUT.work/lock
    .OUT.work/scratch/    what one map leaves for the next
    .OUT.work/state/      results of finished items

OUT then holds what the items wrote, quarantine/ (what could not be read: file, position, reason),
and, written last, lineage.json (script, code, arguments, hashes of what was read and written),
timing.json (the one file that differs from run to run) and summary.json.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from common.code import ROOT, code_hash
from common.config import UserError
from common.files import MARK, check_out, read_json, write_json
from data.base.documents import DocumentFile
from data.base.ranks import Ranks
from data.base.readers import read_documents_of

MAX_ITEMS = 100_000  # names are five digits wide, so that sorted names are the items' order


class Stage:
    """One run of a script, on all its ranks; see the head of this file."""

    def __init__(self, config, shards: Iterable[Path], reads: Iterable[Path] = ()):
        """`config` is the script's dataclass with a field `out`; `shards` are the input files.

        `reads` are further files and folders that shape the output, a tokenizer say.
        """
        self.ranks = Ranks()
        self.config, self.shards = config, [Path(p) for p in shards]
        self.out = Path(config.out).resolve()
        self.work = self.out.with_name(f".{self.out.name}.work")
        self.result, self.scratch = self.work / "result", self.work / "scratch"
        self.old = self.work / "old"  # what stood at OUT, for a moment
        self.reads = [file for path in reads for file in files_in(Path(path))]
        self.finished: list[dict] = []  # states of all maps' items
        self.read: set[str] = set()  # files that an earlier map read

    def __enter__(self) -> "Stage":
        self.began = time.perf_counter()
        if self.ranks.rank == 0:
            check_out(self.config.out, [*self.shards, *self.reads])
            self.work.mkdir(parents=True, exist_ok=True)
            (self.work / MARK).touch()
            self.lock = lock(self.work / "lock", self.config.out)
            if self.old.exists() and not self.out.exists():  # killed between the two renames
                self.old.rename(self.out)
            identity = self.identity()
            known = read_json(self.work / "identity.json", strict=False)
            if known != identity or not self.result.exists():
                self.forget()
                write_json(self.work / "identity.json", identity)
            shutil.rmtree(self.work / "tmp", ignore_errors=True)
            for folder in ("result", "scratch", "state", "tmp"):
                (self.work / folder).mkdir(exist_ok=True)
            (self.result / MARK).touch()
            if any((self.work / "state").iterdir()):
                print(f"going on with {self.work}", file=sys.stderr)
        self.ranks.gather(None)  # the folders are there before any rank goes on
        return self

    def __exit__(self, kind, error, trace) -> None:
        # A mistake of the user's is mended by another command; anything else may go on from here.
        if self.ranks.rank == 0:
            if kind is not None:
                self.report_quarantined()
            if kind is None or issubclass(kind, UserError):
                self.forget()
                shutil.rmtree(self.work, ignore_errors=True)
            os.close(self.lock)

    def forget(self) -> None:
        """Remove what was done; the identity first, as with half of the rest none can go on."""
        (self.work / "identity.json").unlink(missing_ok=True)
        for folder in ("state", "result", "scratch", "tmp", "old"):
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def map(
        self, name: str, items: list, work: Callable[["Part"], dict | None], first: int = 0
    ) -> list[dict]:
        """Return `work(part)` of every item, JSON dicts in the items' order, on every rank.

        Items are dealt over the ranks, so `work` must depend on part.item and part.index alone.
        Where an item was finished by an earlier run, its result is read instead. Indices count from
        `first`, for a map in several calls.
        """
        if first + len(items) >= MAX_ITEMS:
            raise UserError(f"{len(items):,} input shards, want below {MAX_ITEMS:,}: join some")
        mine = range(self.ranks.rank, len(items), self.ranks.size)
        paths = all(isinstance(item, Path) for item in items)
        sizes = [items[i].stat().st_size if paths else 1 for i in mine]
        unit = {"unit": "B", "unit_scale": True} if paths else {}
        quiet = None if self.ranks.rank == 0 else True
        done: dict[int, dict] = {}
        with tqdm(desc=name, total=sum(sizes), disable=quiet, **unit) as bar:
            for i, size in zip(mine, sizes):
                path = self.work / "state" / f"{name}-{first + i:05d}.json"
                state, before = self.finished_item(path), bar.n
                if state is None:
                    part = Part(
                        self, name, first + i, items[i], bar.update if paths else lambda n: None
                    )
                    state = part.close(work(part))
                    write_json(path, state)
                done[i] = state
                bar.update(before + size - bar.n)  # what was read of it has been shown
        states = self.ranks.gather_items(done)
        self.finished += states
        self.read |= {i["path"] for state in states for i in state["inputs"]}
        return [state["result"] for state in states]

    def finish(self, summary: dict) -> dict:
        """Add what was quarantined to `summary`, write it and give the folder its name."""
        summary = {**summary, "quarantined": self.quarantined()}
        if self.ranks.rank == 0:
            inputs = {i["path"]: i for state in self.finished for i in state["inputs"]}
            seconds = time.perf_counter() - self.began
            read_mb = sum(i["bytes"] for i in inputs.values()) / 1e6
            timing = {
                "seconds": round(seconds, 2),
                "ranks": self.ranks.size,
                "input_mb_per_s": round(read_mb / seconds, 3),
            }
            outputs = {o["path"]: o for state in self.finished for o in state["outputs"]}
            for file in files_in(self.result):
                inside = file.relative_to(self.result).as_posix()
                if inside != MARK and inside not in outputs:  # the first rank wrote it itself
                    outputs[inside] = describe(file) | {"path": inside}
            lineage = {
                **{k: v for k, v in self.identity().items() if k != "stat"},
                "inputs": [*map(describe, self.reads), *inputs.values()],
                "outputs": list(outputs.values()),
            }
            write_json(self.result / "timing.json", timing)
            write_json(self.result / "lineage.json", lineage)
            write_json(self.result / "summary.json", summary)
            self.report_quarantined()
            if self.out.exists():
                self.out.rename(self.old)
            self.result.rename(self.out)
        self.ranks.gather(None)  # no rank goes on before the folder is there
        return summary

    def quarantined(self) -> dict[str, int]:
        """Return how much could not be read, by reason."""
        return total([state["quarantined"] for state in self.finished])

    def report_quarantined(self) -> None:
        for reason, n in self.quarantined().items():
            print(f"quarantined: {n:,} {reason}", file=sys.stderr)

    def identity(self) -> dict:
        """Return what decides the output: an interrupted run goes on only if all is equal."""
        script = Path(sys.modules[type(self.config).__module__].__file__).resolve()
        arguments = {k: plain(v) for k, v in dataclasses.asdict(self.config).items() if k != "out"}
        stats = [(str(p), *size_and_time(p)) for p in self.shards + self.reads]
        return {
            "script": script.relative_to(ROOT).as_posix(),
            "code": code_hash(script),
            "python": platform.python_version(),
            "arguments": arguments,
            "stat": hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest(),
        }

    def finished_item(self, path: Path) -> dict | None:
        """Return the state of an item that was finished before, if its files are whole."""
        state = read_json(path, strict=False)
        for output in state["outputs"] if state else []:
            file = self.result / output["path"]
            if not file.exists() or file.stat().st_size != output["bytes"]:
                return None
        return state


class Part:
    """The work on one item: where it reads, writes, and says what it cannot read."""

    def __init__(self, stage: Stage, name: str, index: int, item, progress: Callable[[int], None]):
        self.stage, self.index, self.item, self.progress = stage, index, item, progress
        self.folder = stage.work / "tmp" / f"{name}-{index:05d}"
        shutil.rmtree(self.folder, ignore_errors=True)
        # Files written in these two appear under the same names in stage.result and stage.scratch.
        self.result, self.scratch = self.folder / "result", self.folder / "scratch"
        self.result.mkdir(parents=True)
        self.scratch.mkdir()
        self.name = f"shard-{index:05d}"
        self.inputs: list[dict] = []
        self.small = {"files": 0, "bytes": 0, "blake2b": hashlib.blake2b(digest_size=16)}
        self.quarantined: dict[str, int] = {}
        self._quarantine = None

    def documents(
        self, path: Path | None = None, name: str = "", on_bad: Callable[[str], None] = len
    ) -> Iterator[dict]:
        """Yield the documents of `path` (default: the item); what is bad goes to quarantine.

        `name` is the file's in the origins of documents that have none, and `on_bad` is told the
        reason of what is bad too.
        """
        path = path or self.item
        again = str(path) in self.stage.read or path.is_relative_to(self.stage.work)
        if not again:
            self.inputs.append(describe(path))

        def bad(reason: str, position: int, what: bytes | str) -> None:
            if not again:  # an earlier map has counted it
                self.bad(reason, str(path), position, what)
            on_bad(reason)

        yield from read_documents_of(path, bad, self.progress, name)

    def read(self, path: Path) -> bytes:
        """Read a file that is one of many: lineage has one hash for all of an item's."""
        content = path.read_bytes()
        self.small["files"] += 1
        self.small["bytes"] += len(content)
        self.small["blake2b"].update(content)
        return content

    def writer(self) -> DocumentFile:
        """Open result/shard-INDEX.jsonl.zst, a file that is there if it has a document."""
        return DocumentFile(self.result / f"{self.name}.jsonl.zst")

    def bad(self, reason: str, path: str, position: int, what: bytes | str = b"") -> None:
        """Count something that cannot be read, and write down where it stands."""
        self.quarantined[reason] = self.quarantined.get(reason, 0) + 1
        if self._quarantine is None:
            folder = self.result / "quarantine"
            folder.mkdir(exist_ok=True)
            file = folder / f"{self.folder.name}.jsonl"
            self._quarantine = open(file, "w", encoding="utf-8")  # noqa: SIM115, closed by close
        what = (
            what[:200] if isinstance(what, bytes) else what[:200].encode(errors="backslashreplace")
        )
        line = {"path": path, "position": position, "reason": reason}
        line["start"] = what.decode(errors="backslashreplace")
        self._quarantine.write(json.dumps(line) + "\n")

    def close(self, result: dict | None) -> dict:
        """Move what was written into place; the item's state."""
        if self._quarantine:
            self._quarantine.close()
        outputs = []
        for name in ("result", "scratch"):
            for file in files_in(self.folder / name):
                inside = file.relative_to(self.folder / name)
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
                if name == "result":
                    outputs.append(describe(file) | {"path": inside.as_posix()})
                target = self.stage.work / name / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        shutil.rmtree(self.folder)
        if self.small["files"]:
            digest = self.small["blake2b"].hexdigest()
            self.inputs.append({"path": self.folder.name, **self.small, "blake2b": digest})
        return {
            "result": result or {},
            "inputs": self.inputs,
            "outputs": outputs,
            "quarantined": self.quarantined,
        }


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


def lock(path: Path, out: Path) -> int:
    """Return an open file that no other process can lock until this one ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(f"--out {out}: another run is writing it; wait for its end") from None
    return descriptor


def describe(path: Path) -> dict:
    """Return the path, size in bytes and hash of a file, for lineage."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "blake2b": digest}


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


def plain(value):
    """Return `value` as JSON stores it: tuples as lists, paths and the like as strings."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
