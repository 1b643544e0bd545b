"""The work of a training step: FLOPs and bytes of each op, and its floor at given rates.

An op's floor is the longer of FLOPs / FLOP rate and bytes / bandwidth. Bytes are those an op cannot
avoid: every operand read once, every result written once, activations and weights in 2 bytes,
weight gradients and optimiser states in fp32. The list is that of the fused kernels, in which GELU,
biases, dropout and residuals ride in GEMM epilogues; rotary embedding and elementwise FLOPs are
free. Not counted: launches, gaps between kernels, communication, kernels that could not be fused.

FLOPs are those executed; attention's backward runs five matmuls, of which MFU counts four, as it
does not count recomputed scores: the sum of what it counts is `model.flops_per_token`.
"""

from dataclasses import dataclass

from model import ModelConfig, flops_per_token, parameter_count


@dataclass(frozen=True)
class Op:
    """One kernel's worth of work; `calls` in each of its phase's micro-steps, or steps."""

    name: str
    phase: str  # forward, backward (of a micro-step) or optimiser (once a step)
    kind: str  # whose rate bounds it: gemm, attention_fwd, attention_bwd or memory
    calls: int
    flops: int  # on the tensor cores, in one call
    bytes: int
    counted_flops: int  # what MFU counts of them


@dataclass(frozen=True)
class Rates:
    """FLOP/s by kind of op, and bytes/s."""

    gemm: float
    attention_fwd: float
    attention_bwd: float
    memory: float

    def floor_us(self, op: Op) -> tuple[float, str]:
        """Microseconds of one call, and what bounds it."""
        compute_s = op.flops / getattr(self, op.kind) if op.flops else 0.0
        memory_s = op.bytes / self.memory
        return max(compute_s, memory_s) * 1e6, "compute" if compute_s > memory_s else "memory"


def training_ops(c: ModelConfig, micro_batch: int) -> list[Op]:
    """The ops of a micro-step of `micro_batch` sequences and of the optimiser's step, in order."""
    T, C, M, V, L = c.seq_len, c.width, c.mlp_width, c.vocab_size, c.n_layer
    N, qkvu, lse = micro_batch * T, 3 * C + M, 4 * micro_batch * T * c.n_head
    parameters = parameter_count(c)
    head_flops, causal = 2 * N * C * V, 2 * N * T * C  # causal: half of two T x T matmuls a head
    ops: list[Op] = []

    def gemm(name: str, calls: int, flops: int, elements: int, fp32: int = 0) -> None:
        ops.append(Op(name, phase, "gemm", calls, flops, 2 * elements + 4 * fp32, flops))

    def memory(name: str, calls: int, elements: int, fp32: int = 0) -> None:
        ops.append(Op(name, phase, "memory", calls, 0, 2 * elements + 4 * fp32, 0))

    phase = "forward"
    memory("embedding_fwd", 1, 2 * N * C)
    memory("layernorm_fwd", L, 2 * N * C)
    gemm("in_proj_fwd", L, 2 * N * C * qkvu, N * C + qkvu * C + N * qkvu + N * M)
    ops.append(Op("attention_fwd", phase, "attention_fwd", L, causal, 2 * N * 4 * C + lse, causal))
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
    executed, counted = causal * 5 // 2, causal * 2
    moved = 2 * N * 8 * C + lse  # qkv, out and its gradient in, dqkv out
    ops.append(Op("attention_bwd", phase, "attention_bwd", L, executed, moved, counted))
    memory("attention_db", L, 3 * N * C)
    gemm("in_proj_dw", L, 2 * N * C * qkvu, N * qkvu + N * C, fp32=2 * qkvu * C)
    gemm("in_proj_dx", L, 2 * N * C * qkvu, N * qkvu + qkvu * C + N * C)
    memory("layernorm_bwd", L, 4 * N * C)
    memory("embedding_bwd", 1, N * C, fp32=2 * N * C)

    phase = "optimiser"
    memory("gradient_norm", 1, 0, fp32=parameters)
    # Reads gradient, weight and both moments; writes the latter three and bf16 weights; clears.
    memory("adamw", 1, parameters, fp32=8 * parameters)

    per_token = sum(op.calls * op.counted_flops for op in ops) // N
    assert per_token == flops_per_token(c), (per_token, flops_per_token(c))
    return ops


def step_us(ops: list[Op], rates: Rates, micro_steps: int) -> float:
    """Microseconds of a step of `micro_steps` micro-steps and one of the optimiser."""
    return sum(
        rates.floor_us(op)[0] * op.calls * (1 if op.phase == "optimiser" else micro_steps)
        for op in ops
    )
