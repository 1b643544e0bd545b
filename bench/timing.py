"""Timers, measured roof and profiler shared by the timing commands."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.cost import Rates
from common.config import UserError


def device_of(asked: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        raise UserError("device is cuda, but there is no CUDA device here; try --device=cpu")
    return torch.device("cuda" if cuda and asked != "cpu" else "cpu")


def percentiles(times_ms: list[float]) -> dict[str, float]:
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    times = torch.tensor(times_ms, dtype=torch.float64).quantile(quantiles)
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), times.tolist()))


def make_timer(device: str, warmup: int = 5, reps: int = 25) -> Callable:
    """Return timer(run, prepare=None) -> percentiles in ms of run(), or of run(prepare()).

    On a GPU it uses events and flushes L2 before each call; on a CPU it times one call by clock.
    """
    flush = torch.empty(2**30 if device == "cuda" else 0, dtype=torch.int8, device=device)

    def timer(run: Callable, prepare: Callable | None = None) -> dict[str, float]:
        pairs = []
        for _ in range(warmup + reps if device == "cuda" else 1):
            call = partial(run, prepare()) if prepare else run
            if device == "cpu":
                return percentiles([wall_ms(call, torch.device(device))[0]])
            # Flushes L2; takes about 0.4 ms, so the host queues the timed call meanwhile.
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return percentiles([a.elapsed_time(b) for a, b in pairs[warmup:]])

    return timer


def wall_ms(run: Callable, device: torch.device) -> tuple[float, object]:
    """Return (wall-clock milliseconds of run(), its result)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    result = run()
    wait()
    return (time.perf_counter() - began) * 1e3, result


def measured_roof(timer: Callable, device: str, dtype: torch.dtype) -> Rates:
    """Measure FLOP/s of a large matmul, bytes/s (read + written) of a copy; small on a CPU."""
    n, copy_bytes = (8192, 2**30) if device == "cuda" else (256, 2**20)
    a = torch.randn(n, n, device=device, dtype=dtype)
    src = torch.zeros(copy_bytes, dtype=torch.int8, device=device)
    out, dst = torch.empty_like(a), torch.empty_like(src)
    rate = 2 * n**3 / timer(lambda: torch.mm(a, a, out=out))["p50_ms"] * 1e3
    copied = 2 * copy_bytes / timer(lambda: dst.copy_(src))["p50_ms"] * 1e3
    return Rates(rate, rate, rate, copied)


def profile(step: Callable[[], Tensor], device: torch.device) -> list[tuple[str, int, float]]:
    """Return (kernel, calls, microseconds) of a step, longest first; torch ops on a CPU."""
    cuda, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda) as trace:
        wall_ms(step, device)
    rows = [
        (e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total)
        for e in trace.key_averages()
        if (e.device_type.name == "CUDA") == cuda and not getattr(e, "is_user_annotation", False)
    ]
    return sorted((r for r in rows if r[2] > 0), key=lambda r: -r[2])
