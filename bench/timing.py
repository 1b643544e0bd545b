"""Timers, the roof they measure (a large matmul and a large copy), a profile beside its floors."""

import json
import math
import re
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cost import Rates, training_ops
from model import ModelConfig

MATMUL, COPY_BYTES = 8192, 2**30  # sizes that reach the roof of every GPU we know
# (group, names of its kernels, names of its ops in cost.py); the first match takes a kernel.
GROUPS = [
    ("attention fwd", r"_fwd_kernel|_rotate_k_kernel|.*flash_fwd.*", ["attention_fwd"]),
    ("attention bwd", r"_(bwd|delta|dq)_kernel|.*flash_bwd.*", ["attention_bwd"]),
    ("gemm", r"_(in|out)_proj_fwd_kernel|(?i:.*(gemm|nvjet|cutlass|splitk).*)|aten::(add)?mm", []),
    ("layernorm", r"_layernorm_.*", ["layernorm_fwd", "ln_f_fwd", "layernorm_bwd", "ln_f_bwd"]),
    ("cross entropy", r"_cross_entropy_kernel|_rescale_kernel", ["cross_entropy"]),
    ("elementwise", r"_(gelu|residual)_.*", ["residual_bwd", "attention_db", "head_db"]),
    ("embedding", r"(?i:.*(embedding|index).*)", ["embedding_fwd", "embedding_bwd"]),
    ("optimiser", r"(?i:.*(multi_tensor|adam|foreach).*)", ["gradient_norm", "adamw"]),
    ("other", r".*", []),
]  # fmt: skip


class CudaTimer:
    """timer(prepare, run): milliseconds of run(prepare()) on the GPU, a percentile each."""

    def __init__(self, warmup: int = 5, reps: int = 25):
        self.warmup, self.reps = warmup, reps
        self.flush = torch.empty(2**30, dtype=torch.int8, device="cuda")

    def __call__(self, prepare: Callable, run: Callable) -> tuple[float, float, float]:
        pairs = []
        for _ in range(self.warmup + self.reps):
            state = prepare()
            # Empties L2, and lasts some 0.4 ms, in which the host queues what is timed.
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
            begin.record()
            run(state)
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return percentiles([a.elapsed_time(b) for a, b in pairs[self.warmup :]])


class WallTimer:
    """The same by the clock on the wall, for a CPU."""

    def __init__(self, reps: int = 2):
        self.reps = reps

    def __call__(self, prepare: Callable, run: Callable) -> tuple[float, float, float]:
        times = []
        for _ in range(self.reps):
            state, began = prepare(), time.perf_counter()
            run(state)
            times.append((time.perf_counter() - began) * 1e3)
        return percentiles(times)


def percentiles(times_ms: list[float]) -> tuple[float, float, float]:
    p20, p50, p80 = torch.tensor(times_ms, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return p20.item(), p50.item(), p80.item()


def emit(row: dict) -> None:
    """Print a line of JSON: five digits of each float, and nothing infinite, NaN, zero or empty."""
    row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
    unfit = (math.inf, -math.inf)
    print(json.dumps({k: v for k, v in row.items() if v and v == v and v not in unfit}), flush=True)


def measured_roof(
    timer, device: str, dtype: torch.dtype, matmul: int = MATMUL, copy_bytes: int = COPY_BYTES
) -> Rates:
    """FLOP/s of a square matmul and bytes/s, read and written, of a copy."""
    a = torch.randn(matmul, matmul, device=device, dtype=dtype)
    out = torch.empty_like(a)
    _, mm_ms, _ = timer(lambda: None, lambda _: torch.mm(a, a, out=out))
    src = torch.zeros(copy_bytes, dtype=torch.int8, device=device)
    dst = torch.empty_like(src)
    _, copy_ms, _ = timer(lambda: None, lambda _: dst.copy_(src))
    rate = 2 * matmul**3 / mm_ms * 1e3
    return Rates(rate, rate, rate, 2 * copy_bytes / copy_ms * 1e3)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step: Callable[[], Tensor], device: torch.device) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds) of one step, the longest first; on a CPU, torch's ops."""
    cuda, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda) as trace:
        step()
        synchronize(device)
    rows = [
        (e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total)
        for e in trace.key_averages()
        if (e.device_type.name == "CUDA") == cuda and not getattr(e, "is_user_annotation", False)
    ]
    return sorted((r for r in rows if r[2] > 0), key=lambda r: -r[2])


def group(kernel: str) -> str:
    return next(name for name, pattern, _ in GROUPS if re.fullmatch(pattern, kernel))


def floors_us(c: ModelConfig, micro_batch: int, micro_steps: int, rates: Rates) -> dict[str, float]:
    """The floor of each group, for one step."""
    total = dict.fromkeys((name for name, _, _ in GROUPS), 0.0)
    for op in training_ops(c, micro_batch):
        name = next((g for g, _, ops in GROUPS if op.name in ops), "gemm")
        times = op.calls * (1 if op.phase == "optimiser" else micro_steps)
        total[name] += rates.floor_us(op)[0] * times
    return total


def show_profile(rows: list[tuple[str, int, float]], floors: dict[str, float], n: int) -> str:
    total = sum(us for *_, us in rows)
    lines = [f"{'group':<16}{'us':>12}{'share':>8}{'floor us':>12}{'floor/us':>10}"]
    for name, floor in floors.items():
        us = sum(r[2] for r in rows if group(r[0]) == name)
        part = f"{floor / us:>10.1%}" if us else f"{'-':>10}"
        lines.append(f"{name:<16}{us:>12,.0f}{us / total:>8.1%}{floor:>12,.0f}{part}")
    lines.append(f"\n{'us':>12}{'calls':>7}  {'group':<16}kernel")
    for kernel, calls, us in rows[:n]:
        lines.append(f"{us:>12,.0f}{calls:>7}  {group(kernel):<16}{kernel[:90]}")
    return "\n".join(lines)
