"""A run's folder: whose it is, what it logs while it trains, and what a result is traced by."""

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
from common.code import code_hash
from common.config import UserError
from common.distributed import lost_rank
from common.files import read_json, write_json

# Dense bf16/fp16 peak in FLOP/s (NVIDIA's data sheets), by a word of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
MAX_SKIPS = 20  # stop after this many steps in a row whose gradients are not finite
# What a result does not depend on.
HOW = {"out", "resume", "restart", "check", "micro_batch", "eval_problems", "score_every", "device",
       "threads", "keep", "keep_every", "log_interval", "recompute", "shard", "regather",
       "timeout_s", "wandb"}  # fmt: skip


class RunLog:
    """Keep the time, and write a run's files on rank 0.

    metrics.jsonl   a line of numbers each log_interval; a resume drops what it repeats
    events.jsonl    starts, skipped steps, failed saves, the end
    status.json     how the run stands
    best.json       step and loss of the best evaluation
    """

    def __init__(self, c, ranks, resolved: dict):
        """Make the folder c.out, and write `resolved`, the run's configuration, to config.json."""
        self.c, self.out, self.ranks, self.first = c, c.out, ranks, ranks.rank == 0
        self.path, self.wandb = c.out / "metrics.jsonl", None
        self.terminal = sys.stdout.isatty()
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", resolved)
            self.wandb = start_wandb(c, resolved) if c.wandb else None

    def begin(self, state: checkpoint.RunState) -> None:
        """Drop what was logged after the state's step, and the evaluation that is repeated."""
        step = state.step
        records = []
        for line in self.path.read_text().splitlines() if step and self.path.exists() else []:
            with contextlib.suppress(ValueError):  # a line that a kill or a full disk cut short
                records.append(json.loads(line))
        kept = [r for r in records if r["step"] <= step - ("val_loss" in r)]
        if self.first:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
            temporary.replace(self.path)
        vals = [(r["val_loss"], r["step"]) for r in kept if "val_loss" in r]
        self.best = min(vals, default=(math.inf, 0))  # (val loss, step)
        self.skipped = int(state.guard.skipped)
        self.event("start", step, "running")
        self.last_step, self.began = step, time.perf_counter()

    def due(self, step: int) -> bool:
        """Return whether a line is due: before each checkpoint too, so that a resume repeats it."""
        c = self.c
        return not (step % c.log_interval and step % c.eval_interval and step != c.max_steps)

    def since_last(self, step: int) -> tuple[float, int]:
        """Return seconds and steps since the last log line."""
        return time.perf_counter() - self.began, step - self.last_step

    @contextlib.contextmanager
    def paused(self):
        """Leave the block's time out of `since_last`."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def training(self, record: dict, most_in_a_row: int) -> None:
        """Write a line of metrics, show it, and warn of skipped steps.

        Raises UserError if MAX_SKIPS steps in a row were skipped.
        """
        step, c = record["step"], self.c
        self.write(record)
        self.status("running", step)
        if self.first and self.terminal:  # in place of the line before
            left_tokens = (c.max_steps - step) * record["tokens"] / step
            left_min = left_tokens / max(record["tokens_per_s"], 0.1) / 60
            print(
                f"\r\x1b[Kstep {step:,}/{c.max_steps:,}  loss {record.get('loss', math.nan):.4f}  "
                f"lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tok/s  MFU "
                f"{record['mfu']:.1%}  {left_min:.1f} min left",
                end="", flush=True,
            )  # fmt: skip
        if more := record["skipped"] - self.skipped:
            self.warn("skipped", step, f"{more} steps up to {step:,} skipped: "
                      "their gradients were not finite")  # fmt: skip
        self.skipped = record["skipped"]
        if most_in_a_row >= MAX_SKIPS:
            raise UserError(
                f"the gradients of {most_in_a_row} steps in a row, up to step {step:,}, were "
                f"not finite; the checkpoints in {c.out} are from before: lower lr or grad_clip"
            )
        self.last_step, self.began = step, time.perf_counter()

    def validation(self, step: int, tokens: int, found: dict[str, float]) -> None:
        """Write what an evaluation found, "val_loss" for one, and best.json."""
        self.write({"step": step, "tokens": tokens} | found)
        self.best = min(self.best, (found["val_loss"], step))
        if self.first:
            write_json(self.out / "best.json", {"step": self.best[1], "val_loss": self.best[0]})
        values = "  ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in found.items())
        text = f"step {step:,}/{self.c.max_steps:,}  {values}"
        self.say(text + "  (best)" * (self.best[1] == step))

    def score(self, step: int, saver: checkpoint.Saver) -> dict[str, float]:
        """Return {"pass@1": of the checkpoint of `step` on c.eval_problems} if that is due.

        A process of its own measures it, on rank 0. If that fails, warn: stderr has what it said.
        """
        c = self.c
        if not (self.first and c.score_every) or step // c.eval_interval % c.score_every:
            return {}
        saver.wait()
        torch.cuda.empty_cache()  # the evaluator wants memory on the same GPU
        # Not named in one word, which would make the evaluator part of a run's identity (code.py).
        command = [sys.executable, "-m", f"eval.{'humaneval'}", f"--problems={c.eval_problems}",
                   f"--checkpoint={checkpoint.folder_of(self.out, step)}", f"--device={c.device}",
                   f"--self_check={self.out / 'self_check.json'}", "--json"]  # fmt: skip
        path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):  # the latter: no JSON
            done = subprocess.run(command, stdout=subprocess.PIPE, env=env, timeout=c.timeout_s / 2)
            return {"pass@1": json.loads(done.stdout)["pass@1"]}
        self.warn("score failed", step, f"eval.humaneval gave no pass@1 on {c.eval_problems} within"
                  f" {c.timeout_s / 2:.0f} s; the run goes on")  # fmt: skip
        return {}

    def stopped(self, step: int, number: int) -> None:
        """Say that a signal ended the run, and that it is saved."""
        self.event("stop", step, "preempted, saved", signal=number)
        self.say(f"signal {number}: saved at step {step:,}; --resume goes on from there")

    def finish(self, state: checkpoint.RunState, tokens_per_step: int) -> None:
        """Write summary.json, and say that the run is done."""
        (best_loss, best_step), tokens = self.best, state.step * tokens_per_step
        if self.first:
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
        self.event("done", state.step, "done")
        self.say(f"done: best val loss {best_loss:.4f} at step {best_step:,}, "
                 f"{state.trained_s / 60:.1f} min of training -> {self.out}")  # fmt: skip

    @contextlib.contextmanager
    def failures(self, state: checkpoint.RunState):
        """Record why the block failed, once what is being saved is on disk."""
        try:
            yield
        except Exception as e:
            state.saver.wait()  # a save begins before the evaluation that may have failed
            lost = lost_rank(e, self.ranks.rank)
            self.event("failed", state.step, "failed", error=str(lost or e))
            if lost:
                raise lost from e
            raise

    def write(self, record: dict) -> None:
        self._try(_append, self.path, record)
        if self.wandb:
            self.wandb.log(record, step=record["step"])

    def event(self, what: str, step: int, status: str = "", **details) -> None:
        """Note that something happened, and how the run then stands. `details` are JSON values."""
        record = {"time": _now(), "event": what, "step": step} | details
        self._try(_append, self.out / "events.jsonl", record)
        if status:
            self.status(status, step, **details)

    def warn(self, what: str, step: int, message: str) -> None:
        """Note something that the user should see."""
        self.event(what, step, message=message)
        self.say(message)

    def status(self, status: str, step: int, **details) -> None:
        """Say how the run stands: running, done, "preempted, saved", or failed."""
        record = {"status": status, "step": step, "max_steps": self.c.max_steps} | details
        record |= {"updated": _now(), "pid": os.getpid()}
        self._try(write_json, self.out / "status.json", record)

    def say(self, text: str) -> None:
        """Print `text`, on a terminal in place of the line that `training` left."""
        if self.first:
            print(("\r\x1b[K" if self.terminal else "") + text, flush=True)

    def _try(self, write, path: Path, record: dict) -> None:
        """A log that cannot be written is no reason to lose the run: say so, and go on."""
        if not self.first:
            return
        try:
            write(path, record)
        except OSError as e:
            self.say(f"{e.filename or self.out}: {e.strerror}; the run goes on")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _append(path: Path, record: dict) -> None:
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def start_wandb(c, config: dict):
    """Begin the run, or go on with it, in the Weights & Biases project that c.wandb names."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed: pip install wandb") from None
    name = f"{c.out.name}-{zlib.crc32(str(c.out.resolve()).encode()):08x}"  # for a resume
    return wandb.init(project=c.wandb, id=name, resume="allow", dir=str(c.out), config=config)


def open_run(c, mine: dict, resume: bool) -> Path | None:
    """Decide what to do with a run already in c.out; return the checkpoint to resume from."""
    saved = c.out / "config.json"
    if not saved.exists():
        if c.out.exists() and any(c.out.iterdir()):
            raise UserError(f"out {c.out} is there and holds no run; name a new folder")
        return None
    theirs = json.loads(saved.read_text())
    new = {f.name: f.default for f in dataclasses.fields(c)} | theirs  # options since that run
    changed = [k for k in mine if mine[k] != new.get(k)]
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
    return checkpoint.newest_good(c.out)


def dtype_before(run: Path) -> str | None:
    """Return the dtype in which a run has computed so far, None if there is no run."""
    return (read_json(run / "config.json", strict=False) or {}).get("compute_dtype")


def run_identity(c, tokenizer, windows, init_from: Path | None) -> dict:
    """Return all that shapes a run's result, as JSON values."""
    code = code_hash("train")
    if "NANOPHI_TUNING" in os.environ:  # read in place of kernels/tuning.json
        code += f"{zlib.crc32(Path(os.environ['NANOPHI_TUNING']).read_bytes()):08x}"
    return {k: v for k, v in plain(c).items() if k not in HOW} | {
        "tokenizer": tokenizer.fingerprint,
        "data_checksum": windows.checksum,
        "init_checksum": checkpoint.checksum(init_from) if init_from else None,
        "code": code,
    }


def plain(c) -> dict:
    """Return the fields of `c` as JSON values."""
    values = dataclasses.asdict(c)
    values |= {k: ", ".join(map(str, v)) for k, v in values.items() if isinstance(v, tuple)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Return the roof for MFU in FLOP/s and its name: a GPU's bf16 peak, or a matmul timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, peak in PEAK_FLOPS.items():
            if word in name:
                return peak, f"{name}, {peak / 1e12:.0f} TFLOP/s"
    n, times = 1024, []
    a = torch.randn(n, n, device=device)
    for _ in range(10):  # others may be running: the best counts
        began = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        times.append(time.perf_counter() - began)
    rate = 2 * n**3 / min(times)
    return rate, f"a {n} x {n} fp32 matmul measured here, {rate / 1e9:.0f} GFLOP/s"


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process had: of the GPU's, or without one of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB


def environment() -> dict:
    """Return what a result is traced by: commit, versions, machine."""
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
