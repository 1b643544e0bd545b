"""Run all GPU work in three commands, each useful alone; limits in seconds:

    make gpu-check GPU_OUT=DIR   170   check each op in bf16 and fp16, train.py and resume
    make gpu-bench               595   time training steps, ops and decoding against peers
    make gpu-tune                420   find the fastest configurations, time a step with them

Without make: python3 -m bench.gpu --do=check --out=DIR. Parts of a group run concurrently, each in
its own process group: one that fails or hangs does not cost the others their turn. A group may use
its own seconds plus what earlier groups left over. When a part ends, a summary is printed, its JSON
lines go to `out`/gpu.json, its full output to `out`/logs-check.tar.gz (logs-bench, logs-tune).
"""

import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

from common.config import UserError, parse, run
from common.runlog import environment
from kernels.launch import TUNING_FILE

ROOT = Path(__file__).parents[1]
# GPU tests: whole files and single tests
TESTED = ["kernels/test_layernorm.py", "kernels/test_attention.py", "kernels/test_cross_entropy.py",
          "kernels/test_mlp.py", "kernels/test_block.py", "kernels/test_decode.py",
          "kernels/test_fp8.py", "core/test_train.py::test_resume_is_bitwise",
          "bench/test_plan.py::test_memory_on_a_gpu"]  # fmt: skip
TOY = ["--vocab_size=96", "--seq_len=48", "--n_layer=1", "--n_head=2", "--width=64",
       "--mlp_width=128", "--rotary_dim=16", "--device=cpu", "--dtype=float16"]  # fmt: skip
SMI = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw,power.limit,temperature.gpu",
       "--format=csv,noheader"]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Check, time or tune the kernels on this GPU."""

    do: str  # check, bench or tune
    out: Path = Path("out/gpu")  # folder for gpu.json, logs and tuning.json
    only: str = ""  # regular expression: run only parts with a matching name
    toy: bool = False  # rehearse on a CPU at toy size; times mean nothing

    def __post_init__(self):
        if self.do not in PLANS:
            raise UserError(f"do is {self.do!r}, want one of {', '.join(PLANS)}")
        if not (self.toy or torch.cuda.is_available()):
            raise UserError(f"gpu-{self.do}: no CUDA device here; --toy rehearses it on a CPU")


@dataclass
class Part:
    """One command and its outcome."""

    name: str
    command: list[str]  # after the interpreter
    exit: int | None = None  # None while running, and if it was killed
    seconds: float = 0.0
    gpu: str = ""  # last nvidia-smi reading
    said: str = ""  # its last non-JSON line
    rows: list[dict] = field(default_factory=list)  # its JSON lines

    def start(self, logs: Path) -> None:
        self.log, self.began = logs / f"{self.name.replace(' ', '_')}.log", time.monotonic()
        # Under pytest-xdist children would inherit the worker flag
        env = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                process_group=0, env=env,
            )  # fmt: skip

    def finish(self, end: float) -> None:
        """Wait until `end`, then kill its process group; collect its output."""
        while self.process.poll() is None and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(min(left, 4))
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # missing or hangs
                said = subprocess.run(SMI, capture_output=True, text=True, timeout=5).stdout
                self.gpu = said.strip() or self.gpu
        self.exit, self.seconds = self.process.poll(), round(time.monotonic() - self.began, 1)
        self.kill()
        shown = []
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                self.rows.append(json.loads(line))
                shown += [self.rows[-1]["summary"]] if "summary" in self.rows[-1] else []
            else:
                self.said = line.strip() or self.said
                shown += [line[:200]] * line.startswith(("FAILED ", "ERROR "))  # pytest's
        ended = "killed" if self.exit is None else f"exit {self.exit}"
        last = f": {self.said[:80]}" if self.exit != 0 or not shown else ""
        for line in [*shown, f"{ended} after {self.seconds:.0f} s{last}"]:
            print(f"{self.name:<24}{line}", flush=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def step(model: str, impl: str, toy: bool, *flags: str) -> Part:
    command = ["-m", "bench.step", f"configs/{model}.toml", f"--impl={impl}", "--json", *flags]
    command += ["--dtype=bfloat16", "--micro_batch=8"]
    tiny = [*TOY, "--dtype=float32", "--micro_batch=2", "--steps=1"] * toy
    return Part(" ".join([model, impl, *flags]).replace("--", ""), command + tiny)


def ops(name: str, toy: bool, *flags: str) -> Part:
    tiny = [*TOY, "--batch=1"] * toy
    return Part(name, ["-m", "bench.ops", f"--op={name.split()[0]}", "--json", *flags, *tiny])


def check(out: Path, logs: Path, toy: bool) -> list[tuple[int, list[Part]]]:
    """Run the tests, one part per file. Compiling dominates, so many processes share the GPU."""
    command = ["-m", "pytest", "-v", "--override-ini=addopts=", "--tb=short", "-pbench.gpu"]
    if importlib.util.find_spec("xdist") and not toy:
        command += ["-n3", "--dist=worksteal"]
    command += ["-k", "gpu or bfloat16 and cpu or test_bad_input or test_linear"] * toy
    group = []
    for test in TESTED:
        name = Path(test.partition("::")[0]).stem.removeprefix("test_")
        group.append(Part(name, [*command, f"--junitxml={logs}/{name}.xml", f"tests/{test}"]))
    return [(170, group)]


def bench(out: Path, logs: Path, toy: bool) -> list[tuple[int, list[Part]]]:
    """Warm the slowest Triton and torch.compile builds concurrently, then time each part alone."""
    phi1, small = (
        [step(model, impl, toy) for impl in ("ours", "torch", "transformers")]
        for model in ("phi1", "phi1_small")
    )
    phi1.insert(1, step("phi1", "ours", toy, "--dropout=0"))
    if toy or torch.cuda.get_device_capability() >= (9, 0):
        phi1.append(step("phi1", "ours fp8", toy, "--dropout=0"))
    small.append(step("phi1_small", "ours", toy, "--optimizer=muon"))
    attention, block = ops("attention", toy), ops("block", toy)
    dropped = ops("attention dropout", toy, "--dropout=0.1")
    fp16 = ops("attention fp16", toy, "--op=attention_docs", "--dtype=float16")
    small_flags = {"bench.step": ["--n_layer=1", "--vocab_size=1024", "--steps=1"]}
    warm = [
        Part(f"warm {part.name}", part.command + small_flags.get(part.command[1], ["--warm"]))
        for part in [*phi1, *small, attention, block, dropped, fp16]
    ]
    decode = ["-m", "bench.decode", "configs/phi1.toml", "--batch=1", "--batch=64", "--json"]
    decode += ["--new_tokens=64", *[*TOY, "--new_tokens=4"] * toy]
    timed = list(zip((45, 40, 45, 50, 35), phi1))
    timed += [(40, attention), (15, ops("layernorm", toy)), (30, dropped), (30, block)]
    timed += [(35, fp16), (20, ops("cross_entropy", toy)), (45, Part("decode", decode))]
    timed += list(zip((20, 25, 25, 20), small))
    return [(75, warm), *((seconds, [part]) for seconds, part in timed)]


def tune(out: Path, logs: Path, toy: bool) -> list[tuple[int, list[Part]]]:
    """Compile every candidate concurrently, tune kernels by kind, then time a step.

    Dropout comes last: where one table or choice serves both, phi-1's setting wins.
    """
    command = ["-m", "bench.tune", f"--out={out / 'tuning.json'}"]
    command += [*TOY, "--batch=1", "--seq_len=16"] * toy
    kinds = {"attention": 40, "proj|gelu_bwd": 60, "layernorm|residual|gelu_fwd": 30}
    plan = [(90, [Part("warm", [*command, "--warm"])])]
    for p in (0, 0.1):
        for kind, seconds in kinds.items():
            flags = "--op=block", f"--kernel={kind}", f"--dropout={p}"
            plan.append((seconds, [Part(f"{kind} {p}", [*command, *flags])]))
    plan.append((20, [Part("cross_entropy", [*command, "--op=cross_entropy"])]))
    return [*plan, (50, [step("phi1", "ours", toy)])]


PLANS = {"check": check, "bench": bench, "tune": tune}


def run_plan(plan: list[tuple[int, list[Part]]], logs: Path, save) -> None:
    """Run the groups in turn and `save` each finished part; leave nothing running."""
    end = time.monotonic()
    for seconds, group in plan:
        end, begun = end + seconds, []
        try:
            for part in group:
                part.start(logs)
                begun.append(part)
            for part in group:
                part.finish(end)
                save(part)
        finally:
            for part in begun:
                part.kill()


def pytest_runtest_logreport(report):
    """Exit a pytest-xdist worker whose CUDA context is lost: later tests get a new one."""
    dead = report.failed and re.search(r"CUDA error|Error \[CUDA\]", report.longreprtext)
    if dead and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


def main() -> None:
    c = parse(Config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run_plan then kills its parts
    os.environ |= {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if c.toy else {}
    if not c.toy:
        os.environ.pop("TRITON_INTERPRET", None)
    out = c.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if c.do == "tune":
        os.environ["NANOPHI_TUNING"] = str(shutil.copy(TUNING_FILE, out / "tuning.json"))
    file, logs = out / "gpu.json", Path(tempfile.mkdtemp())
    records = json.loads(file.read_text()) if file.exists() else {}
    record = {"date": datetime.date.today().isoformat(), "triton": triton.__version__}
    records[c.do] = record = environment() | record | {"parts": {}}
    print(", ".join(f"{k} {record[k]}" for k in ("device", "torch", "triton", "commit", "date")))

    def save(part: Part) -> None:
        kept = ("exit", "seconds", "gpu", "said", "rows")
        record["parts"][part.name] = {name: getattr(part, name) for name in kept}
        file.write_text(json.dumps(records) + "\n")
        with tarfile.open(out / f"logs-{c.do}.tar.gz", "w:gz") as tar:
            tar.add(logs, f"logs-{c.do}")

    plan = PLANS[c.do](out, logs, c.toy)
    slower = 10 if c.toy else 1  # interpreter on a busy machine
    plan = [(slower * s, [p for p in g if re.search(c.only, p.name)]) for s, g in plan]
    run_plan(plan, logs, save)
    shutil.rmtree(logs)
    # warming caches may time out
    sys.exit(any(p["exit"] != 0 for n, p in record["parts"].items() if not n.startswith("warm")))


if __name__ == "__main__":
    run(main)
