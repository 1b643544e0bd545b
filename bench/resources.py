"""What each kernel configuration needs on an A100 and an H100: compiled ahead of time, no GPU.

    python -m bench.resources [--sm=80] [--kernel=in_proj] [--defaults] [--json]
    python -m bench.resources [--prune | --record]

Compiles each configuration in kernels/tuning.json (bf16, phi-1's shapes) down to a cubin and prints
registers, spills (ptxas -v), shared memory, theoretical occupancy, and the tensor-core and
asynchronous copy instructions in the PTX; then, for each inner loop with tensor-core instructions,
the cycles that each pipe of an SM is busy and the TFLOP/s that the slowest allows (sass.py), per
64 x 64 block of scores or 128 x 128 x 64 block of a GEMM. Exits with status 1 if a default, the
configuration that a launch takes, spills in a loop, asks for more shared memory than a block may
have (Triton compiles it all the same), lacks the tensor-core instructions of a GEMM or of
attention, or has a lower bound than bench/bounds.json holds for this version of Triton. `--prune`
deletes the configurations that fail from kernels/tuning.json; `--record` writes the bounds of the
defaults to bounds.json. One to two seconds each. A new kernel is added to launches.py.
"""

import dataclasses
import json
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
from kernels.launch import TUNING, write_tuning

OPTIONS = ("num_warps", "num_stages", "maxnreg")
JOBS = 2
# CUDA C++ programming guide, technical specifications per compute capability, 8.0 and 9.0
SHARED_PER_BLOCK_BYTES = {80: 166_912, 90: 232_448}
SHARED_PER_SM_BYTES = {80: 167_936, 90: 233_472}
SHARED_RESERVED_BYTES = 1024  # per block
REGISTERS_PER_SM, REGISTER_UNIT, WARPS_PER_SM, BLOCKS_PER_SM = 65_536, 256, 64, 32
GPU = {80: "A100", 90: "H100"}
# {triton's version: {case: bound_frac}}; a bound may fall by the slack, of the peak
BOUNDS_FILE, BOUND_SLACK = Path(__file__).with_name("bounds.json"), 0.01
INSTRUCTIONS = {
    "mma": r"\bmma\.sync|\bwgmma\.mma_async",
    "async_copies": r"\bcp\.async\.c[ag]\b|\bcp\.async\.bulk\.tensor",
}


@dataclass(frozen=True)
class Config:
    """Compile the kernels' configurations ahead of time and report what they need."""

    sm: int = 0  # 80 or 90, 0 = both
    kernel: str = ""  # only kernels whose name contains this
    defaults: bool = False  # only the configurations that launches take
    json: bool = False  # print rows as JSON
    prune: bool = False  # delete the configurations that do not fit from kernels/tuning.json
    record: bool = False  # write the defaults' bounds to bench/bounds.json


@dataclass(frozen=True)
class Row:
    """One compiled configuration. `problems` is empty if it may be launched."""

    kernel: str
    sm: int
    default: bool
    config: dict
    variant: dict
    registers: int
    spill_bytes: int  # a thread, stores and loads, the whole kernel
    shared_bytes: int
    occupancy_frac: float
    mma: int  # mma.sync or wgmma instructions
    async_copies: int  # cp.async or TMA instructions
    problems: tuple[str, ...]
    loops: tuple[dict[str, float], ...] = ()  # cycles by pipe of a turn of each matmul loop

    @property
    def case(self) -> str:
        """Return its name in bounds.json."""
        return " ".join(
            [f"sm_{self.sm}", self.kernel, *(f"{k}={v}" for k, v in self.variant.items())]
        )

    @property
    def bound_frac(self) -> float:
        """Return that of the fastest loop: attention's second one masks, a GEMM's are alike."""
        return max(map(sass.bound_frac, self.loops), default=0.0)


def candidates(name: str, sm: int) -> list[dict]:
    """Return the configurations of a kernel, the default first; {}: its launch takes no other."""
    return TUNING[f"sm_{sm}"].get(name, [{}])


def compile_launch(name: str, sm: int, config: dict, variant: dict):
    """Return (compiled kernel, its launch's options): bf16, no GPU, but no TRITON_INTERPRET either.

    Pointers and integers are compiled as multiples of 16, which they are at phi-1's shape.
    """
    fn, args = KERNELS[name].fn, record(name, sm, config, variant)
    constants = {p.name: args[p.name] for p in fn.params if p.is_constexpr or args[p.name] is None}
    types = {n: "constexpr" if n in constants else type_of(args[n]) for n in fn.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] in "*i"}
    source = ASTSource(fn, types, constants, attrs)
    options = {k: args[k] for k in OPTIONS if k in args}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options), options


def measure(name: str, sm: int, config: dict, variant: dict) -> Row:
    """Compile one configuration and read its needs from ptxas and the PTX."""
    default = config == candidates(name, sm)[0]
    try:
        compiled, options = compile_launch(name, sm, config, variant)
    except Exception as e:  # Triton's passes and ptxas fail in many ways; each means "does not fit"
        problem = f"{type(e).__name__}: {e}".splitlines()[0]
        return Row(name, sm, default, config, variant, 0, 0, 0, 0.0, 0, 0, (problem,))
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spills = _ptxas(ptx)
    multiplies = "tt.dot" in compiled.asm["ttir"]
    code = sass.disassemble(compiled.asm["cubin"])[1] if multiplies or spills else []
    inner = sass.inner_loops(code)
    loop_spills = sum(map(sass.spill_bytes, inner or [code]))  # all of it, where nothing multiplies
    moved = sass.tma_bytes(compiled.asm["ttgir"])
    loops = tuple(sass.cycles(x, sm, options["num_warps"], moved) for x in inner)
    count = {key: len(re.findall(regex, ptx)) for key, regex in INSTRUCTIONS.items()}
    problems = []
    if loop_spills:
        problems.append(f"spills {loop_spills} bytes in a loop")
    if shared > SHARED_PER_BLOCK_BYTES[sm]:
        problems.append(f"shared memory above {SHARED_PER_BLOCK_BYTES[sm]:,} bytes")
    if multiplies and not count["mma"]:
        problems.append("no tensor-core instructions")
    occupancy = occupancy_frac(sm, registers, shared, options["num_warps"])
    return Row(
        name, sm, default, config, variant, registers, spills, shared, occupancy,
        count["mma"], count["async_copies"], tuple(problems), loops,
    )  # fmt: skip


def _ptxas(ptx: str) -> tuple[int, int]:
    """Return (registers a thread, bytes of spill stores and loads), from Triton's ptxas."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        command = [ptxas, "-v", f"--gpu-name={target}", f.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return int(re.search(r"Used (\d+) registers", log)[1]), spills


def occupancy_frac(sm: int, registers: int, shared_bytes: int, warps: int) -> float:
    """Return the warps that can be resident on an SM, over 64."""
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        BLOCKS_PER_SM,
        WARPS_PER_SM // warps,
        REGISTERS_PER_SM // per_warp // warps,
        SHARED_PER_SM_BYTES[sm] // (shared_bytes + SHARED_RESERVED_BYTES),
    )
    return blocks * warps / WARPS_PER_SM


def show(row: Row) -> str:
    """Return lines: kernel, configuration, needs, problems; then a line a loop."""
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
        tflops = sass.bound_frac(busy) * PEAK_FLOPS[GPU[row.sm]] / 1e12
        lines.append(f"{'':6}loop: {pipes}: {max(busy, key=busy.get)} bound, {tflops:.0f} TFLOP/s")
    return "\n".join(lines)


def blocks(config: dict) -> float:
    """Return how many 64 x 64 scores, or 128 x 128 x 64 of a GEMM, a turn does; else 1."""
    if "BM" in config:
        return config["BM"] * config["BN"] / 64**2
    return (
        config.get("BLOCK_M", 0) * config.get("BLOCK_N", 0) * config.get("BLOCK_K", 0) / 2**20 or 1
    )


def prune(rows: list[Row]) -> None:
    """Delete from tuning.json the configurations of `rows` that have problems."""
    unfit = [(r.kernel, r.sm, r.config) for r in rows if r.problems]
    for name, sm in dict.fromkeys((r.kernel, r.sm) for r in rows):
        tried = [r.config for r in rows if (r.kernel, r.sm) == (name, sm)]
        fit = [c for i, c in enumerate(tried) if c not in tried[:i] and (name, sm, c) not in unfit]
        if not fit:
            raise UserError(
                f"sm_{sm} {name}: no configuration fits; add smaller ones to tuning.json"
            )
        if fit != [{}]:
            TUNING[f"sm_{sm}"][name] = fit
    for sm in ("sm_80", "sm_90"):
        for name in TUNING[sm].keys() - KERNELS.keys():
            del TUNING[sm][name]
    write_tuning()


def hold_bounds(rows: list[Row], record: bool) -> list[Row]:
    """Return `rows`, with a problem where a default is below bounds.json; `record` updates that."""
    table = json.loads(BOUNDS_FILE.read_text()) if BOUNDS_FILE.exists() else {}
    floors, held = table.setdefault(triton.__version__, {}), []
    if record:
        floors |= {r.case: round(r.bound_frac, 3) for r in rows if r.default and r.loops}
        BOUNDS_FILE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    for r in rows:
        floor = floors.get(r.case, 0) if r.default else 0
        low = f"bound {r.bound_frac:.3f} of peak, was {floor}: if that is meant, --record it"
        below = r.bound_frac < floor - BOUND_SLACK
        held.append(replace(r, problems=(*r.problems, low)) if below else r)
    return held


def main() -> None:
    config = parse(Config)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("TRITON_INTERPRET is set: nothing is compiled then; unset it")
    if config.sm not in (0, 80, 90):
        raise UserError(f"--sm={config.sm}: want 80 or 90")
    if config.prune and config.defaults:
        raise UserError("--prune looks at every configuration, --defaults at one: choose")
    jobs = []
    for name, kernel in KERNELS.items():
        for sm in (config.sm,) if config.sm else (80, 90):
            configs = candidates(name, sm)[: 1 if config.defaults else None]
            jobs += [(name, sm, c, v) for c in configs for v in kernel.variants]
    jobs = [job for job in jobs if config.kernel in job[0]]
    if not jobs:
        raise UserError(f"--kernel={config.kernel}: no kernel has that in its name")
    with ProcessPoolExecutor(JOBS) as pool:
        results = pool.map(measure, *zip(*jobs))
        rows = list(tqdm(results, total=len(jobs), disable=None, unit="configuration"))
    if not config.prune:
        rows = hold_bounds(rows, config.record)
    if config.json:
        rows_json = [dataclasses.asdict(r) | {"bound_frac": r.bound_frac} for r in rows]
        print(json.dumps(rows_json, indent=1))
    else:
        print(f"{'':6}{'kernel':<35}regs spills   shared   occ  mma  async  configuration")
        print("\n".join(map(show, rows)))
    if config.prune:
        prune(rows)
        return
    failed = [r for r in rows if r.default and r.problems]
    for row in failed:
        print(f"error: default {show(row)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
