"""Count the cycles each SM pipe is busy per iteration of a kernel's matmul loops, from SASS.

No schedule beats the slowest pipe: bound_frac is the share of the tensor cores' peak it allows.
Only innermost loops with tensor-core instructions count. A block that an iteration may skip counts
only if it has such instructions: attention's backward masks there on sm_90.

The bound is a ceiling, not a prediction. It ignores latency, bank conflicts, L2, device memory and
atomics. At head dim 64 and sequence 2048, causal, FlashAttention-2's forward and the Triton
tutorial's reach 0.48 and 0.49 of it on an A100 (150 and 152 TFLOP/s of 312); the tutorial's forward
and backward reach 0.24 and 0.28 on an H100 (triton issue 5437).

Rates: CUDA C++ programming guide, "Throughput of native arithmetic instructions", 8.0 and 9.0.
Pipe of each opcode: Nsight Compute's profiling guide, "Pipelines".
"""

import math
import re
import subprocess
import tempfile
from pathlib import Path

import triton

# FLOP per cycle and SM, bf16: data sheets' 312 TFLOP/s / (108 SMs x 1.41 GHz), 989 / (132 x 1.83)
TENSOR_FLOP = {80: 2048, 90: 4096}
SHARED_BYTES = 128  # per cycle and SM: 32 banks of 4 bytes
SCHEDULERS = 4  # per SM; each issues one instruction a cycle
LANES = {80: {"fma": 64, "alu": 64, "xu": 16}, 90: {"fma": 128, "alu": 64, "xu": 16}}
IMAD_LANES = 64  # the other 64 fma lanes of sm_90 do floats only
# Opcodes up to the first dot. Others (loads, branches, uniform path) only take an issue slot.
PIPES = {
    "fma": "FFMA FMUL FADD HFMA2 HMUL2 HADD2 IMAD IDP",
    "alu": "IADD IADD3 VIADD LOP3 PLOP3 SHF LEA PRMT SGXT BMSK IABS MOV SEL FSEL F2FP"
    " ISETP FSETP FSET HSETP2 HSET2 IMNMX FMNMX HMNMX2 VIMNMX VHMNMX",
    "xu": "MUFU F2I I2F F2F I2I FRND POPC FLO BREV",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


def disassemble(cubin: bytes) -> list[str]:
    """Return a cubin's labels ("x:") and instructions, in order."""
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [nvdisasm, "-c", "-ndf", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^(\.L_\w+:)|^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", text, re.MULTILINE)
    return [label or code for label, code in lines]


def flow_graph(lines: list[str]) -> tuple[list[list[str]], list[list[int]], list[list[int]]]:
    """Return (basic blocks, predecessors of each, successors of each)."""
    blocks, at = [[]], {}  # at: label -> index of its block
    for line in lines:
        if blocks[-1] and (line[-1] == ":" or re.search(r"\b(BRA|CALL|EXIT)\b", blocks[-1][-1])):
            blocks.append([])
        if line[-1] == ":":
            at[line[:-1]] = len(blocks) - 1
        else:
            blocks[-1].append(line)
    before, after = [[] for _ in blocks], [[] for _ in blocks]
    for i, block in enumerate(blocks):
        last = "".join(block[-1:])
        if to := re.search(r"\b(?:BRA|CALL)\b.*\((\.\w+)\)", last):
            after[i].append(at[to[1]])
        if i + 1 < len(blocks) and not re.match(r"BRA\S* `|EXIT", last):
            after[i].append(i + 1)
        for j in after[i]:
            before[j].append(i)
    return blocks, before, after


def inner_loops(lines: list[str]) -> list[list[str]]:
    """Return the instructions of each innermost loop with tensor-core instructions.

    Natural loops: a back edge to a dominating block, and the blocks that reach that edge.
    """
    blocks, before, after = flow_graph(lines)
    dominators, changed = [set(range(len(blocks))) for _ in blocks], True
    while changed:
        changed = False
        for i, old in enumerate(dominators):
            common = set.intersection(*(dominators[j] for j in before[i])) if before[i] else set()
            dominators[i] = common | {i}
            changed |= dominators[i] != old
    body, always = {}, {}  # by loop header: all blocks, and blocks run every iteration
    for i, dominator in enumerate(dominators):
        for first in dominator.intersection(after[i]):
            inside, todo = body.setdefault(first, {first}), [i]
            while todo:
                if (j := todo.pop()) not in inside:
                    inside.add(j)
                    todo += before[j]
            always[first] = always.get(first, dominator) & dominator
    matmul = {i for i, block in enumerate(blocks) if any(map(tensor_flop, block))}
    found = {first: inside for first, inside in body.items() if inside & matmul}
    inner = [x for x in sorted(found) if not any(other < found[x] for other in found.values())]
    counted = ([blocks[i] for i in sorted(found[x] & (always[x] | matmul))] for x in inner)
    # strip predicates: the instruction issues either way
    return [[re.sub(r"^@\S+\s+", "", c) for block in loop for c in block] for loop in counted]


def tensor_flop(instruction: str) -> float:
    """Return a warp's tensor-core FLOP; four warps share a wgmma, so each counts a quarter."""
    if m := re.search(r"\bHMMA\.(16)(8)(8|16)\.|\bHGMMA\.(64)x(\d+)x(16)\.", instruction):
        rows, cols, depth = map(int, filter(None, m.groups()))
        return 2 * rows * cols * depth / (4 if m[4] else 1)
    return 0


def shared_bytes(instruction: str) -> float:
    """Return the shared-memory bytes a warp occupies, in bandwidth: at least 128 if any."""
    opcode, _, operands = instruction.partition(" ")
    if m := re.match(r"HGMMA\.64x(\d+)x16", opcode):  # B, and A unless in registers
        a_rows = 0 if re.match(r"R\d+, R\d+", operands) else 64
        return (int(m[1]) + a_rows) * 16 * 2 / 4
    if re.match("LDSM|STSM", opcode):
        return 128 * int(opcode[-1]) if opcode[-2:] in (".2", ".4") else 128
    if re.match("LDS|STS|LDGSTS|ATOMS", opcode):
        return 32 * 4 * (4 if ".128" in opcode else 2 if ".64" in opcode else 1)
    return 128 if opcode.startswith("SHFL") else 0  # same pipe, 32 lanes a cycle


def spill_bytes(loop: list[str]) -> int:
    """Return the bytes a thread moves to and from local memory in one iteration."""
    found = (re.search(r"\b(?:LDL|STL)(?:\.\w+)*?(?:\.(64|128))?\b", line) for line in loop)
    return sum(int(m[1] or 32) // 8 for m in found if m)


def tma_bytes(ttgir: str) -> int:
    """Return the bytes TMA moves per iteration of the first innermost loop with a matmul."""
    indented = r"(?=^( *)\S.*scf\.for .*\n((?:\1 .*\n)*))"
    for _, body in re.findall(indented, ttgir, re.MULTILINE):
        if "scf.for" not in body and re.search(r"\bdot |_dot ", body):
            moved = re.findall(r"async_tma.*tensordesc<(?:tensor<)?([\dx]+)x[a-z]+(\d+)", body)
            return sum(math.prod(map(int, shape.split("x"))) * int(n) // 8 for shape, n in moved)
    return 0


def cycles(loop: list[str], sm: int, warps: int, tma_bytes: int = 0) -> dict[str, float]:
    """Return the busy cycles of each SM pipe for one iteration of a block of `warps` warps."""
    slots, imads = dict.fromkeys(PIPES, 0), 0
    for code in loop:
        opcode, *suffixes = code.split(" ")[0].split(".")
        is_imad = opcode == "IMAD"
        wide = 1 + (is_imad and not {"WIDE", "HI"}.isdisjoint(suffixes))  # 64 bits: assumed twice
        imads += wide * is_imad
        if opcode in PIPE_OF:
            slots[PIPE_OF[opcode]] += wide
    pipes = {pipe: 32 * warps * n / LANES[sm][pipe] for pipe, n in slots.items()}
    pipes["fma"] = max(pipes["fma"], 32 * warps * imads / IMAD_LANES)
    return {
        "tensor": warps * sum(map(tensor_flop, loop)) / TENSOR_FLOP[sm],
        "shared": (warps * sum(map(shared_bytes, loop)) + tma_bytes) / SHARED_BYTES,
        "issue": warps * len(loop) / SCHEDULERS,
    } | pipes


def bound_frac(busy: dict[str, float]) -> float:
    """Return the share of the tensor cores' peak that the slowest pipe allows."""
    return busy["tensor"] / max(busy.values())
