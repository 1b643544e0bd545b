"""Time the kernels against torch and others on this GPU, checking every result on the way.

    python -m kernels.bench [--op NAME] [--csv FILE] [--json]

An op is timed at phi-1's shape: forward, backward, and both at once; 20th, 50th and 80th percentile
of CUDA events, with L2 flushed before each. The roof is measured in the same run, by a copy of a
GiB and a square matmul; an op's share of it is its floor (work.py) at those rates over its p50.

Before it is timed, each implementation runs on fresh random inputs, ours with every new tensor
filled with NaN, and its results and gradients are compared with fp32 ones: the largest relative
error (2-norm) may be twice that of torch in the same dtype plus a few units in the last place.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from config import UserError, parse, run
from kernels.cases import CASES, LIGER, Case
from kernels.timing import CudaTimer, measured_roof
from kernels.work import Rates, training_ops
from model import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    """Time the kernels of one layer, at phi-1's shape unless told otherwise, on this GPU."""

    op: str = ""  # which op: attention, layernorm, ...; all of them if not given
    batch: int = 16  # sequences; attention takes a quarter, for its fp32 check holds T x T
    dtype: str = "bfloat16"  # bfloat16 or float16
    csv: Path | None = None  # a file to append the rows to
    json: bool = False  # print JSON instead of a table


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


def run_case(case: Case, roof: Rates, c: ModelConfig, timer) -> list[Row]:
    """Check and time every implementation of one op; one that fails leaves a row that says why."""
    with torch.no_grad():
        shapes = forward(case.providers["eager"], copies(case))
    upstream = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in shapes]
    exact = results(case, case.reference, upstream, torch.float32)
    bound = 4 * torch.finfo(case.inputs[0].dtype).eps
    work = {op.name: op for op in training_ops(dataclasses.replace(c, dropout=0.0), case.batch)}
    rows = []
    for name, fn in case.providers.items():  # eager first: its error is the others' measure
        try:
            with poisoned() if name.startswith("ours") else contextlib.nullcontext():
                error = relative_error(results(case, fn, upstream), exact)
            bound += 2 * error if name == "eager" else 0.0
            ok = error <= bound  # not if NaN
            inputs = copies(case)
            for phase, ops in case.phases.items():
                if phase == "bwd":
                    timed = timer(
                        lambda f=fn, x=inputs: forward(f, x),
                        lambda out, x=inputs: backward(out, x, upstream),
                    )
                elif phase == "fwd":
                    timed = timer(lambda: None, lambda _, f=fn, x=inputs: forward(f, x))
                else:
                    timed = timer(
                        lambda: None,
                        lambda _, f=fn, x=inputs: backward(forward(f, x), x, upstream),
                    )
                floor_ms = sum(roof.floor_us(work[op])[0] for op in ops) / 1e3
                flops, moved = (sum(getattr(work[o], k) for o in ops) for k in ("flops", "bytes"))
                speed = flops / timed[1] / 1e9, moved / timed[1] / 1e6, floor_ms / timed[1]
                rows.append(Row(case.name, name, phase, *timed, *speed, error, ok))
        except Exception as e:  # a backend that does not take the shape, or is not there
            if name == "eager":
                raise
            note = f"{type(e).__name__}: {(str(e) or 'no message').splitlines()[0][:80]}"
            rows.append(Row(case.name, name, "-", note=note))
    return rows


def show(row: Row) -> str:
    if row.note:
        return f"{row.op:<15}{row.provider:<16}none: {row.note}"
    return (
        f"{row.op:<15}{row.provider:<16}{row.phase:<8}{row.p20_ms:>9.3f}{row.p50_ms:>9.3f}"
        f"{row.p80_ms:>9.3f}{row.tflops:>9.1f}{row.gb_per_s:>9,.0f}{row.roof_frac:>7.1%}"
        f"{row.error:>10.1e}" + ("" if row.ok else "  WRONG")
    )


def ratios(rows: list[Row]) -> list[str]:
    """How our fastest compares with the fastest correct peer, for each op and phase."""
    lines = []
    for op, phase in dict.fromkeys((r.op, r.phase) for r in rows if r.ok):
        same = [r for r in rows if (r.op, r.phase) == (op, phase) and r.ok]
        ours = [r for r in same if r.provider.startswith("ours")]
        peers = [r for r in same if r not in ours]
        if ours and peers:
            best, peer = (min(x, key=lambda r: r.p50_ms) for x in (ours, peers))
            ratio = peer.p50_ms / best.p50_ms
            lines.append(f"{op} {phase}: {best.provider} is {ratio:.2f}x {peer.provider}")
    return lines


def write_csv(path: Path, rows: list[Row], device: str) -> None:
    """Append the rows, with device, versions and a hash of the kernels' sources."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]
    origin = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    records = [dataclasses.asdict(r) | origin | {"kernels_sha256": digest} for r in rows]
    new = not path.exists()
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, records[0])
        if new:
            writer.writeheader()
        writer.writerows(records)


def bench(config: Config, device: str, name: str, timer) -> list[Row]:
    """Run the ops that `config` asks for, and print and write their rows as they come."""
    out = sys.stderr if config.json else sys.stdout
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
    c, dtype = ModelConfig(**shape), getattr(torch, config.dtype)
    torch.manual_seed(time.time_ns())  # fresh inputs
    roof, rows = measured_roof(timer, device, dtype), []
    print(
        f"{name}: matmul {roof.gemm / 1e12:.0f} TFLOP/s, copy {roof.memory / 1e9:,.0f} GB/s\n"
        f"{'op':<15}{'provider':<16}{'phase':<8}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}"
        f"{'TFLOP/s':>9}{'GB/s':>9}{'roof':>7}{'error':>10}",
        file=out,
    )
    for op in tqdm([config.op] if config.op else list(CASES), disable=None, unit="op"):
        rows += (new := run_case(CASES[op](c, config.batch, dtype, device), roof, c, timer))
        tqdm.write("\n".join(map(show, new)), file=out)
        if config.csv:
            write_csv(config.csv, new, name)
        torch.cuda.empty_cache()
    print("\n".join(ratios(rows)), file=out)
    if not LIGER:
        print("liger_kernel is not installed: none of its rows", file=out)
    return rows


def main() -> None:
    config = parse(Config)
    if config.op and config.op not in CASES:
        raise UserError(f"--op={config.op}: no such op; want one of {', '.join(CASES)}")
    if config.dtype not in ("bfloat16", "float16"):
        raise UserError(f"--dtype={config.dtype}: want bfloat16 or float16")
    if not torch.cuda.is_available():
        raise UserError("kernels.bench times GPU kernels, and there is no CUDA device here")
    rows = bench(config, "cuda", torch.cuda.get_device_name(), CudaTimer())
    if config.json:
        print(json.dumps([vars(r) for r in rows], indent=1))
    sys.exit(any(r.provider.startswith("ours") and not r.ok for r in rows))


if __name__ == "__main__":
    run(main)
