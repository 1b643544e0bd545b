"""A run's folder: whose it is, what it tells while it trains, and what a result is traced by."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from common.config import UserError
from common.files import write_json

# Dense bf16/fp16 peak in FLOP/s (NVIDIA's data sheets), by a word of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


class RunLog:
    """A run's folder in words: metrics.jsonl, events.jsonl, status.json; silent on ranks but 0.

    metrics.jsonl   one line of numbers each log_interval; what a resume repeats is dropped first
    events.jsonl    what happened, with its time: starts, skipped steps, failed saves, the end
    status.json     what the run is doing, or how it ended
    """

    def __init__(
        self, out: Path, rank: int, max_steps: int, tensorboard: bool, wandb: str, config: dict
    ):
        self.out, self.rank, self.path = out, rank, out / "metrics.jsonl"
        self.max_steps = max_steps
        self.terminal = sys.stdout.isatty()
        self.full = False  # the disk, when it was last written to
        self.sinks = []
        if tensorboard and rank == 0:
            self.sinks.append(_tensorboard(out))
        if wandb and rank == 0:
            self.sinks.append(_wandb(out, wandb, config))

    def go_on_from(self, step: int) -> None:
        """Drop what was logged after `step`, and the evaluation at it, which is made again."""
        if self.rank == 0:
            kept = [r for r in self.read() if r["step"] <= step - ("val_loss" in r)] if step else []
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
            temporary.replace(self.path)

    def read(self) -> list[dict]:
        """The records so far; a line that a kill or a full disk cut short is left out."""
        records = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def write(self, record: dict) -> None:
        self._append(self.path, record)
        for sink in self.sinks:
            sink(record)

    def event(self, what: str, step: int, **details) -> None:
        """Note that something happened. Keywords are JSON values."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._append(
            self.out / "events.jsonl", {"time": now, "event": what, "step": step} | details
        )

    def warn(self, what: str, step: int, message: str) -> None:
        """An event that the user should see."""
        self.event(what, step, message=message)
        self.line(message, keep=True)

    def status(self, status: str, step: int, **details) -> None:
        """Say how the run stands: running, done, "preempted, saved", or failed."""
        if self.rank == 0:
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            where = {"updated": now, "host": platform.node(), "pid": os.getpid()}
            record = {"status": status, "step": step, "max_steps": self.max_steps}
            try:
                write_json(self.out / "status.json", record | details | where)
            except OSError as e:
                self._complain(e)

    def line(self, text: str, keep: bool = False) -> None:
        """Show `text`: on a terminal in place of the line before, elsewhere only if `keep`."""
        if self.rank == 0 and (self.terminal or keep):
            end = "\n" if keep else ""
            print(("\r\x1b[K" if self.terminal else "") + text, end=end, flush=True)

    def _append(self, path: Path, record: dict) -> None:
        if self.rank == 0:
            try:
                with open(path, "a") as f:
                    f.write(json.dumps(record) + "\n")
                self.full = False
            except OSError as e:
                self._complain(e)

    def _complain(self, e: OSError) -> None:
        """A log that cannot be written is no reason to lose the run: say so once, and go on."""
        if not self.full:
            self.line(f"{e.filename or self.out}: {e.strerror}; the run goes on", keep=True)
        self.full = True


def _tensorboard(out: Path):
    """A function that writes a record's numbers to `out`/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard is not installed: pip install tensorboard") from None
    writer = SummaryWriter(out / "tensorboard")

    def write(record: dict) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, record["step"])

    return write


def _wandb(out: Path, project: str, config: dict):
    """A function that sends a record to Weights & Biases; a resumed run goes on there."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed: pip install wandb") from None
    name = f"{out.name}-{zlib.crc32(str(out.resolve()).encode()):08x}"
    run = wandb.init(project=project, id=name, resume="allow", dir=str(out), config=config)
    return lambda record: run.log(record, step=record["step"])


def open_run(c, mine: dict, resume: bool) -> Path | None:
    """Decide what to do with a run already in c.out; the checkpoint to resume from, or None."""
    saved = c.out / "config.json"
    if not saved.exists():
        if c.out.exists() and any(c.out.iterdir()):
            raise UserError(f"out {c.out} is there and holds no run; name a new folder")
        return None
    theirs = json.loads(saved.read_text())
    changed = [k for k in mine if mine[k] != theirs.get(k)]
    if changed and c.restart:
        shutil.rmtree(c.out)
        return None
    changed = [k for k in changed if k != "code"]  # mending code is no reason not to resume
    if not resume:
        raise UserError(f"out {c.out} already holds a run; --resume it, or name another --out")
    if changed:
        k = changed[0]
        raise UserError(
            f"cannot resume {c.out}: {k} was {theirs.get(k)!r} and is {mine[k]!r} now "
            f"({len(changed)} changed); name another --out, or --restart"
        )
    checkpoint.sweep(c.out)
    return checkpoint.newest_good(c.out)


def run_identity(c, tokenizer, windows, init_from: Path | None) -> dict:
    """All that shapes a run's result, as JSON values; how and where it runs is left out."""
    how = {"out", "resume", "restart", "micro_batch", "device", "threads", "keep", "log_interval",
           "keep_every", "max_skips", "recompute", "shard", "regather", "timeout_s", "tensorboard",
           "wandb"}  # fmt: skip
    here = Path(__file__).parents[1]
    files = ("train.py", "common/distributed.py", "model.py", "data/loader.py")
    code = b"".join((here / f).read_bytes() for f in files)
    return {k: v for k, v in plain(c).items() if k not in how} | {
        "tokenizer": tokenizer.fingerprint,
        "data_checksum": windows.checksum,
        "init_checksum": checkpoint.checksum(init_from) if init_from else None,
        "code": f"{zlib.crc32(code):08x}",
    }


def plain(c) -> dict:
    """The fields of `c` as JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(c).items()}


def peak_flops(device: torch.device) -> tuple[float, str]:
    """The roof for MFU in FLOP/s and what it is: a GPU's bf16 peak, else a matmul timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, peak in PEAK_FLOPS.items():
            if word in name:
                return peak, f"{name}, {peak / 1e12:.0f} TFLOP/s"
    n, best_s = 1024, math.inf
    a, out = torch.randn(n, n, device=device), torch.empty(n, n, device=device)
    until = time.perf_counter() + 0.3
    while (
        best_s is math.inf or time.perf_counter() < until
    ):  # others may be running: the best counts
        began = time.perf_counter()
        torch.mm(a, a, out=out)[0, 0].item()
        best_s = min(best_s, time.perf_counter() - began)
    rate = 2 * n**3 / best_s
    return rate, f"a {n} x {n} fp32 matmul measured here, {rate / 1e9:.0f} GFLOP/s"


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process had: of the GPU's, by tensors; without one, of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB


def environment() -> dict:
    """What a result needs to be traced: commit, versions, machine."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        here = Path(__file__).parents[1]
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(sys.argv),
    }
