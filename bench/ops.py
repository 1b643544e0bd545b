"""Time the kernels against torch and others on this GPU, checking every result on the way.

    python -m bench.ops [--op=NAME] [--dropout=0.1] [--dtype=float16] [--json]

An op is timed at phi-1's shape: forward, backward, and both at once; 20th, 50th and 80th percentile
of CUDA events, with L2 flushed before each; then the profiler says what each of our kernels takes.
The roof is measured in the same run, by a copy of a GiB and a square matmul; an op's share of it is
its floor (cost.py) at those rates over its p50.

Before it is timed, each implementation runs on fresh random inputs, ours with every new tensor
filled with NaN, and its results and gradients are compared with fp32 ones: the largest relative
error (2-norm) may be twice that of torch in the same dtype plus a few units in the last place. With
dropout only ours can be compared, with itself in fp32.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cases import CASES, Case
from bench.cost import Rates, training_ops
from bench.timing import CudaTimer, WallTimer, emit, measured_roof, profile
from common.config import UserError, parse, run
from model import ModelConfig

SPLIT = 8  # kernels of ours, the longest first, whose share of an op is shown


@dataclass(frozen=True)
class Config(ModelConfig):
    """Time the kernels of one layer, at phi-1's shape unless told otherwise, on this GPU."""

    op: tuple[str, ...] = ()  # which ops: attention, layernorm, ...; all of them if not given
    batch: int = 16  # sequences; attention takes a quarter, for its fp32 check holds T x T
    dtype: str = "bfloat16"  # bfloat16 or float16
    device: str = "cuda"  # or cpu, in Triton's interpreter: it runs, and its times mean nothing
    warm: bool = False  # compile and check only, so that the next run finds all compiled
    json: bool = False  # print the rows as lines of JSON too

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.op) - CASES.keys():
            raise UserError(f"op {unknown.pop()}: no such op; want one of {', '.join(CASES)}")
        if self.dtype not in ("bfloat16", "float16"):
            raise UserError(f"dtype is {self.dtype}, want bfloat16 or float16")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no CUDA device here; --device=cpu rehearses a small shape")


@dataclass(frozen=True)
class Row:
    """One line of the result: an implementation of an op, in one phase."""

    op: str
    provider: str
    phase: str
    p20_ms: float = 0.0
    p50_ms: float = 0.0
    p80_ms: float = 0.0
    tflops: float = 0.0
    gb_per_s: float = 0.0
    roof_frac: float = 0.0
    error: float = float("nan")  # largest relative error against fp32
    ok: bool = False
    note: str = ""  # why there are no times


@contextlib.contextmanager
def poisoned():
    """Within, memory that torch hands out is filled: with NaN, or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def copies(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The inputs anew, for some implementations write over theirs."""
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
    wanted = [t for t in inputs if t.is_floating_point()]
    upstream = [g.to(o.dtype) for g, o in zip(upstream, outputs)]
    return list(torch.autograd.grad(outputs, wanted, upstream))


def results(case: Case, fn: Callable, upstream: list[Tensor], dtype=None) -> list[Tensor]:
    """Outputs and gradients of the case's inputs, all detached."""
    inputs = copies(case, dtype)
    outputs = forward(fn, inputs)
    gradients = backward(outputs, inputs, upstream) if case.backward else []
    return [t.detach() for t in (*outputs, *gradients)]


def relative_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest, over the tensors, of |ours - exact| / |exact|; NaN if anything is."""
    errors = [(a.float() - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(ours, exact)]
    return torch.stack(errors).max().item()


def upstream_of(case: Case) -> list[Tensor]:
    """Gradients of the outputs, at random; of a loss 1."""
    with torch.no_grad():
        shapes = forward(case.providers["eager"], copies(case))
    return [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in shapes]


def whole(case: Case, fn: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> None:
    out = forward(fn, inputs)
    if case.backward:
        backward(out, inputs, upstream)


def run_case(case: Case, roof: Rates, c: ModelConfig, timer) -> Iterator[Row]:
    """Check and time every implementation of one op; one that fails leaves a row that says why."""
    upstream = upstream_of(case)
    exact = results(case, case.reference, upstream, torch.float32)
    bound = 4 * torch.finfo(case.inputs[0].dtype).eps
    work = {
        op.name: dataclasses.replace(op, flops=int(op.flops * case.flops_frac))
        for op in training_ops(c, case.batch)
    }
    for name, fn in case.providers.items():  # eager first: its error is the others' measure
        mine = name.startswith("ours")
        try:
            with case.running(name):
                with poisoned() if mine else contextlib.nullcontext():
                    error = relative_error(results(case, fn, upstream), exact)
                bound += 2 * error if name == "eager" and not case.dropout else 0.0
                ok = error <= bound or bool(case.dropout and not mine)  # not if NaN
                inputs = copies(case)
                both = partial(whole, case, fn, inputs, upstream)
                for phase, ops in case.phases.items():
                    if phase == "bwd":
                        timed = timer(
                            lambda f=fn, x=inputs: forward(f, x),
                            lambda out, x=inputs: backward(out, x, upstream),
                        )
                    else:
                        part = partial(forward, fn, inputs) if phase == "fwd" else both
                        timed = timer(lambda: None, lambda _, part=part: part())
                    flops = sum(work[op].flops for op in ops)
                    moved = sum(work[op].bytes for op in ops)
                    floor_ms = sum(roof.floor_us(work[op])[0] for op in ops) / 1e3
                    speed = flops / timed[1] / 1e9, moved / timed[1] / 1e6, floor_ms / timed[1]
                    yield Row(case.name, name, phase, *timed, *speed, error, ok)
                for kernel, _, us in profile(both, inputs[0].device)[:SPLIT] if mine else ():
                    yield Row(case.name, name, kernel[:60], p50_ms=us / 1e3, error=error, ok=ok)
        except Exception as e:  # a backend that does not take the shape, or is not there
            if name == "eager":
                raise
            note = f"{type(e).__name__}: {(str(e) or 'no message').splitlines()[0][:80]}"
            yield Row(case.name, name, "-", note=note)


def show(row: Row) -> str:
    if row.note:
        return f"{row.op:<15}{row.provider:<16}none: {row.note}"
    if not row.roof_frac:
        return f"{'':<31}{row.p50_ms:>26.3f}  {row.phase}"
    return (
        f"{row.op:<15}{row.provider:<16}{row.phase:<8}{row.p20_ms:>9.3f}{row.p50_ms:>9.3f}"
        f"{row.p80_ms:>9.3f}{row.tflops:>9.1f}{row.gb_per_s:>9,.0f}{row.roof_frac:>7.1%}"
        f"{row.error:>10.1e}" + ("" if row.ok else "  WRONG")
    )


def ratios(rows: list[Row]) -> list[str]:
    """Compare our fastest with the fastest correct peer, by op and phase, and with fp32 adds."""
    lines = []
    for op, phase in dict.fromkeys((r.op, r.phase) for r in rows if r.ok):
        same = [r for r in rows if (r.op, r.phase) == (op, phase) and r.ok]
        adds = [r for r in same if r.provider == "ours fp32 adds"]
        ours = [r for r in same if r.provider.startswith("ours") and r not in adds]
        peers = [r for r in same if r not in ours + adds]
        if ours and peers:
            best, peer = (min(x, key=lambda r: r.p50_ms) for x in (ours, peers))
            ratio = f"{peer.p50_ms / best.p50_ms:>6.2f}x {peer.provider}"
            ratio += "".join(f", {r.p50_ms / best.p50_ms:.3f}x fp32 adds" for r in adds)
            share = f"{best.p50_ms:>9.3f} ms, {best.roof_frac:>6.1%} of the roof"
            lines.append(f"{op:<15}{phase:<8}{best.provider:<13}{share}, {ratio}")
    return lines


def bench(config: Config, device: str, name: str, timer) -> list[Row]:
    """Run the ops that `config` asks for, and print their rows as they come."""
    out = sys.stderr if config.json else sys.stdout
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
    c, dtype = ModelConfig(**shape), getattr(torch, config.dtype)
    torch.manual_seed(time.time_ns())  # fresh inputs
    sizes = () if device == "cuda" else (256, 2**20)
    roof, rows = measured_roof(timer, device, dtype, *sizes), []
    print(
        f"{name}: matmul {roof.gemm / 1e12:.3g} TFLOP/s, copy {roof.memory / 1e9:,.0f} GB/s; "
        f"{config.dtype}, dropout {config.dropout}\n"
        f"{'op':<15}{'provider':<16}{'phase':<8}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}"
        f"{'TFLOP/s':>9}{'GB/s':>9}{'roof':>7}{'error':>10}",
        file=out,
        flush=True,
    )
    if config.json:
        emit({"matmul_tflops": roof.gemm / 1e12, "copy_gb_per_s": roof.memory / 1e9})
    for op in config.op or CASES:
        for row in run_case(CASES[op](c, config.batch, dtype, device), roof, c, timer):
            rows.append(row)
            print(show(row), file=out, flush=True)
            if config.json:
                emit(vars(row))
        if device == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(ratios(rows)), file=out)
    return rows


def main() -> None:
    config = parse(Config)
    on_gpu = config.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "a CPU"
    timer = CudaTimer() if on_gpu and not config.warm else WallTimer(1)
    rows = bench(config, config.device, name, timer)
    sys.exit(any(r.provider.startswith("ours") and not r.ok for r in rows))


if __name__ == "__main__":
    run(main)
