"""Compile each kernel configuration for A100 and H100 without a GPU; report what it needs.

    python -m bench.resources [--sm=80] [--kernel=in_proj] [--defaults] [--record]

Compiles each configuration in kernels/tuning.json (bf16, phi-1's shapes) and prints registers,
spills, shared memory, theoretical occupancy, and the tensor-core and asynchronous copy instructions
in the PTX. For each inner loop with tensor-core instructions it also prints the busy cycles of each
SM pipe and the TFLOP/s that the slowest allows (sass.py), per 64 x 64 block of scores or per
128 x 128 x 64 block of a GEMM. Exits with status 1 if a default (the configuration a launch takes)
spills in a loop, exceeds a block's shared memory, lacks tensor-core instructions, or has a bound
below the one in bench/bounds.json for this version of Triton.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import sass
from bench.launches import KERNELS, record, type_of
from common.config import UserError, parse, run
from common.runlog import PEAK_FLOPS
from kernels.launch import TUNING

# CUDA C++ programming guide, technical specifications per compute capability, 8.0 and 9.0
SHARED_PER_BLOCK_BYTES = {80: 166_912, 90: 232_448}
SHARED_PER_SM_BYTES = {80: 167_936, 90: 233_472}
SHARED_RESERVED_BYTES = 1024  # per block
REGISTERS_PER_SM, REGISTER_UNIT, WARPS_PER_SM, BLOCKS_PER_SM = 65_536, 256, 64, 32
PEAK = {80: PEAK_FLOPS["A100"], 90: PEAK_FLOPS["H100"]}
# {triton version: {case: bound_frac}}; a bound may fall by the slack, as a share of peak
BOUNDS_FILE, BOUND_SLACK = Path(__file__).with_name("bounds.json"), 0.01


@dataclass(frozen=True)
class Config:
    """Compile kernel configurations ahead of time and report what they need."""

    sm: int = 0  # 80 or 90, 0 = both
    kernel: str = ""  # only kernels with this in their name
    defaults: bool = False  # only the configurations used by launches
    record: bool = False  # write the defaults' bounds to bench/bounds.json


@dataclass(frozen=True)
class Row:
    """A compiled configuration; launchable if `problems` is empty."""

    kernel: str
    sm: int
    config: dict
    variant: dict
    problems: tuple[str, ...]
    registers: int = 0
    spill_bytes: int = 0  # per thread, stores and loads, whole kernel
    shared_bytes: int = 0
    occupancy_frac: float = 0.0
    mma: int = 0  # mma.sync or wgmma instructions
    async_copies: int = 0  # cp.async or TMA instructions
    loops: tuple[dict[str, float], ...] = ()  # cycles per iteration by pipe, each matmul loop

    @property
    def default(self) -> bool:
        return self.config == candidates(self.kernel, self.sm)[0]

    @property
    def case(self) -> str:
        """Return the key in bounds.json."""
        variant = (f"{k}={v}" for k, v in self.variant.items())
        return " ".join([f"sm_{self.sm}", self.kernel, *variant])

    @property
    def bound_frac(self) -> float:
        """Return the fastest loop's: attention's second loop masks; a GEMM's are alike."""
        return max(map(sass.bound_frac, self.loops), default=0.0)


def candidates(name: str, sm: int) -> list[dict]:
    """Return a kernel's configurations, default first; [{}] if its launch takes none."""
    return TUNING[f"sm_{sm}"].get(name, [{}])


def compile_launch(name: str, sm: int, config: dict, variant: dict):
    """Return (compiled kernel, warps) for bf16. Needs no GPU, but TRITON_INTERPRET must be unset.

    Pointers and integers are compiled as multiples of 16, as they are at phi-1's shape.
    """
    fn, args = KERNELS[name].fn, record(name, sm, config, variant)
    constants = {p.name: args[p.name] for p in fn.params if p.is_constexpr or args[p.name] is None}
    types = {n: "constexpr" if n in constants else type_of(args[n]) for n in fn.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] in "*i"}
    options = {k: args[k] for k in ("num_warps", "num_stages", "maxnreg") if k in args}
    source, target = ASTSource(fn, types, constants, attrs), GPUTarget("cuda", sm, 32)
    return triton.compile(source, target=target, options=options), options["num_warps"]


def measure(name: str, sm: int, config: dict, variant: dict) -> Row:
    """Compile one configuration; read its needs from ptxas and the PTX."""
    try:
        compiled, warps = compile_launch(name, sm, config, variant)
    except Exception as e:  # any failure of Triton or ptxas means "does not fit"
        return Row(name, sm, config, variant, (f"{type(e).__name__}: {e}".splitlines()[0],))
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spills = ptxas(ptx)
    multiplies = "tt.dot" in compiled.asm["ttir"]
    code = sass.disassemble(compiled.asm["cubin"]) if multiplies or spills else []
    inner = sass.inner_loops(code)
    loop_spills = sum(map(sass.spill_bytes, inner or [code]))  # no matmul: whole code
    moved = sass.tma_bytes(compiled.asm["ttgir"])
    mma = len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async", ptx))
    problems = []
    if loop_spills:
        problems.append(f"spills {loop_spills} bytes in a loop")
    if shared > SHARED_PER_BLOCK_BYTES[sm]:
        problems.append(f"shared memory above {SHARED_PER_BLOCK_BYTES[sm]:,} bytes")
    if multiplies and not mma:
        problems.append("no tensor-core instructions")
    return Row(
        name, sm, config, variant, tuple(problems), registers, spills, shared,
        occupancy_frac(sm, registers, shared, warps), mma,
        len(re.findall(r"\bcp\.async\.c[ag]\b|\bcp\.async\.bulk\.tensor", ptx)),
        tuple(sass.cycles(x, sm, warps, moved) for x in inner),
    )  # fmt: skip


def ptxas(ptx: str) -> tuple[int, int]:
    """Return (registers a thread, bytes of spill stores and loads) from Triton's ptxas."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        command = [tool, "-v", f"--gpu-name={target}", f.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return int(re.search(r"Used (\d+) registers", log)[1]), spills


def occupancy_frac(sm: int, registers: int, shared_bytes: int, warps: int) -> float:
    """Return the share of an SM's 64 warps that can be resident."""
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        BLOCKS_PER_SM,
        WARPS_PER_SM // warps,
        REGISTERS_PER_SM // per_warp // warps,
        SHARED_PER_SM_BYTES[sm] // (shared_bytes + SHARED_RESERVED_BYTES),
    )
    return blocks * warps / WARPS_PER_SM


def show(row: Row) -> str:
    """Return a line with kernel, configuration, needs, problems, then a line per loop."""
    config = " ".join(f"{k}={v}" for k, v in (row.config | row.variant).items())
    for long, short in (("BLOCK_", ""), ("num_warps", "warps"), ("num_stages", "stages")):
        config = config.replace(long, short)
    lines = [
        f"sm_{row.sm} {row.kernel:<26} {'default' if row.default else '':<8}"
        f"{row.registers:>4} {row.spill_bytes:>6} {row.shared_bytes:>8,} {row.occupancy_frac:>5.0%}"
        f"{row.mma:>5} {row.async_copies:>6}  {config}  {'; '.join(row.problems)}"
    ]
    for busy in row.loops:
        pipes = " ".join(f"{pipe} {n / blocks(row.config):,.0f}" for pipe, n in busy.items())
        tflops = sass.bound_frac(busy) * PEAK[row.sm] / 1e12
        lines.append(f"{'':6}loop: {pipes}: {max(busy, key=busy.get)} bound, {tflops:.0f} TFLOP/s")
    return "\n".join(lines)


def blocks(config: dict) -> float:
    """Return the 64 x 64 score blocks, or 128 x 128 x 64 GEMM blocks, per iteration; else 1."""
    if "BM" in config:
        return config["BM"] * config["BN"] / 64**2
    sizes = (config.get(f"BLOCK_{axis}", 0) for axis in "MNK")
    return math.prod(sizes) / 2**20 or 1


def hold_bounds(rows: list[Row], record: bool) -> list[Row]:
    """Flag defaults below bounds.json as problems; `record` updates the file first."""
    table = json.loads(BOUNDS_FILE.read_text())
    floors, held = table.setdefault(triton.__version__, {}), []
    if record:
        floors |= {r.case: round(r.bound_frac, 3) for r in rows if r.default and r.loops}
        BOUNDS_FILE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    for r in rows:
        floor = floors.get(r.case, 0) if r.default else 0
        if r.bound_frac < floor - BOUND_SLACK:
            low = f"bound {r.bound_frac:.3f} of peak, was {floor}; if intended, run with --record"
            r = replace(r, problems=(*r.problems, low))
        held.append(r)
    return held


def main() -> None:
    c = parse(Config)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("TRITON_INTERPRET is set, so nothing would compile; unset it")
    if c.sm not in (0, 80, 90):
        raise UserError(f"--sm is {c.sm}, want 80 or 90")
    jobs = [
        (name, sm, config, variant)
        for name, kernel in KERNELS.items() if c.kernel in name
        for sm in kernel.sms if c.sm in (0, sm)
        for config in candidates(name, sm)[: 1 if c.defaults else None]
        for variant in kernel.variants
    ]  # fmt: skip
    if not jobs:
        raise UserError(f"--kernel is {c.kernel}: no kernel name contains it")
    with ProcessPoolExecutor(2) as pool:
        results = pool.map(measure, *zip(*jobs))
        rows = list(tqdm(results, total=len(jobs), disable=None, unit="configuration"))
    rows = hold_bounds(rows, c.record)
    print(f"{'':6}{'kernel':<35}regs spills   shared   occ  mma  async  configuration")
    print("\n".join(map(show, rows)))
    failed = [r for r in rows if r.default and r.problems]
    for row in failed:
        print(f"error: default {show(row)}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    run(main)
