"""Time the kernels against torch and other peers on this GPU, and check every result.

    python -m bench.ops [--op=NAME] [--dropout=0.1] [--dtype=float16] [--json]

Each op is timed at phi-1's shape, forward and backward, with L2 flushed before each call; the
profiler then times each of our kernels. The roof is a copy and a matmul timed in the same run.
roof_frac is the op's floor (cost.py) at those rates over its p50.

Each implementation first runs on random inputs, ours with every new tensor filled with NaN. Its
largest relative error (2-norm) against fp32 may be twice torch's in the same dtype plus 4 ulps.
With dropout only ours is checked, against itself in fp32.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.cases import CASES, Case, make_case
from bench.cost import Rates, training_ops
from bench.table import Table
from bench.timing import make_timer, measured_roof, profile
from common.config import UserError, parse, run
from model import ModelConfig

SPLIT = 8  # longest kernels of ours shown per op


@dataclass(frozen=True)
class Config(ModelConfig):
    """Time the kernels of one layer on this GPU, by default at phi-1's shape."""

    op: tuple[str, ...] = ()  # attention, layernorm, ...; empty = all
    batch: int = 16  # sequences; attention uses a quarter: its fp32 check holds T x T
    dtype: str = "bfloat16"  # bfloat16 or float16
    device: str = "cuda"  # or cpu: Triton's interpreter, times mean nothing
    warm: bool = False  # only compile and check, to fill caches for the next run
    json: bool = False  # also print JSON lines

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.op) - CASES.keys():
            raise UserError(f"op is {unknown.pop()}, want one of {', '.join(CASES)}")
        if self.dtype not in ("bfloat16", "float16"):
            raise UserError(f"dtype is {self.dtype}, want bfloat16 or float16")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA device here; --device=cpu rehearses a small shape")

    def case(self, op: str) -> Case:
        return make_case(op, self, self.batch, getattr(torch, self.dtype), self.device)


@contextlib.contextmanager
def poisoned(on: bool):
    """Fill new torch memory with NaN, or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def copies(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copy the inputs: some implementations overwrite them."""
    return [
        t.detach().to(dtype or t.dtype, copy=True).requires_grad_(case.backward)
        if t.is_floating_point()
        else t
        for t in case.inputs
    ]


def forward(fn: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = fn(*inputs)
    return out if isinstance(out, tuple) else (out,)


def backward(outputs: tuple[Tensor, ...], inputs: list[Tensor], upstream: list[Tensor]) -> list:
    upstream = [g.to(o.dtype) for g, o in zip(upstream, outputs)]
    return list(torch.autograd.grad(outputs, inputs, upstream))


def whole(case: Case, fn: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Return the outputs, plus the inputs' gradients if the case has a backward."""
    outputs = forward(fn, inputs)
    gradients = backward(outputs, inputs, upstream) if case.backward else []
    return [t.detach() for t in (*outputs, *gradients)]


class Judge:
    """Checker of an implementation against the fp32 reference, as the module docstring says."""

    def __init__(self, case: Case):
        self.case = case
        with torch.no_grad():
            outputs = forward(case.providers["eager"], copies(case))
        self.upstream = [torch.randn_like(o) for o in outputs]
        self.exact = whole(case, case.reference, copies(case, torch.float32), self.upstream)
        self.bound = 4 * torch.finfo(case.inputs[0].dtype).eps
        if not case.dropout:
            self.bound += 2 * self.error(case.providers["eager"])

    def error(self, fn: Callable, poison: bool = False) -> float:
        """Return max over results of |ours - exact| / |exact|; NaN if any value is NaN."""
        with poisoned(poison):
            ours = whole(self.case, fn, copies(self.case), self.upstream)
        pairs = zip(ours, self.exact)
        errors = [(a.float() - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]
        return torch.stack(errors).max().item()


def run_case(case: Case, roof: Rates, c: ModelConfig, timer: Callable) -> Iterator[dict]:
    """Check and time every implementation of one op; a failing one yields a row with the reason.

    Then yield the kernels that ours launches, longest first.
    """
    judge = Judge(case)
    work = {
        op.name: replace(op, flops=int(op.flops * case.flops_frac))
        for op in training_ops(c, case.batch)
    }
    kernels = []
    for name, fn in case.providers.items():
        mine = name.startswith("ours")
        try:
            error, inputs = judge.error(fn, poison=mine), copies(case)
            right = error <= judge.bound or (case.dropout and not mine)  # False for NaN
            run_forward = partial(forward, fn, inputs)
            run_backward = partial(backward, inputs=inputs, upstream=judge.upstream)
            for phase, ops in case.phases.items():
                bwd = phase == "bwd"
                times = timer(run_backward, run_forward) if bwd else timer(run_forward)
                ms, its = times["p50_ms"], [work[op] for op in ops]
                row = {"op": case.name, "provider": name, "phase": phase, **times}
                row["tflops"] = sum(op.flops for op in its) / ms / 1e9
                row["gb_per_s"] = sum(op.bytes for op in its) / ms / 1e6
                row["roof_frac"] = sum(roof.floor_us(op)[0] for op in its) / ms / 1e3
                yield row | {"error": error, "fails": "" if right else "WRONG"}
            if mine:
                run_all = partial(whole, case, fn, inputs, judge.upstream)
                for kernel, _, us in profile(run_all, inputs[0].device)[:SPLIT]:
                    kernels.append({"op": case.name, "provider": name, "us": us, "kernel": kernel})
        except Exception as e:  # backend missing or shape unsupported
            if name == "eager":
                raise
            why = f"{type(e).__name__}: {(str(e) or 'no message').splitlines()[0][:80]}"
            yield {"op": case.name, "provider": name, "fails": why}
    yield from kernels


def ratios(rows: list[dict]) -> list[str]:
    """Compare ours with the fastest correct peer and with fp32 adds, by op and phase."""
    lines, timed = [], [r for r in rows if "roof_frac" in r and not r["fails"]]
    for op, phase in dict.fromkeys((r["op"], r["phase"]) for r in timed):
        same = [r for r in timed if (r["op"], r["phase"]) == (op, phase)]
        adds = [r for r in same if r["provider"] == "ours fp32 adds"]
        ours = [r for r in same if r["provider"] == "ours"]
        peers = [r for r in same if r not in ours + adds]
        if ours and peers:
            ms, peer = ours[0]["p50_ms"], min(peers, key=lambda r: r["p50_ms"])
            line = f"{op:<15}{phase:<8}{ms:>9.3f} ms, {ours[0]['roof_frac']:>6.1%} of the roof, "
            line += f"{peer['p50_ms'] / ms:.2f}x {peer['provider']}"
            lines.append(line + "".join(f", {r['p50_ms'] / ms:.3f}x fp32 adds" for r in adds))
    return lines + list({f"{r['op']:<15}{r['provider']}: {r['fails']}": 0 for r in failed(rows)})


def failed(rows: list[dict]) -> list[dict]:
    return [r for r in rows if r["provider"].startswith("ours") and r.get("fails")]


def main() -> None:
    c, rows = parse(Config), []
    table, timer = Table(c.json), make_timer(c.device, *(0, 1) if c.warm else ())
    torch.manual_seed(time.time_ns())  # new inputs each run
    roof = measured_roof(timer, c.device, getattr(torch, c.dtype))
    table(matmul_tflops=roof.gemm / 1e12, copy_gb_per_s=roof.memory / 1e9, dropout=c.dropout)
    for op in c.op or CASES:
        for row in run_case(c.case(op), roof, c, timer):
            rows.append(row)
            table(**row)
        torch.cuda.empty_cache()
    for line in ratios(rows):
        table(summary=True, ours_beside_the_fastest_peer=line)
    sys.exit(bool(failed(rows)))


if __name__ == "__main__":
    run(main)
