"""Cost model of a training step: FLOPs, bytes and floor of each op on a GPU, and tokens/s.

    python -m bench.cost configs/phi1.toml --gpu h100

An op's floor is the larger of FLOPs / FLOP rate and bytes / bandwidth. Each operand is read once,
each result written once. Activations and weights take 2 bytes; weight gradients and optimiser
states are fp32. GELU, biases, dropout and residuals count as fused into GEMMs. Rotary embedding
and elementwise FLOPs are free. Launches, gaps and communication are not counted. Attention's
backward runs five matmuls; MFU counts four, over the data sheet's dense peak. The prediction is a
range, at the slow and fast rates of published kernels.
"""

import math
from dataclasses import dataclass

from bench.table import Table
from common.config import UserError, parse, run
from common.muon import COEFFICIENTS
from common.runlog import PEAK_FLOPS
from model import ModelConfig, flops_per_token, parameter_count
from train import TrainConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    """Print each op's floor for a step of CONFIG.toml on one GPU, and the resulting tokens/s."""

    gpu: str = "h100"  # a100-40, a100-80, h100 or h200


@dataclass(frozen=True)
class Op:
    """Work of one kernel, launched `calls` times per micro-step, or per step in the optimiser."""

    name: str
    phase: str  # forward, backward (per micro-step) or optimiser (per step)
    kind: str  # field of Rates that bounds it: gemm, attention_fwd, attention_bwd or memory
    calls: int
    flops: int  # tensor-core FLOPs of one call
    bytes: int


@dataclass(frozen=True)
class Rates:
    gemm: float  # this and attention: FLOP/s
    attention_fwd: float
    attention_bwd: float
    memory: float  # bytes/s

    def floor_us(self, op: Op) -> tuple[float, str]:
        """Return (microseconds of one call, "compute" or "memory" bound)."""
        compute_s = op.flops / getattr(self, op.kind) if op.flops else 0.0
        memory_s = op.bytes / self.memory
        return max(compute_s, memory_s) * 1e6, "compute" if compute_s > memory_s else "memory"


def training_ops(c: ModelConfig, micro_batch: int, optimizer: str = "adamw") -> list[Op]:
    """Return the ops of a micro-step of `micro_batch` sequences and of the optimiser, in order."""
    T, C, M, V, L = c.seq_len, c.width, c.mlp_width, c.vocab_size, c.n_layer
    N, qkvu, lse = micro_batch * T, 3 * C + M, 4 * micro_batch * T * c.n_head
    parameters = parameter_count(c)
    head_flops, causal = 2 * N * C * V, 2 * N * T * C  # causal: half of two T x T matmuls a head
    ops: list[Op] = []

    def gemm(name: str, calls: int, flops: int, elements: int, fp32: int = 0) -> None:
        ops.append(Op(name, phase, "gemm", calls, flops, 2 * elements + 4 * fp32))

    def memory(name: str, calls: int, elements: int, fp32: int = 0) -> None:
        ops.append(Op(name, phase, "memory", calls, 0, 2 * elements + 4 * fp32))

    phase = "forward"
    memory("embedding_fwd", 1, 2 * N * C)
    memory("layernorm_fwd", L, 2 * N * C)
    gemm("in_proj_fwd", L, 2 * N * C * qkvu, N * C + qkvu * C + N * qkvu + N * M)
    ops.append(Op("attention_fwd", phase, "attention_fwd", L, causal, 2 * N * 4 * C + lse))
    gemm("out_proj_fwd", L, 2 * N * C * (C + M), N * (C + M) + C * (C + M) + 2 * N * C)
    memory("ln_f_fwd", 1, 2 * N * C)
    gemm("head_fwd", 1, head_flops, N * C + V * C + N * V)
    memory("cross_entropy", 1, 2 * N * V)  # the gradient takes the logits' place

    phase = "backward"
    gemm("head_dx", 1, head_flops, N * V + V * C + N * C)
    gemm("head_dw", 1, head_flops, N * V + N * C, fp32=2 * V * C)
    memory("head_db", 1, N * V)
    memory("ln_f_bwd", 1, 3 * N * C)
    memory("residual_bwd", L, (3 if c.dropout else 1) * N * C)  # dropout writes two gradients
    gemm("attention_out_dx", L, 2 * N * C * C, 2 * N * C + C * C)
    gemm("gelu_bwd", L, 2 * N * C * M, N * C + C * M + 3 * N * M)
    gemm("out_proj_dw", L, 2 * N * C * (C + M), 2 * N * C + N * (C + M), fp32=2 * C * (C + M))
    executed = causal * 5 // 2  # MFU counts four matmuls of five
    moved = 2 * N * 8 * C + lse  # qkv, out and its gradient in, dqkv out
    ops.append(Op("attention_bwd", phase, "attention_bwd", L, executed, moved))
    memory("attention_db", L, 3 * N * C)
    gemm("in_proj_dw", L, 2 * N * C * qkvu, N * qkvu + N * C, fp32=2 * qkvu * C)
    gemm("in_proj_dx", L, 2 * N * C * qkvu, N * qkvu + qkvu * C + N * C)
    memory("layernorm_bwd", L, 4 * N * C)
    memory("embedding_bwd", 1, N * C, fp32=2 * N * C)

    phase = "optimiser"
    memory("gradient_norm", 1, 0, fp32=parameters)
    # Reads gradient, weight, both moments; writes weight, moments, bf16 weight; clears gradient.
    matrices = L * (C * qkvu + C * (C + M)) if optimizer == "muon" else 0
    memory("adamw", 1, parameters - matrices, fp32=8 * (parameters - matrices))
    if matrices:
        # Reads gradient and momentum, writes momentum and update; then weights, in fp32 and bf16.
        memory("momentum", 1, 3 * matrices, fp32=5 * matrices)
        # q, k, v and attention; up and down. Gram matrix, 4 matmuls of its size per iteration,
        # final product. TF32 runs at half of bf16's rate: FLOPs count twice.
        for name, n, rows, cols in (("muon_attention", 4, C, C),
                                    ("muon_mlp", 2, max(C, M), min(C, M))):  # fmt: skip
            matmuls = 4 * rows * cols**2 + len(COEFFICIENTS) * 8 * cols**3
            moved = 3 * rows * cols + len(COEFFICIENTS) * 12 * cols**2
            gemm(name, L, 2 * n * matmuls, 0, fp32=n * moved)
    return ops


def step_us(ops: list[Op], rates: Rates, micro_steps: int) -> float:
    """Return the microseconds of a step: `micro_steps` micro-steps and one optimiser update."""
    times = {"forward": micro_steps, "backward": micro_steps, "optimiser": 1}
    return sum(rates.floor_us(op)[0] * op.calls * times[op.phase] for op in ops)


@dataclass(frozen=True)
class Gpu:
    family: str  # key of REACHED and RECORDS
    memory: float  # bytes torch sees
    bandwidth: float  # bytes/s of device memory
    nvlink: float  # bytes/s of a collective per GPU within a node ("bus bandwidth")
    network: float  # the same, between nodes

    @property
    def peak(self) -> float:
        return PEAK_FLOPS[self.family.upper()]  # dense bf16 FLOP/s

    def roof(self) -> Rates:
        """Return the data sheet rates."""
        return Rates(self.peak, self.peak, self.peak, self.bandwidth)

    def reached(self) -> tuple[Rates, Rates]:
        """Return the slow and fast rates of published kernels."""
        slow, fast = ([x * 1e12 for x in tflops] for tflops in REACHED[self.family])
        return Rates(*slow, 0.80 * self.bandwidth), Rates(*fast, 0.90 * self.bandwidth)


# memory     "total capacity" in torch's out-of-memory messages (H200: one we used)
# bandwidth  data sheets: A100 SXM 40 and 80 GB, H100 SXM, H200 SXM
# nvlink     nccl-tests on 8 GPUs: 232 GB/s (github.com/NVIDIA/nccl-tests issue 175); 370 (212)
# network    192 GB/s a DGX A100 of 8 x 200 Gb/s InfiniBand (github.com/NVIDIA/nccl issue 812); 46
#            to 48 GB/s a 400 Gb/s card (nccl-tests issue 290)
GPUS = {
    "a100-40": Gpu("a100", 39.50 * 2**30, 1.555e12, 232e9, 24e9),
    "a100-80": Gpu("a100", 79.25 * 2**30, 2.04e12, 232e9, 24e9),
    "h100": Gpu("h100", 79.11 * 2**30, 3.35e12, 370e9, 46e9),
    "h200": Gpu("h200", 139.0 * 2**30, 4.80e12, 370e9, 46e9),
}
NODE = 8  # GPUs a node, all on NVLink, one network card each
# TFLOP/s of published kernels, slow and fast: large GEMMs, attention forward, attention backward
#   a100  cuBLAS 235 and 250 in large bf16 GEMMs; FlashAttention-2 at head dim 64 and sequence 2048,
#         causal, forward and backward together: 126 and 140 (arXiv 2307.08691, figures 4 to 6)
#   h100  cuBLAS 720 and 798; causal forward 342 (Triton) and 371 (FlashAttention-3, arXiv
#         2407.08608); backward 250, and 345: assumed, 0.82 of its 422 without a mask
#   h200  the same chip; 715 published, 788 and 782 measured in an 8192^3 matmul (2026-10, -11)
# Bandwidth: large copies reach 0.90 of the data sheet on an H100 and an H200 (2026-10, -11).
# Assumed: the A100's 0.90, and 0.80 for kernels with more streams.
REACHED = {
    "a100": ((235, 126, 126), (250, 140, 140)),
    "h100": ((720, 342, 250), (798, 371, 345)),
    "h200": ((715, 342, 250), (788, 371, 345)),
}
# MFU of published runs of 1B models on eight GPUs unless named: phi-1's paper, 770 h for
# 50.3B tokens; LLM Foundry's tables; FlashAttention-2 (arXiv 2307.08691, table 1); nanochat; LLMQ.
RECORDS = {
    "a100": {"phi-1": 0.494, "LLM Foundry 1B": 0.557, "FlashAttention-2 1.3B": 0.586},
    "h100": {"LLM Foundry 1B": 0.389, "nanochat d24": 0.480, "LLMQ 1.5B, one GPU": 0.566},
}
# The H200 is an H100 with more bandwidth; ours: bench.step at 8 x 2048 (LOG.md).
RECORDS["h200"] = RECORDS["h100"] | {"nanophi, one GPU": 0.465}
# NCCL 2.30's cost model (src/graph/tuning.cc, "simple" protocol), seconds: start of a collective,
# NVLink hop, network hop; then a tree's share of a ring's bandwidth.
START_S, NVLINK_HOP_S, NETWORK_HOP_S, TREE_FRAC = 8.4e-6, 3.4e-6, 14e-6, 0.92


def find_gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"gpu is {name!r}, want one of {', '.join(GPUS)}")
    return GPUS[name]


def fractions(family: str) -> dict[str, float]:
    """Return {published run: its MFU / roofline MFU of fast kernels at phi-1's shape}."""
    c, gpu = ModelConfig(), GPUS.get(family, GPUS["a100-80"])
    us = step_us(training_ops(c, 16), gpu.reached()[1], 8) / (8 * 16 * c.seq_len)
    roofline_mfu = flops_per_token(c) / us * 1e6 / gpu.peak
    return {name: mfu / roofline_mfu for name, mfu in RECORDS[family].items()}


def collective_s(n_bytes: float, ranks: int, nodes: int, passes: int, gpu: Gpu) -> float:
    """Return the seconds of an all-gather or reduce-scatter (one pass), or an all-reduce (two).

    `ranks` are spread evenly over `nodes`; an all-reduce between nodes is a ring or a tree.
    """
    if ranks == 1:
        return 0.0
    each = ranks // nodes
    bandwidth = gpu.nvlink if nodes == 1 else min(gpu.nvlink, each * gpu.network)
    moving_s, network_hops = passes * (ranks - 1) / ranks * n_bytes / bandwidth, nodes - 1
    ring_s = (ranks - 1 - network_hops) * NVLINK_HOP_S + network_hops * NETWORK_HOP_S
    ring_s = START_S + passes * ring_s + moving_s
    if passes == 1 or nodes == 1:
        return ring_s
    tree_s = (each - 1) * NVLINK_HOP_S + math.log2(nodes) * NETWORK_HOP_S
    return min(ring_s, START_S + passes * tree_s + moving_s / TREE_FRAC)


def main() -> None:
    c = parse(Config, toml=True, hidden=TrainConfig)
    gpu, micro_steps, table = find_gpu(c.gpu), max(1, c.seqs_per_step // c.micro_batch), Table()
    ops, tokens = training_ops(c.model, c.micro_batch, c.optimizer), c.micro_batch * c.seq_len
    roof, (slow, fast) = gpu.roof(), gpu.reached()
    for op in ops:
        (floor_us, bound), (slow_us, _), (fast_us, _) = (r.floor_us(op) for r in (roof, slow, fast))
        each = tokens * (micro_steps if op.phase == "optimiser" else 1)
        table(
            op=op.name, phase=op.phase, bound=bound, calls=op.calls, gflop=op.flops / 1e9,
            mb=op.bytes / 1e6, floor_us=floor_us, fast_us=fast_us, slow_us=slow_us,
            ns_per_token=floor_us * op.calls * 1e3 / each,
        )  # fmt: skip
    print()
    flops, best = flops_per_token(c.model), max(RECORDS[gpu.family].items(), key=lambda r: r[1])
    for name, rates in {"data sheet": roof, "slow": slow, "fast": fast}.items():
        us = step_us(ops, rates, micro_steps)
        rate = tokens * micro_steps / us * 1e6
        table(kernels=name, tokens_per_s=rate, mfu_frac=rate * flops / gpu.peak, step_ms=us / 1e3)
    print(f"published record: {best[1]:.1%} MFU ({best[0]})")


if __name__ == "__main__":
    run(main)
