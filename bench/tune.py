"""Find the fastest configuration of every kernel on this GPU, and write them to `out`.

    python -m bench.tune [--op=NAME] [--dropout=0.1] [--out=out/tuning.json]
    NANOPHI_TUNING=out/tuning.json python -m bench.step configs/phi1.toml      a step with them
    cp out/tuning.json kernels/tuning.json                                to keep them

Each implementation of an op (cases.py) is run once to see which kernels it launches. Then, one
kernel after the other, every candidate of its table is timed in the op's own forward or backward,
the others held fixed, and the fastest goes first. Last, where an op has two versions, both are
timed with their best configurations: the faster one is what mlp.py takes on devices of this
capability. A candidate that is not right, or does not run, is left where it stands. `out` is read
if it is there, and written after each op.
"""

import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import ops
from bench.cases import CASES, Case
from bench.ops import copies, relative_error, results, upstream_of, whole
from bench.timing import CudaTimer, WallTimer, emit
from common.config import parse, run
from kernels import launch
from kernels.launch import LAUNCHED, TUNING, write_tuning
from model import ModelConfig

# Each kernel of the block and the head is launched by one of these; `block` repeats them.
DROPOUT_OPS = ("attention", "out_proj_fwd", "residual_bwd")
OPS = (*DROPOUT_OPS, "gelu_bwd", "in_proj_fwd", "layernorm", "cross_entropy")


@dataclass(frozen=True)
class Config(ops.Config):
    """Time every configuration at phi-1's shape, unless told otherwise, on this GPU."""

    op: tuple[str, ...] = OPS  # which ops; may be given several times
    out: Path = Path("out/tuning.json")  # the tables, each with the fastest first
    warm: bool = False  # compile every candidate, in many processes at once, and time nothing

    def case(self, op: str, **changes) -> Case:
        """The case of an op as `self` has it, or with other values."""
        c = replace(self, **changes)
        shape = ModelConfig(**{f.name: getattr(c, f.name) for f in fields(ModelConfig)})
        return CASES[op](shape, c.batch, getattr(torch, c.dtype), c.device)


def mine(case: Case) -> list[str]:
    return [name for name in case.providers if name.startswith("ours") and "fp32" not in name]


def time_ms(case: Case, name: str, timer) -> float:
    """Median of forward, and backward where the case has one."""
    run_once = partial(whole, case, case.providers[name], copies(case), upstream_of(case))
    with case.running(name):
        return timer(lambda: None, lambda _: run_once())[1]


def tune_op(case: Case, name: str, sm: int, timer) -> list[dict]:
    """Order the tables of the kernels that provider `name` launches; a row for each."""
    fn, table, rows = case.providers[name], TUNING[f"sm_{sm}"], []
    grads = upstream_of(case)
    exact = results(case, case.reference, grads, torch.float32)
    bound = 4 * torch.finfo(case.inputs[0].dtype).eps
    if not case.dropout:
        bound += 2 * relative_error(results(case, case.providers["eager"], grads), exact)
    LAUNCHED.clear()
    with case.running(name):
        results(case, fn, grads)
    for kernel in list(LAUNCHED):
        tried = table[kernel]
        if len(tried) == 1:
            continue
        times = []
        for candidate in tried:
            table[kernel] = [candidate]
            try:
                with case.running(name):
                    right = relative_error(results(case, fn, grads), exact) <= bound
                times.append(time_ms(case, name, timer) if right else math.inf)
                problem = "" if right else "WRONG"
            except Exception as e:  # too large for the device, or a fault of the compiler's
                times.append(math.inf)
                problem = type(e).__name__
            if problem:
                print(f"{kernel} {candidate}: {problem}", file=sys.stderr, flush=True)
        ms, best = min(zip(times, range(len(times))))
        table[kernel] = [tried[best]] + [c for c in tried if c != tried[best]]
        row = {"op": case.name, "kernel": kernel, "failed": times.count(math.inf)}
        if ms < math.inf:
            row |= {"ms": ms, "gain": times[0] / ms - 1, "best": tried[best]}
        rows.append(row)
    return rows


def choose_version(case: Case, sm: int, timer, device: str) -> dict:
    """Note which version of a GEMM op is the faster."""
    times = {name.split()[1]: time_ms(case, name, timer) for name in mine(case)}
    found = TUNING.setdefault("measured", {}).setdefault(f"sm_{sm}", {"device": "", "gemm": {}})
    found["device"], found["gemm"][case.name] = device, min(times, key=times.get)
    return {"op": case.name, "takes": found["gemm"][case.name]} | times


def tune(config: Config, device: str, sm: int, timer) -> bool:
    """Tune what `config` asks for, writing after every op; whether each kernel runs at all."""
    fine = True
    launch.TUNING_FILE = config.out
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.out.exists():
        TUNING.update(json.loads(config.out.read_text()))
    torch.manual_seed(0)
    for op in config.op:
        case, rows = config.case(op), []
        for name in mine(case):
            rows += tune_op(case, name, sm, timer)
        if len(mine(case)) > 1:
            rows.append(choose_version(case, sm, timer, device))
        write_tuning()
        for row in rows:
            emit(row)
            fine &= "best" in row or "takes" in row
        del case
        torch.cuda.empty_cache()
    return fine


def compile_all(config: Config, sm: int, op: str, dropout: float, first: int) -> list[str]:
    """Launch every other candidate of an op, on one sequence: the same code. Give what failed."""
    failed = []
    tables = TUNING[f"sm_{sm}"]
    given = dict(tables)
    for n in range(first, max(map(len, given.values())), 2):
        for name, table in given.items():
            tables[name] = table[n % len(table) :] + table[: n % len(table)]
        try:
            case = config.case(op, batch=1, dropout=dropout)
            for name in mine(case):
                with case.running(name):
                    results(case, case.providers[name], upstream_of(case))
        except Exception as e:  # the rest may work; if the context is lost, no other op's is
            failed.append(f"{op}, dropout {dropout}, candidates {n}: {type(e).__name__} {e}"[:200])
    tables.update(given)  # for this process's next op
    return failed


def warm(config: Config, sm: int) -> None:
    """Compile every candidate into Triton's cache on disk, on all cores at once, by launching it:
    only a launch knows what Triton specialises a kernel on."""
    jobs = [(op, p) for op in config.op for p in (0.0, 0.1) if p == 0 or op in DROPOUT_OPS]
    jobs = [(*job, first) for job in jobs for first in (0, 1)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() + 4), get_context("spawn")) as pool:
        for failed in pool.map(compile_all, *zip(*((config, sm, *job) for job in jobs))):
            print(*failed, sep="\n", end="\n" * bool(failed), flush=True)


def main() -> None:
    config = parse(Config)
    on_gpu = config.device == "cuda"
    sm = launch.capability(torch.empty(0, device=config.device))
    if config.warm:
        return warm(config, sm)
    name = torch.cuda.get_device_name() if on_gpu else "a CPU"
    timer = CudaTimer(2, 10) if on_gpu else WallTimer(1)
    sys.exit(not tune(config, name, sm, timer))


if __name__ == "__main__":
    run(main)
