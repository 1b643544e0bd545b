"""Find the fastest configuration of every kernel on this GPU, and write them to tuning.json.

    python -m kernels.tune [--op NAME] [--minutes 8]

Each op of kernels.bench is run once to see which kernels it launches. Then, one kernel after the
other, every candidate of its table is timed in the op's own forward or backward, the others held
fixed, and the fastest goes first. Last, both versions of each GEMM are timed with their best
configurations: the faster one is what mlp.py takes on devices of this capability. A candidate that
is not right, or does not run, is left where it stands. What was found before is kept if time runs
out; nothing is written for an op that was not finished.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from config import UserError, parse, run
from kernels import cases, spec
from kernels.bench import backward, copies, forward, relative_error, results
from kernels.cases import CASES, Case
from kernels.spec import TUNING, Kernel, write_tuning
from kernels.timing import CudaTimer
from model import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    """Time every configuration at phi-1's shape, unless told otherwise, on this GPU."""

    op: str = ""  # which op: attention, layernorm, ...; all of them if not given
    batch: int = 16  # sequences; attention takes a quarter
    minutes: float = 8.0  # no new configuration is begun after this time


def kernels_used(fn: Callable) -> list[Kernel]:
    """The kernels with a choice of configurations that fn() launches, in order."""
    used, modules = {}, [m for n, m in sys.modules.items() if n.startswith("kernels.")]
    original = spec.config

    def record(kernel: Kernel, x) -> dict:
        used[kernel.name] = kernel
        return original(kernel, x)

    patched = [m for m in modules if getattr(m, "config", None) is original]
    try:
        for m in patched:
            m.config = record
        fn()
    finally:
        for m in patched:
            m.config = original
    return list(used.values())


def time_ms(case: Case, fn: Callable, timer) -> float:
    """Median of forward, and backward where the case has one."""
    inputs = copies(case)
    if not case.backward:
        return timer(lambda: None, lambda _: forward(fn, inputs))[1]
    upstream = [torch.randn_like(t) for t in forward(fn, inputs)]
    return timer(lambda: None, lambda _: backward(forward(fn, inputs), inputs, upstream))[1]


def tune_op(case: Case, name: str, sm: int, timer, out_of_time: Callable) -> list[str]:
    """Order the tables of the kernels that provider `name` launches; a line for each."""
    fn, table, lines = case.providers[name], TUNING.setdefault(f"sm_{sm}", {}), []
    with torch.no_grad():
        shapes = forward(case.providers["eager"], copies(case))
    upstream = [torch.randn_like(t) for t in shapes]
    exact = results(case, case.reference, upstream, torch.float32)
    bound = 4 * torch.finfo(case.inputs[0].dtype).eps
    bound += 2 * relative_error(results(case, case.providers["eager"], upstream), exact)
    for kernel in kernels_used(lambda: results(case, fn, upstream)):
        candidates = table.get(kernel.name) or kernel.configs[sm]
        if len(candidates) == 1:
            continue
        times = []
        for candidate in tqdm(candidates, desc=kernel.name, leave=False, disable=None):
            if out_of_time():
                table[kernel.name] = candidates
                return lines
            table[kernel.name] = [candidate]
            try:
                right = relative_error(results(case, fn, upstream), exact) <= bound
                times.append(time_ms(case, fn, timer) if right else math.inf)
            except Exception as e:  # too large for the device, or a fault of the compiler's
                tqdm.write(f"{kernel.name} {candidate}: {type(e).__name__}", file=sys.stderr)
                times.append(math.inf)
        best = min(range(len(times)), key=times.__getitem__)
        table[kernel.name] = [candidates[best]] + [c for c in candidates if c != candidates[best]]
        gain = times[0] / times[best] - 1 if math.isfinite(times[0]) else math.inf
        lines.append(f"{case.name:<14}{kernel.name:<28}{times[best]:>9.3f} ms  {gain:>+7.1%}")
    return lines


def choose_gemm(case: Case, sm: int, timer, device: str) -> str:
    """Note which version of a GEMM op is the faster."""
    times = {v: time_ms(case, case.providers[f"ours {v}"], timer) for v in ("triton", "cublas")}
    faster = min(times, key=times.get)
    found = TUNING.setdefault("measured", {}).setdefault(f"sm_{sm}", {"device": "", "gemm": {}})
    found["device"], found["gemm"][case.name] = device, faster
    return f"{case.name:<14}" + "  ".join(f"{v} {ms:.3f} ms" for v, ms in times.items())


def tune(config: Config, device: str, name: str, sm: int, timer) -> None:
    """Tune what `config` asks for; tuning.json is written after every op."""
    shape = {f: getattr(config, f) for f in ModelConfig.__dataclass_fields__}
    c, end = ModelConfig(**shape), time.monotonic() + 60 * config.minutes
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    torch.manual_seed(0)
    for op in [config.op] if config.op else CASES:
        if time.monotonic() > end:
            print(f"{op}: not begun, {config.minutes:g} minutes are over")
            continue
        case = CASES[op](c, config.batch, dtype, device)
        triton = "ours triton" if "ours triton" in case.providers else "ours"
        lines = tune_op(case, triton, sm, timer, lambda: time.monotonic() > end)
        if triton != "ours":
            lines.append(choose_gemm(case, sm, timer, name))
        write_tuning()
        print("\n".join(lines), flush=True)
        del case
        torch.cuda.empty_cache()


def main() -> None:
    config = parse(Config)
    if config.op and config.op not in cases.CASES:
        raise UserError(f"--op={config.op}: no such op; want one of {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise UserError("kernels.tune times GPU kernels, and there is no CUDA device here")
    sm = spec.capability(torch.empty(0, device="cuda"))
    tune(config, "cuda", torch.cuda.get_device_name(), sm, CudaTimer(2, 10))


if __name__ == "__main__":
    run(main)
