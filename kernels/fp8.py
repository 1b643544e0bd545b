"""FP8 matrix products with per-tensor scaling (scales from the current tensors, no history).

    quantise    q = x / s in fp8, s = max |x| / (largest number of the format)
    products    y = x w^T + b, dx = dy w, dw = dy^T x, on quantised operands times both scales

Formats: e4m3 (4 exponent, 3 mantissa bits, up to 448) for weights and activations, e5m2 (up to
57,344) for gradients of activations; Micikevicius et al. 2022, arXiv 2209.05433. Accumulation is
fp32; y and dx have x's dtype, dw is fp32. NaN or inf in x makes its products NaN: training skips
the step. torch._scaled_mm multiplies on sm_90 or later; a CPU emulates it in fp32, equal up to
summation order.

Layout: fp8 tensor cores want the summed dimension contiguous in both operands. dx needs w
transposed, dw both operands; `quantise` copies with PyTorch, as 8-bit transposes in Triton 3.6.0
came out wrong on an H200. Not rerun on a GPU since, speed unmeasured (LOG.md, 2026-11-28).
"""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # fp8 tensor cores: every dimension is a multiple of this


class Quantised(NamedTuple):
    """A matrix x [R, S] in fp8."""

    rows: Tensor | None  # [R, S], for products that sum over S
    columns: Tensor | None  # [S, R], transposed copy, for products that sum over R
    scale: Tensor  # fp32 []: x = scale * rows


def quantise(x: Tensor, dtype: torch.dtype, rows: bool = True, columns: bool = False) -> Quantised:
    """Quantise x [R, S] (rows may be strided) to `dtype`, in the requested layouts."""
    amax = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    scale = amax.clamp(min=1e-30) / torch.finfo(dtype).max
    if x.is_cuda:
        from kernels import pointwise  # lazy: a CPU install may lack triton

        q = pointwise.quantise(x, scale, dtype)
    else:
        q = (x.float() / scale).to(dtype)
    return Quantised(q if rows else None, q.t().contiguous() if columns else None, scale)


def emulated(x: Tensor) -> bool:
    """Return whether products with x are emulated in fp32."""
    return not x.is_cuda


def product(a: Tensor, b: Tensor, scales: tuple, dtype: torch.dtype, bias=None) -> Tensor:
    """Return scales[0] scales[1] a b^T + bias [R, J] in `dtype`, for fp8 a [R, K] and b [J, K]."""
    if emulated(a):
        out = (a.float() @ b.float().t()) * (scales[0] * scales[1])
        return (out if bias is None else out + bias.float()).to(dtype)
    fused = None if dtype == torch.float32 else bias  # cuBLAS fuses no bias into fp32 output
    fast = a.dtype == b.dtype == E4M3  # forward tolerates lower-precision sums
    out = torch._scaled_mm(a, b.t(), *scales, fused, out_dtype=dtype, use_fast_accum=fast)
    return out if fused is bias else out + bias


def forward(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x w^T + bias [N, J] in fp8, for x [N, K] and w [J, K]."""
    qx, qw = quantise(x, E4M3), quantise(w, E4M3)
    return product(qx.rows, qw.rows, (qx.scale, qw.scale), x.dtype, bias)


def grad_x(dy: Quantised, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dx = dy w [N, K] in `dtype` for dy [N, J] and w [J, K]."""
    qw = quantise(w, E4M3, rows=False, columns=True)
    return product(dy.rows, qw.columns, (dy.scale, qw.scale), dtype)


def grad_w(dy: Quantised, x: Tensor) -> Tensor:
    """Return dw = dy^T x [J, K] in fp32 for dy [N, J], quantised with `columns`, and x [N, K]."""
    qx = quantise(x, E4M3, rows=False, columns=True)
    return product(dy.columns, qx.columns, (dy.scale, qx.scale), torch.float32)


def accumulate_(dw: Tensor, dy: Quantised, x: Tensor, beta: float) -> None:
    """Write dw = beta dw + dy^T x; the fp8 counterpart of gemm.accumulate_."""
    grad = grad_w(dy, x)
    dw.copy_(grad) if beta == 0 else torch.add(grad, dw, alpha=beta, out=dw)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(x, w)
        return forward(x.flatten(0, -2), w, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        rows = dy.flatten(0, -2).contiguous()
        q = quantise(rows, E5M2, columns=True)
        dw = grad_w(q, x.flatten(0, -2)).to(w.dtype)
        return grad_x(q, w, x.dtype).view(x.shape), dw, rows.sum(0, dtype=torch.float32).to(w.dtype)


def linear(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Return x w^T + bias [..., J] for x [..., K], w [J, K], bias [J]; differentiable in all."""
    return _Linear.apply(x, w, bias)


def unsupported(device: torch.device, **dims: int) -> str:
    """Return why `device` cannot multiply these dimensions in fp8, or "" if it can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_90, which fp8 needs"
    odd = [f"{name} {n}" for name, n in dims.items() if n % MULTIPLE]
    return f"{odd[0]} is not a multiple of {MULTIPLE}" if odd else ""
