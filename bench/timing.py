"""Timers, the roof they measure (a large matmul and a large copy), and results as lines of JSON."""

import json
import math
import time
from collections.abc import Callable

import torch

from bench.work import Rates

MATMUL, COPY_BYTES = 8192, 2**30  # sizes that reach the roof of every GPU we know


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
