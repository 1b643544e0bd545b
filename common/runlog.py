"""The run folder: ownership and resume, logs, provenance."""

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

# Dense bf16/fp16 peak in FLOP/s (NVIDIA's data sheets), by a word in the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
MAX_SKIPS = 20  # stop after this many consecutive steps with non-finite gradients
# Options that do not affect the result.
HOW = {"out", "resume", "restart", "check", "micro_batch", "eval_problems", "score_every", "device",
       "threads", "keep", "keep_every", "log_interval", "recompute", "shard", "regather",
       "timeout_s", "wandb"}  # fmt: skip


class RunLog:
    """Timer of the training loop and, on rank 0, writer of the run's files.

    metrics.jsonl   one line per log_interval and evaluation; a resume drops the lines it repeats
    events.jsonl    starts, skipped steps, failed saves, the end
    status.json     current state of the run
    best.json       step and loss of the best evaluation
    """

    def __init__(self, c, ranks, resolved: dict):
        """Create the folder c.out and write `resolved`, the run's config, to config.json."""
        self.c, self.out, self.ranks, self.first = c, c.out, ranks, ranks.rank == 0
        self.path, self.wandb = c.out / "metrics.jsonl", None
        self.terminal = sys.stdout.isatty()
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", resolved)
            self.wandb = start_wandb(c, resolved) if c.wandb else None

    def begin(self, state: checkpoint.RunState) -> None:
        """Drop metrics logged after the state's step, and the evaluation to repeat there."""
        step = state.step
        records = []
        for line in self.path.read_text().splitlines() if step and self.path.exists() else []:
            with contextlib.suppress(ValueError):  # a line truncated by a kill or a full disk
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
        """Return whether a log line is due, which also holds at every checkpoint and at the end."""
        c = self.c
        return not (step % c.log_interval and step % c.eval_interval and step != c.max_steps)

    def since_last(self, step: int) -> tuple[float, int]:
        """Return seconds and steps since the last log line."""
        return time.perf_counter() - self.began, step - self.last_step

    @contextlib.contextmanager
    def paused(self):
        """Exclude the block's time from `since_last`."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def training(self, record: dict, most_in_a_row: int) -> None:
        """Log and show a line of metrics, and warn about skipped steps.

        Raise UserError if MAX_SKIPS steps in a row were skipped.
        """
        step, c = record["step"], self.c
        self.write(record)
        self.status("running", step)
        if self.first and self.terminal:  # overwrite the previous line
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
                f"the gradients of {most_in_a_row} steps in a row, up to step {step:,}, were not "
                f"finite; the checkpoints in {c.out} predate them: --init_from one, "
                "with a new --out and a lower --lr or --grad_clip"
            )
        self.last_step, self.began = step, time.perf_counter()

    def validation(self, step: int, tokens: int, found: dict[str, float]) -> None:
        """Log an evaluation's results (`found["val_loss"]` is required); update best.json."""
        self.write({"step": step, "tokens": tokens} | found)
        self.best = min(self.best, (found["val_loss"], step))
        if self.first:
            write_json(self.out / "best.json", {"step": self.best[1], "val_loss": self.best[0]})
        values = "  ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in found.items())
        text = f"step {step:,}/{self.c.max_steps:,}  {values}"
        self.say(text + "  (best)" * (self.best[1] == step))

    def score(self, step: int, saver: checkpoint.Saver) -> dict[str, float]:
        """Return {"pass@1": ...} for the checkpoint of `step` on c.eval_problems, if it is due.

        Rank 0 runs eval.humaneval as a subprocess, and shows its stderr; if it fails, warn.
        """
        c = self.c
        if not (self.first and c.score_every) or step // c.eval_interval % c.score_every:
            return {}
        saver.wait()
        torch.cuda.empty_cache()  # the evaluator shares this GPU
        # Split the name so that code.py does not count the evaluator in the run's identity.
        command = [sys.executable, "-m", f"eval.{'humaneval'}", f"--problems={c.eval_problems}",
                   f"--checkpoint={checkpoint.folder_of(self.out, step)}", f"--device={c.device}",
                   f"--self_check={self.out / 'self_check.json'}", "--json"]  # fmt: skip
        path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):  # ValueError: not JSON
            done = subprocess.run(command, stdout=subprocess.PIPE, env=env, timeout=c.timeout_s / 2)
            return {"pass@1": json.loads(done.stdout)["pass@1"]}
        self.warn("score failed", step, f"eval.humaneval gave no pass@1 on {c.eval_problems} within"
                  f" {c.timeout_s / 2:.0f} s; the run continues")  # fmt: skip
        return {}

    def stopped(self, step: int, number: int) -> None:
        """Record and report that a signal stopped the run after a save."""
        self.event("stop", step, "preempted, saved", signal=number)
        self.say(f"signal {number}: saved at step {step:,}; --resume continues from there")

    def finish(self, state: checkpoint.RunState, tokens_per_step: int) -> None:
        """Write summary.json and report that the run is done."""
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
        """Record why the block failed, after any save in progress."""
        try:
            yield
        except Exception as e:
            state.saver.wait()  # an evaluation may fail while its step is being saved
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
        """Append to events.jsonl and, if given, update the status. `details` are JSON values."""
        record = {"time": _now(), "event": what, "step": step} | details
        self._try(_append, self.out / "events.jsonl", record)
        if status:
            self.status(status, step, **details)

    def warn(self, what: str, step: int, message: str) -> None:
        """Record an event and print `message`."""
        self.event(what, step, message=message)
        self.say(message)

    def status(self, status: str, step: int, **details) -> None:
        """Write status.json; `status` is running, done, "preempted, saved" or failed."""
        record = {"status": status, "step": step, "max_steps": self.c.max_steps} | details
        record |= {"updated": _now(), "pid": os.getpid()}
        self._try(write_json, self.out / "status.json", record)

    def say(self, text: str) -> None:
        """Print `text` on rank 0; on a terminal, overwrite the progress line of `training`."""
        if self.first:
            print(("\r\x1b[K" if self.terminal else "") + text, flush=True)

    def _try(self, write, path: Path, record: dict) -> None:
        """Write a log record on rank 0; on failure report it, but do not end the run."""
        if not self.first:
            return
        try:
            write(path, record)
        except OSError as e:
            self.say(f"{e.filename or self.out}: {e.strerror}; the run continues")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _append(path: Path, record: dict) -> None:
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def start_wandb(c, config: dict):
    """Start or resume the run in the Weights & Biases project c.wandb."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed: pip install wandb") from None
    name = f"{c.out.name}-{zlib.crc32(str(c.out.resolve()).encode()):08x}"  # the same on a resume
    return wandb.init(project=c.wandb, id=name, resume="allow", dir=str(c.out), config=config)


def open_run(c, mine: dict, resume: bool) -> Path | None:
    """Check c.out for an existing run; return the checkpoint to resume from, or None.

    Raise UserError if c.out holds other files, or a run that may not be resumed or replaced.
    """
    saved = c.out / "config.json"
    if not saved.exists():
        if c.out.exists() and any(c.out.iterdir()):
            raise UserError(f"out {c.out} exists and holds no run; use a new folder")
        return None
    theirs = json.loads(saved.read_text())
    new = {f.name: f.default for f in dataclasses.fields(c)} | theirs  # default for newer options
    changed = [k for k in mine if mine[k] != new.get(k)]
    if changed and c.restart:
        shutil.rmtree(c.out)
        return None
    changed = [k for k in changed if k != "code"]  # a code fix must not prevent a resume
    if not resume:
        raise UserError(f"out {c.out} already holds a run; --resume it, or use another --out")
    if changed:
        k = changed[0]
        raise UserError(
            f"cannot resume {c.out}: {k} was {theirs.get(k)!r} and is {mine[k]!r} now "
            f"({len(changed)} changed); use another --out, or --restart"
        )
    return checkpoint.newest_good(c.out)


def dtype_before(run: Path) -> str | None:
    """Return the compute dtype of an existing run, or None."""
    return (read_json(run / "config.json", strict=False) or {}).get("compute_dtype")


def run_identity(c, tokenizer, windows, init_from: Path | None) -> dict:
    """Return everything a run's result depends on, as JSON values."""
    code = code_hash("train")
    if "NANOPHI_TUNING" in os.environ:  # replaces kernels/tuning.json
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
    """Return (peak FLOP/s for MFU, its name): a GPU's bf16 peak, or a matmul timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, peak in PEAK_FLOPS.items():
            if word in name:
                return peak, f"{name}, {peak / 1e12:.0f} TFLOP/s"
    n, times = 1024, []
    a = torch.randn(n, n, device=device)
    for _ in range(10):  # other programs may be running: take the best
        began = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        times.append(time.perf_counter() - began)
    rate = 2 * n**3 / min(times)
    return rate, f"a {n} x {n} fp32 matmul measured here, {rate / 1e9:.0f} GFLOP/s"


def peak_memory_gib(device: torch.device) -> float:
    """Return peak GiB: the CUDA allocator's peak, or the process's RSS on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB


def environment() -> dict:
    """Return the provenance of a result: commit, versions, machine."""
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
