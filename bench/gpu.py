"""A GPU's half hour as three commands, each of use alone, with the seconds that it may take:

    make gpu-check GPU_OUT=DIR   170   is each op right in bf16 and fp16; does train.py run, resume?
    make gpu-bench               540   training steps, ops and decoding, each beside its peers
    make gpu-tune                420   the fastest configurations, and a step with them

Without make: python3 -m bench.gpu --do=check --out=DIR. A command is groups of parts, in the
order of worth. The parts of a group run side by side, each a process group of its own, so that one
that fails, hangs or loses its CUDA context costs no other its turn; a group may take its own
seconds and those that earlier ones left. What parts print is shown as it comes. Their lines of JSON
are gathered in `out`/gpu.json, written as each part ends, and all that they said in
`out`/logs.tar.gz. It uses the Python that runs it, and installs nothing.
"""

import collections
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
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

from bench.ops import Row, ratios
from bench.timing import emit
from bench.tune import DROPOUT_OPS, OPS
from common.config import UserError, parse, run
from common.runlog import environment
from kernels.launch import TUNING_FILE

ROOT = Path(__file__).parents[1]
# What has tests for a GPU: files of which all count, and single tests.
TESTED = ["layernorm", "attention", "cross_entropy", "mlp", "block", "decode"]
ALONE = ["core/test_train.py::test_half_precision_resumes_bitwise",
         "bench/test_plan.py::test_memory_on_a_gpu"]  # fmt: skip
TOY = ["--vocab_size=96", "--seq_len=64", "--n_layer=1", "--n_head=2", "--width=64",
       "--mlp_width=128", "--rotary_dim=16", "--device=cpu", "--dtype=float16"]  # fmt: skip
SMI = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw,power.limit,temperature.gpu",
       "--format=csv,noheader"]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Check, measure or tune the kernels on this GPU."""

    do: str  # check, bench or tune
    out: Path = Path("out/gpu")  # folder for gpu.json, logs.tar.gz and tuning.json
    only: str = ""  # regular expression: run only the parts whose names it is found in
    toy: bool = False  # run all of it on a CPU at toy size: does it work? The times mean nothing

    def __post_init__(self):
        if self.do not in PLANS:
            raise UserError(f"do is {self.do!r}, want one of {', '.join(PLANS)}")
        if not (self.toy or torch.cuda.is_available()):
            raise UserError(f"gpu-{self.do}: no CUDA device here; --toy rehearses it on a CPU")


@dataclass
class Part:
    """A command, and what became of it."""

    name: str
    command: list[str]  # after the interpreter
    exit: int | None = None  # None until it has ended, and if it was ended by force
    seconds: float = 0.0
    gpu: str = ""  # what nvidia-smi said while it ran
    said: str = ""  # its last line that is no JSON
    rows: list[dict] = field(default_factory=list)  # its lines of JSON

    def start(self, logs: Path, prefix: str) -> None:
        print(f"{self.name}: {' '.join(self.command)}", flush=True)
        # pytest's workers, which this may run in, tell their children that they are workers too
        env = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *self.command], cwd=ROOT, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0, env=env,
        )  # fmt: skip
        log = logs / f"{self.name.replace(' ', '_')}.log"
        self.reader = threading.Thread(target=self.read, args=(log, prefix), daemon=True)
        self.reader.start()

    def read(self, log: Path, prefix: str) -> None:
        with open(log, "w", buffering=1) as f:
            for line in self.process.stdout:
                f.write(line)
                try:
                    self.rows.append(json.loads("{" + line.partition("{")[2]))  # behind dots
                except ValueError:
                    self.said = line.strip() or self.said
                    print(prefix + line, end="", flush=True)

    def finish(self, end: float) -> None:
        """Wait for it until `end`, then kill it and all that it started."""
        while self.process.poll() is None and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(min(left, 4))
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # none, or it hangs
                said = subprocess.run(SMI, capture_output=True, text=True, timeout=5).stdout
                self.gpu = said.strip() or self.gpu
        self.exit, self.seconds = self.process.poll(), round(time.monotonic() - self.began, 1)
        self.kill()
        self.reader.join(5)
        ended = "ended by force" if self.exit is None else f"exit {self.exit}"
        print(f"{self.name}: {ended} after {self.seconds} s\n", flush=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> dict:
        """For the record: rows, or tests as counts with what those said that did not pass."""
        found = {"exit": self.exit, "seconds": self.seconds, "gpu": self.gpu}
        found |= {"said": self.said} if self.exit != 0 else {}
        tests = {}
        for row in self.rows:
            if "test" in row and tests.get(row["test"], row)["outcome"] != "failed":
                tests[row["test"]] = row
        if not tests:  # times of what only warms caches mean nothing
            return found | {"rows": [] if self.name.startswith("warm") else self.rows}
        counts = collections.Counter(row["outcome"] for row in tests.values())
        kept = [
            r for r in tests.values() if r["outcome"] in ("failed", "unfinished") or "told" in r
        ]
        return found | {"tests": counts, "rows": kept}


def step(model: str, impl: str, toy: bool, *flags: str) -> Part:
    command = ["-m", "bench.step", f"configs/{model}.toml", f"--impl={impl}"]
    tiny = [*TOY, "--dtype=float32", "--micro_batch=2", "--steps=1"] * toy
    name = " ".join([model, impl, *flags]).replace("--", "")
    command += ["--dtype=bfloat16", "--json", "--micro_batch=8", "--kernels_shown=16"]
    return Part(name, [*command, *flags, *tiny])


def ops(name: str, toy: bool, *flags: str) -> Part:
    tiny = [*TOY, "--batch=1"] * toy
    op = f"--op={name.split()[0]}"
    return Part(name, ["-m", "bench.ops", op, "--json", *flags, *tiny])


def check(out: Path, toy: bool) -> list[tuple[int, list[Part]]]:
    """Compiling is most of it, so that many processes share the GPU."""
    files = [f"tests/{test}" for test in ALONE]
    files += [f"tests/kernels/test_{name}.py" for name in TESTED]
    command = ["-m", "pytest", "-q", "--override-ini=addopts=", "--tb=short", "-pbench.gpu"]
    if importlib.util.find_spec("xdist"):
        command += [f"-n{2 if toy else max(2, os.cpu_count() - 2)}", "--dist=worksteal"]
    toys = ["-k", "bfloat16 and cpu or layernorm and (bad_input or gpu)"] * toy
    return [(170, [Part("tests", [*command, *toys, *files])])]


def bench(out: Path, toy: bool) -> list[tuple[int, list[Part]]]:
    """First what Triton and torch.compile take longest for, side by side and at the same shapes."""
    phi1, small = (
        [step(model, impl, toy) for impl in ("ours", "torch", "transformers")]
        for model in ("phi1", "phi1_small")
    )
    phi1.insert(1, step("phi1", "ours", toy, "--dropout=0"))
    attention, block = ops("attention", toy), ops("block", toy)
    dropped = ops("attention dropout", toy, "--dropout=0.1")
    fp16 = ops("attention fp16", toy, "--op=attention_docs", "--dtype=float16")
    small_flags = {"bench.step": ["--n_layer=1", "--vocab_size=1024", "--steps=1"]}
    warm = [
        Part(f"warm {part.name}", part.command + small_flags.get(part.command[1], ["--warm"]))
        for part in [*phi1, *small, attention, block, dropped, fp16]
    ]
    decode = ["-m", "bench.decode", "configs/phi1.toml", "--batch=1", "--batch=64", "--json"]
    decode += ["--rounds=2", "--new_tokens=64", "--static=false"]
    decode += [*TOY, "--new_tokens=4"] * toy
    timed = list(zip((45, 40, 45, 50), phi1))
    timed += [(40, attention), (15, ops("layernorm", toy)), (30, dropped), (30, block)]
    timed += [(35, fp16), (20, ops("cross_entropy", toy)), (45, Part("decode", decode))]
    timed += list(zip((20, 25, 25), small))
    return [(75, warm), *((seconds, [part]) for seconds, part in timed)]


def tune(out: Path, toy: bool) -> list[tuple[int, list[Part]]]:
    """First every candidate is compiled, side by side; then an op a process; the step last.

    An op goes with dropout last: where a table or a choice serves both, it is phi-1's that counts.
    """
    found = out / "tuning.json"
    command = ["-m", "bench.tune", f"--out={found}", *[*TOY, "--batch=1"] * toy]
    todo = [(op, 0) for op in DROPOUT_OPS] + [(op, 0.1) for op in DROPOUT_OPS]
    todo += [(op, 0) for op in OPS if op not in DROPOUT_OPS]
    each = [
        Part(op + " dropout" * (p > 0), [*command, f"--op={op}", f"--dropout={p}"])
        for op, p in todo
    ]
    warm, after = Part("warm", [*command, "--warm"]), step("phi1", "ours", toy)
    return [(90, [warm]), *((28, [part]) for part in each), (50, [after])]


PLANS = {"check": check, "bench": bench, "tune": tune}


def run_plan(plan: list[tuple[int, list[Part]]], logs: Path, save) -> None:
    """Run the groups in turn, and `save` each part that has ended; leave nothing running."""
    end = time.monotonic()
    for seconds, group in plan:
        end, begun = end + seconds, []
        try:
            for part in group:
                part.start(logs, f"{part.name}: " * (len(group) > 1))
                begun.append(part)
            for part in group:
                part.finish(end)
                save(part)
        finally:
            for part in begun:
                part.kill()


# Pytest takes these with `-p bench.gpu`: a line of JSON for each test, when it begins and ends.


def pytest_runtest_logstart(nodeid):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        emit({"test": nodeid, "outcome": "unfinished"})


def pytest_runtest_logreport(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message if crash else str(report.longrepr or "")
    if "PYTEST_XDIST_WORKER" in os.environ:
        if report.failed and re.search(r"CUDA error|Error \[CUDA\]", why):
            os._exit(1)  # its context is dead; the tests to come get a process of their own
    elif report.when == "call" or not report.passed:
        told = dict(report.user_properties)
        emit({"test": report.nodeid, "outcome": report.outcome, "why": why[:200].strip()} | told)


def failures(record: dict) -> list[str]:
    """The parts that failed; what only warms caches may run out of time."""
    return [n for n, p in record["parts"].items() if p["exit"] != 0 and not n.startswith("warm")]


def table(record: dict) -> str:
    """The record in some forty lines: tests, ours beside the fastest peer, what failed."""
    lines = [", ".join(f"{k} {record[k]}" for k in ("device", "torch", "triton", "commit", "date"))]
    for name, part in record["parts"].items():
        rows, said = part["rows"], []
        if "tests" in part:
            said.append(", ".join(f"{n} {outcome}" for outcome, n in sorted(part["tests"].items())))
        measured = [Row(**r) for r in rows if "provider" in r]
        said += ratios(measured)
        said += {f"{r.op} {r.provider} {r.note or 'WRONG'}": 0 for r in measured
                 if r.provider.startswith("ours") and not r.ok}  # fmt: skip
        for r in rows:
            if "test" in r:
                said.append(" ".join(str(r.get(k, "")) for k in ("outcome", "test", "why", "told")))
            elif "tokens_per_s" in r:
                speed = f"{r['tokens_per_s']:>9,.0f} tokens/s {r.get('mfu', 0):>6.1%} MFU"
                memory = f"{r.get('peak_gib', 0):.0f} GiB"
                said.append(f"micro-batch {r['micro_batch']:<3}{speed} {memory}")
            elif "impl" in r:
                said.append(r["note"])
            elif "kernel" in r:
                found = f"{r.get('ms', 0):>8.3f} ms {r.get('gain', 0):>+7.1%}"
                said.append(f"{r['kernel']:<28}{found if 'ms' in r else 'NONE IS RIGHT'}")
            elif "takes" in r:
                said.append(f"takes {r['takes']}: triton {r['triton']}, cublas {r['cublas']} ms")
            for d in r.get("rows", []):  # of bench.decode
                speed = f"{d['tokens_per_s']:>9,.0f} tokens/s, the same tokens {d['same_frac']:.0%}"
                said.append(f"batch {d['batch']:<4}{d['impl']:<14}{speed}")
        lines += [f"{name:<24}{line}" for line in said]
    failed = [f"{n} ({record['parts'][n]['said'][:80]})" for n in failures(record)]
    return "\n".join(lines + [f"failed or ended by force: {'; '.join(failed)}"] * bool(failed))


def main() -> None:
    c = parse(Config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no part outlives it
    os.environ |= {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if c.toy else {}
    if not c.toy:
        os.environ.pop("TRITON_INTERPRET", None)
    c.out.mkdir(parents=True, exist_ok=True)
    if c.do == "tune":
        os.environ["NANOPHI_TUNING"] = str(
            shutil.copy(TUNING_FILE, c.out.resolve() / "tuning.json")
        )
    file = c.out / "gpu.json"
    records = json.loads(file.read_text()) if file.exists() else {}
    record = {"date": datetime.date.today().isoformat(), "triton": triton.__version__, "parts": {}}
    records[c.do] = record = environment() | record
    with tempfile.TemporaryDirectory() as logs:

        def save(part: Part) -> None:
            record["parts"][part.name] = part.outcome()
            file.write_text(json.dumps(records) + "\n")
            with tarfile.open(c.out / "logs.tar.gz", "w:gz") as tar:
                tar.add(logs, f"logs-{c.do}")

        plan = PLANS[c.do](c.out.resolve(), c.toy)
        plan = [(s, [p for p in group if re.search(c.only, p.name)]) for s, group in plan]
        run_plan(plan, Path(logs), save)
    print(table(record))
    sys.exit(bool(failures(record)))


if __name__ == "__main__":
    run(main)
