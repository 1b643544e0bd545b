"""Find the fastest configuration of every kernel on this GPU and write them to `out`.

    python -m bench.tune [--kernel=attention] [--dropout=0.1] [--out=out/tuning.json]
    NANOPHI_TUNING=out/tuning.json python -m bench.step configs/phi1.toml      time a step with them
    cp out/tuning.json kernels/tuning.json                                keep them

A model block and the loss run forward and backward to record which kernels they launch. There the
profiler times every candidate of a kernel's table, other kernels held fixed; the fastest correct
one goes first. Then each GEMM with two versions is timed inside the block: mlp.py takes the faster
one on devices of this capability. `out` is read if it exists and written after each kernel.
"""

import json
import math
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from bench import ops
from bench.launches import KERNELS
from bench.ops import Judge, copies, forward, whole
from bench.table import Table
from bench.timing import make_timer, profile, wall_ms
from common.config import parse, run
from kernels import launch, mlp
from kernels.launch import LAUNCHED, TUNING, write_tuning

OPS = ("block", "cross_entropy")
VERSIONS = ("triton", "cublas")


@dataclass(frozen=True)
class Config(ops.Config):
    """Time every configuration on this GPU, by default at phi-1's shape."""

    op: tuple[str, ...] = OPS  # ops to time kernels in: block, cross_entropy
    kernel: str = ""  # regular expression: only kernels and GEMMs with a matching name
    out: Path = Path("out/tuning.json")  # tables, fastest configuration first
    warm: bool = False  # only compile every candidate, in parallel processes; time nothing


def forced(version: str, gemm: str = ""):
    """Force `version` for `gemm` and cuBLAS for the others; for all GEMMs if `gemm` is empty."""
    return patch.object(mlp, "choice", lambda op, x: version if gemm in ("", op) else "cublas")


def kernel_ms(kernel: str, run_all, device: torch.device) -> float:
    """Return the kernel's best of three times in run_all(); on a CPU, one time of run_all()."""
    if device.type == "cpu":
        return wall_ms(run_all, device)[0]
    name = KERNELS[kernel].fn.__name__
    found = [sum(us for n, _, us in profile(run_all, device) if n == name) for _ in "123"]
    return min(found) / 1e3 or wall_ms(run_all, device)[0]


def tune_kernel(kernel: str, judge: Judge, run_all, table: dict) -> dict:
    """Move the fastest correct candidate to the front; return a result row."""
    tried, times = table[kernel], []
    for candidate in tried:
        table[kernel] = [candidate]
        try:
            right = judge.error(judge.case.providers["ours"]) <= judge.bound
            device = judge.exact[0].device
            times.append(kernel_ms(kernel, run_all, device) if right else math.inf)
            problem = "" if right else "WRONG"
        except Exception as e:  # too large for the device, or a compiler bug
            times.append(math.inf)
            problem = type(e).__name__
        if problem:
            print(f"{kernel} {candidate}: {problem}", file=sys.stderr, flush=True)
    ms, best = min(zip(times, range(len(times))))
    table[kernel] = [tried[best]] + [c for c in tried if c != tried[best]]
    said = json.dumps(tried[best]) if ms < math.inf else "NONE IS RIGHT"
    return {"kernel": kernel, "ms": ms, "gain_frac": times[0] / ms - 1, "best": said}


def tune(c: Config, device: str, sm: int) -> bool:
    """Tune as `c` asks; return True if every kernel has a correct configuration."""
    launch.TUNING_FILE = c.out
    c.out.parent.mkdir(parents=True, exist_ok=True)
    if c.out.exists():
        TUNING.update(json.loads(c.out.read_text()))
    found = TUNING.setdefault("measured", {}).setdefault(f"sm_{sm}", {"device": "", "gemm": {}})
    table, timer, fine, show = TUNING[f"sm_{sm}"], make_timer(c.device, 2, 10), True, Table(True)
    torch.manual_seed(0)
    for op in c.op:
        case, done = c.case(op), set()
        judge = Judge(case)
        run_all = partial(whole, case, case.providers["ours"], copies(case), judge.upstream)
        for version in VERSIONS:
            with forced(version):
                LAUNCHED.clear()
                run_all()
                for kernel in [k for k in LAUNCHED if re.search(c.kernel, k) and k not in done]:
                    done.add(kernel)
                    if len(table[kernel]) > 1:
                        row = tune_kernel(kernel, judge, run_all, table)
                        fine &= row["ms"] < math.inf
                        write_tuning()
                        show(summary=True, **row)
        for gemm in [g for g in mlp.GEMM[sm] if re.search(c.kernel, g)] if op == "block" else ():
            times = {}
            for version in VERSIONS:
                with forced(version, gemm):
                    times[f"{version}_ms"] = timer(run_all)["p50_ms"]
            found["device"], taken = device, min(times, key=times.get).removesuffix("_ms")
            found["gemm"][gemm] = taken
            write_tuning()
            show(summary=True, gemm=gemm, takes=taken, **times)
    return fine


def compile_all(c: Config, sm: int, op: str, n: int) -> str:
    """Launch the n-th candidate of each kernel of an op, on one sequence; return the error."""
    tables = TUNING[f"sm_{sm}"]
    before = dict(tables)
    for name, table in before.items():
        tables[name] = table[n % len(table) :] + table[: n % len(table)]
    try:
        case = c.case(op)
        upstream = [torch.ones_like(t) for t in forward(case.providers["eager"], copies(case))]
        for version in VERSIONS:
            with forced(version):
                whole(case, case.providers["ours"], copies(case), upstream)
    except Exception as e:  # the rest may work
        return f"{op}, dropout {c.dropout}, candidates {n}: {type(e).__name__} {e}"[:200] + "\n"
    finally:
        tables.update(before)
    return ""


def warm(c: Config, sm: int) -> None:
    """Fill Triton's disk cache on all cores; only a launch shows what it specialises on."""
    most = max(map(len, TUNING[f"sm_{sm}"].values()))
    rates = {"block": (0.0, 0.1)}  # dropout
    jobs = [(op, p, n) for op in c.op for p in rates.get(op, (0.0,)) for n in range(most)]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() + 4), spawn) as pool:
        done = [
            pool.submit(compile_all, replace(c, batch=1, dropout=p), sm, op, n) for op, p, n in jobs
        ]
        print(*(job.result() for job in done), sep="", end="", flush=True)


def main() -> None:
    c = parse(Config)
    sm = launch.capability(torch.empty(0, device=c.device))
    if c.warm:
        return warm(c, sm)
    name = torch.cuda.get_device_name() if c.device == "cuda" else "a CPU"
    sys.exit(not tune(c, name, sm))


if __name__ == "__main__":
    run(main)
