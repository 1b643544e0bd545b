"""A run's folder: whose it is, what it tells while it trains, and what a result is traced by."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections import deque
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from common.code import code_hash
from common.config import UserError
from common.distributed import lost_rank
from common.files import write_json

# Dense bf16/fp16 peak in FLOP/s (NVIDIA's data sheets), by a word of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
SPIKE_LINES = 10  # log lines whose median a loss spike is measured from


class RunLog:
    """A run's folder in words: metrics.jsonl, events.jsonl, status.json; silent on ranks but 0.

    metrics.jsonl   one line of numbers each log_interval; what a resume repeats is dropped first
    events.jsonl    what happened, with its time: starts, skipped steps, failed saves, the end
    status.json     what the run is doing, or how it ended
    best.json       step and loss of the best evaluation

    It keeps the time too: of the steps since the last log line, less what runs in `paused`.
    """

    def __init__(self, c, ranks, resolved: dict):
        """Make the folder c.out, and write `resolved`, the run's configuration, to config.json."""
        self.c, self.out, self.rank, self.ranks = c, c.out, ranks.rank, ranks
        self.commit = resolved["commit"]
        self.path, self.sinks = c.out / "metrics.jsonl", []
        self.terminal = sys.stdout.isatty()
        self.full = False  # the disk, when it was last written to
        if self.rank:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "config.json", resolved)
        if c.tensorboard:
            self.sinks.append(_tensorboard(self.out))
        if c.wandb:
            self.sinks.append(_wandb(self.out, c.wandb, resolved))

    def begin(self, state: checkpoint.RunState) -> None:
        """Drop what was logged after the state's step, and the evaluation that is repeated."""
        step = state.step
        if self.rank == 0:
            kept = [r for r in self.read() if r["step"] <= step - ("val_loss" in r)] if step else []
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
            temporary.replace(self.path)
        logged = self.ranks.from_first(self.read)
        self.losses = deque((r["loss"] for r in logged if "loss" in r), maxlen=SPIKE_LINES)
        vals = [(r["val_loss"], r["step"]) for r in logged if "val_loss" in r]
        self.best = min(vals, default=(math.inf, 0))  # (val loss, step)
        self.skipped = int(state.guard.skipped)
        self.event("start", step, world_size=self.ranks.world_size, restarts=self.ranks.restarts,
                   commit=self.commit)  # fmt: skip
        self.status("running", step)
        self.last_step, self.began = step, time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether a line is due: before each checkpoint too, so that a resumed run has the same."""
        c = self.c
        return not (step % c.log_interval and step % c.eval_interval and step != c.max_steps)

    def since_last(self, step: int) -> tuple[float, int]:
        """Return seconds and steps since the last log line."""
        return time.perf_counter() - self.began, step - self.last_step

    @contextlib.contextmanager
    def paused(self):
        """Leave out of the time what runs in the block."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def training(self, record: dict, most_in_a_row: int) -> None:
        """Write a line of metrics, show it, and warn of skipped steps and of a loss spike.

        Raises UserError if c.max_skips steps in a row were skipped.
        """
        step, c = record["step"], self.c
        self.write(record)
        self.status("running", step)
        left_tokens = (c.max_steps - step) * record["tokens"] / step
        left_min = left_tokens / max(record["tokens_per_s"], 0.1) / 60
        self.line(
            f"step {step:,}/{c.max_steps:,}  loss {record.get('loss', math.nan):.4f}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tok/s  "
            f"MFU {record['mfu']:.1%}  {left_min:.1f} min left"
        )
        if more := record["skipped"] - self.skipped:
            self.warn("skipped", step, f"{more} steps up to {step:,} skipped: "
                      "their gradients were not finite")  # fmt: skip
        self.skipped = record["skipped"]
        if most_in_a_row >= c.max_skips:
            raise UserError(
                f"the gradients of {most_in_a_row} steps in a row, up to step {step:,}, were "
                f"not finite; the checkpoints in {c.out} are from before: lower lr or grad_clip"
            )
        if "loss" in record:
            full = len(self.losses) == SPIKE_LINES
            usual = statistics.median(self.losses) if full else math.inf
            if c.spike_nats and record["loss"] > usual + c.spike_nats:
                self.warn("spike", step, f"the loss rose to {record['loss']:.3f} at step {step:,}, "
                          f"from about {usual:.3f}")  # fmt: skip
            self.losses.append(record["loss"])
        self.last_step, self.began = step, time.perf_counter()

    def validation(self, step: int, tokens: int, val_loss: float) -> None:
        """Write a validation loss, and best.json."""
        self.write({"step": step, "tokens": tokens, "val_loss": val_loss})
        self.best = min(self.best, (val_loss, step))
        if self.rank == 0:
            write_json(self.out / "best.json", {"step": self.best[1], "val_loss": self.best[0]})
        text = f"step {step:,}/{self.c.max_steps:,}  val loss {val_loss:.4f}"
        self.say(text + "  (best)" * (self.best[1] == step))

    def stopped(self, step: int, number: int) -> None:
        """Say that a signal ended the run, which is saved."""
        self.event("stop", step, signal=number)
        self.status("preempted, saved", step)
        self.say(f"signal {number}: saved at step {step:,}; --resume goes on from there")

    def finish(self, state: checkpoint.RunState, tokens_per_step: int) -> None:
        """Write summary.json, and say that the run is done."""
        (best_loss, best_step), tokens = self.best, state.step * tokens_per_step
        if self.rank == 0:
            write_json(self.out / "summary.json", {
                "steps": state.step,
                "tokens": tokens,
                "best_step": best_step,
                "best_val_loss": best_loss,
                "trained_s": round(state.trained_s, 1),
                "tokens_per_s": round(tokens / max(state.trained_s, 1e-9), 1),
                "skipped": int(state.guard.skipped),
                "weights": checkpoint.checksum(checkpoint.find(self.out, newest=True)),
            })  # fmt: skip
        self.event("done", state.step)
        self.status("done", state.step)
        self.say(f"done: best val loss {best_loss:.4f} at step {best_step:,}, "
                 f"{state.trained_s / 60:.1f} min of training -> {self.out}")  # fmt: skip

    @contextlib.contextmanager
    def failures(self, state: checkpoint.RunState):
        """Record how a run failed if the block does, when what is being saved is on disk."""
        try:
            yield
        except Exception as e:
            state.saver.wait()  # a save begins before the evaluation that may have failed
            lost = lost_rank(e, self.rank)
            self.event("failed", state.step, error=str(lost or e))
            self.status("failed", state.step, error=str(lost or e))
            if lost:
                raise lost from e
            raise

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
        self.say(message)

    def status(self, status: str, step: int, **details) -> None:
        """Say how the run stands: running, done, "preempted, saved", or failed."""
        if self.rank == 0:
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            where = {"updated": now, "host": platform.node(), "pid": os.getpid()}
            record = {"status": status, "step": step, "max_steps": self.c.max_steps}
            try:
                write_json(self.out / "status.json", record | details | where)
            except OSError as e:
                self._complain(e)

    def line(self, text: str) -> None:
        """Show `text` on a terminal, in place of the line before."""
        if self.rank == 0 and self.terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)

    def say(self, text: str) -> None:
        """Print `text`, on a terminal in place of a line that `line` left."""
        if self.rank == 0:
            print(("\r\x1b[K" if self.terminal else "") + text, flush=True)

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
            self.say(f"{e.filename or self.out}: {e.strerror}; the run goes on")
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
    code = code_hash("train")
    if "NANOPHI_TUNING" in os.environ:  # read in place of kernels/tuning.json
        code += f"{zlib.crc32(Path(os.environ['NANOPHI_TUNING']).read_bytes()):08x}"
    return {k: v for k, v in plain(c).items() if k not in how} | {
        "tokenizer": tokenizer.fingerprint,
        "data_checksum": windows.checksum,
        "init_checksum": checkpoint.checksum(init_from) if init_from else None,
        "code": code,
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
