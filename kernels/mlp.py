"""Projections of a parallel block: out = x + drop1(y Wa^T + ba) + drop2(gelu(u) Wm^T + bm).

    in_proj    [qkv | u] = h w_in^T + b_in         w_in: [3C + M, C], attention's rows first
    out_proj   out as above                        w_out = [Wa | Wm]: [C, C + M]
    backward   d1, d2 = drop1(dout), drop2(dout);  dWa += d1^T y, dWm += d2^T a, dy = d1 Wa
               du = (d2 Wm) gelu'(u);  dw_in += [dqkv | du]^T h, dh = [dqkv | du] w_in
               bias gradients are column sums of d1, d2 and [dqkv | du]

h = LayerNorm(x) and y, the attention output, are [N, C]; gelu is the tanh form. A block saves h (or
x), qkv, y and u; backward recomputes a = gelu(u) along with du. bf16 or fp16 activations, rounded
when stored; fp32 accumulation; weight gradients add into the caller's fp32 buffer. 2 C (7C + 5C)
FLOP a row forward at M = 4C, twice that backward.

Each op with an epilogue worth fusing has two versions; `choice` picks one per device:
    "triton"   one kernel of gemm.py with a fused epilogue
    "cublas"   torch.mm plus a memory-bound kernel of pointwise.py
HBM traffic of the second kernel of "cublas" at N = 32768, C = 2048, M = 8192 in bf16:
    in_proj_fwd    read u, write a                              1.07 GB
    out_proj_fwd   read two products and x, write out           0.54 GB
    gelu_bwd       read da and u, write du and a                2.15 GB
A Triton GEMM wins if it trails cuBLAS by less than that kernel's time. One H200 (LOG.md,
2026-11-28) ran "cublas": GEMMs at 92% (d2 Wm) to 101% of the matmul roof, pointwise kernels at 89
to 98% of the copy rate, residual_bwd and column_sum at 57%; "triton" was not timed. Both versions
agree up to rounding and are bitwise repeatable. `in_fp8`: "cublas" with products from fp8.py.
"""

import torch
from torch import Tensor

from kernels import fp8, gemm, pointwise
from kernels.gemm import accumulate_
from kernels.launch import capability, measured

# Defaults for a device that bench.tune has not measured; its winners are in tuning.json. Published
# figures: cuBLAS beats plain Triton GEMMs on sm_90 and is close to them on sm_80.
GEMM = {
    80: {"in_proj_fwd": "triton", "out_proj_fwd": "triton", "gelu_bwd": "triton"},
    90: {"in_proj_fwd": "cublas", "out_proj_fwd": "cublas", "gelu_bwd": "cublas"},
}


def choice(op: str, x: Tensor) -> str:
    """Return "triton" or "cublas" for `op` on x's device; fp32 on a GPU is always "cublas"."""
    if x.is_cuda and x.dtype == torch.float32:
        return "cublas"
    sm = capability(x)
    return measured(sm)["gemm"].get(op) or GEMM[sm][op]


def describe(device: torch.device) -> str:
    """Return a log line with each op's version for half precision on `device`."""
    x = torch.empty(0, dtype=torch.bfloat16, device=device)
    tuned = measured(capability(x))["device"]
    where = f"tuned on {tuned}" if tuned else "untuned defaults"
    return ", ".join(f"{op} {choice(op, x)}" for op in GEMM[80]) + f" ({where})"


def in_proj_fwd(
    h: Tensor, w_in: Tensor, b_in: Tensor, in_fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ([qkv | u] [N, 3C + M], a = gelu(u) [N, M]) for h [N, C]."""
    n_rows, width = h.shape
    a = torch.empty((n_rows, w_in.shape[0] - 3 * width), dtype=h.dtype, device=h.device)
    if not in_fp8 and choice("in_proj_fwd", h) == "triton":
        qkvu = torch.empty((n_rows, w_in.shape[0]), dtype=h.dtype, device=h.device)
        gemm.in_proj_fwd(h, w_in, b_in, qkvu, a)
    else:
        qkvu = fp8.forward(h, w_in, b_in) if in_fp8 else torch.addmm(b_in, h, w_in.t())
        pointwise.gelu_fwd(qkvu[:, 3 * width :], a)
    return qkvu, a


def out_proj_fwd(
    y: Tensor, a: Tensor, w_out: Tensor, b_attn: Tensor, b_mlp: Tensor, x: Tensor,
    p: float = 0.0, seed: int = 0, in_fp8: bool = False,
) -> Tensor:  # fmt: skip
    """Return x + drop(y Wa^T + b_attn) + drop(a Wm^T + b_mlp); y, x [N, C], a [N, M].

    Rows may be strided. The two dropout masks (drop probability `p`) depend only on `seed`.
    """
    width = y.shape[1]
    wa, wm = w_out[:, :width], w_out[:, width:]
    if in_fp8:
        z1, z2 = fp8.forward(y, wa), fp8.forward(a, wm)
    elif choice("out_proj_fwd", y) == "triton":
        return gemm.out_proj_fwd(y, a, w_out, b_attn, b_mlp, x, p, seed)
    else:
        z1, z2 = y @ wa.t(), a @ wm.t()
    return pointwise.residual_fwd(x, z1, b_attn, z2, b_mlp, p, seed)


def out_proj_bwd(
    dout: Tensor, y: Tensor, u: Tensor, w_out: Tensor, du: Tensor, dw_out: Tensor | None,
    beta: float = 1.0, p: float = 0.0, seed: int = 0, in_fp8: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dy, db_attn, db_mlp, db_up), the last three fp32.

    Writes du, and dw_out = beta dw_out + gradient. u and du [N, M] are the last M columns of
    [qkv | u] and of its gradient, so their rows are strided.
    """
    width = y.shape[1]
    wa, wm = w_out[:, :width], w_out[:, width:]
    d1, d2, db_attn, db_mlp = pointwise.residual_bwd(dout, p, seed)
    a = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    add_product_ = fp8.accumulate_ if in_fp8 else accumulate_
    if in_fp8:
        same, d1 = d1 is d2, fp8.quantise(d1, fp8.E5M2, columns=True)
        d2 = d1 if same else fp8.quantise(d2, fp8.E5M2, columns=True)
        dy = fp8.grad_x(d1, wa, y.dtype)
        db_up = pointwise.gelu_bwd(fp8.grad_x(d2, wm, u.dtype), u, du, a)
    else:
        dy = d1 @ wa
        if choice("gelu_bwd", u) == "triton":
            db_up = gemm.gelu_bwd(d2, wm, u, du, a)
        else:
            db_up = pointwise.gelu_bwd(d2 @ wm, u, du, a)
    if dw_out is not None:
        add_product_(dw_out[:, :width], d1, y, beta)
        add_product_(dw_out[:, width:], d2, a, beta)
    return dy, db_attn, db_mlp, db_up


def projections_reference(
    x: Tensor, h: Tensor, y: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor,
    b_attn: Tensor, b_mlp: Tensor, keep: tuple[Tensor, Tensor] | None = None, p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute (qkv, out) in plain torch; `keep` is the two dropout masks, [N, C] bool."""
    width = h.shape[1]
    qkv, u = torch.nn.functional.linear(h, w_in, b_in).tensor_split([3 * width], 1)
    a = torch.nn.functional.gelu(u, approximate="tanh")
    z1 = torch.nn.functional.linear(y, w_out[:, :width], b_attn)
    z2 = torch.nn.functional.linear(a, w_out[:, width:], b_mlp)
    if keep is not None:
        z1, z2 = (torch.where(k, z / (1 - p), 0) for k, z in zip(keep, (z1, z2)))
    return qkv, x + z1 + z2
