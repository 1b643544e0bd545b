"""Multiply matrices in 8 bits, with one scale per tensor, computed afresh each time.

    quantise    q = x / s in 8 bits, s = amax(|x|) / the largest number of the format
    y = x w^T + b, dx = dy w, dw = dy^T x       of quantised operands, times both of their scales

Weights and activations are e4m3 (4 bits of exponent, 3 of mantissa, up to 448), gradients of
activations e5m2 (up to 57,344): Micikevicius et al. 2022, arXiv 2209.05433. Products accumulate in
fp32; y and dx have the dtype of x, dw is fp32. Tensor cores take both operands with the summed
dimension contiguous: dx wants w transposed, dw both of its operands, so `quantise` copies them (8
bits transposed in Triton come out wrong on an H200 with triton 3.6.0).
NaN or inf in x makes every product of q NaN: the step is then skipped.

torch._scaled_mm multiplies on a GPU of sm_90 or later; elsewhere the quantised numbers are
multiplied in fp32, which emulates it up to the order of sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of the dimensions, on tensor cores


class Quantised(NamedTuple):
    """A matrix x [R, S] in 8 bits."""

    rows: Tensor | None  # [R, S]
    columns: Tensor | None  # [S, R], transposed
    scale: Tensor  # fp32 []: x = scale * rows


def quantise(x: Tensor, dtype: torch.dtype, rows: bool = True, columns: bool = False) -> Quantised:
    """Quantise x [R, S], whose rows may be strided, in the layouts asked for."""
    amax = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    scale = amax.clamp(min=1e-30) / torch.finfo(dtype).max
    if x.is_cuda:
        from kernels import pointwise  # here: triton is not on every machine

        q = pointwise.quantise(x, scale, dtype)
    else:
        q = (x.float() / scale).to(dtype)
    return Quantised(q if rows else None, q.t().contiguous() if columns else None, scale)


def emulated(x: Tensor) -> bool:
    """Return whether products with x are computed in fp32."""
    return not x.is_cuda


def product(a: Tensor, b: Tensor, scales: tuple, dtype: torch.dtype, bias=None) -> Tensor:
    """Return a b^T [R, J], of 8-bit a [R, K] and b [J, K] times their scales, in `dtype`."""
    if emulated(a):
        out = (a.float() @ b.float().t()) * (scales[0] * scales[1])
        return (out if bias is None else out + bias.float()).to(dtype)
    fused = None if dtype == torch.float32 else bias  # cuBLAS adds none to fp32
    fast = a.dtype == b.dtype == E4M3  # forward: sums of fewer bits do there
    out = torch._scaled_mm(a, b.t(), *scales, fused, out_dtype=dtype, use_fast_accum=fast)
    return out if fused is bias else out + bias


def forward(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x w^T + bias [N, J] for x [N, K] and w [J, K]."""
    qx, qw = quantise(x, E4M3), quantise(w, E4M3)
    return product(qx.rows, qw.rows, (qx.scale, qw.scale), x.dtype, bias)


def grad_x(dy: Quantised, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dx = dy w [N, K] in `dtype` for dy [N, J] and w [J, K]."""
    qw = quantise(w, E4M3, rows=False, columns=True)
    return product(dy.rows, qw.columns, (dy.scale, qw.scale), dtype)


def grad_w(dy: Quantised, x: Tensor) -> Tensor:
    """Return dw = dy^T x [J, K] in fp32 for dy [N, J], with columns, and x [N, K]."""
    qx = quantise(x, E4M3, rows=False, columns=True)
    return product(dy.columns, qx.columns, (dy.scale, qx.scale), torch.float32)


def accumulate_(dw: Tensor, dy: Quantised, x: Tensor, beta: float) -> None:
    """Write dw = beta dw + dy^T x, as kernels.gemm.accumulate_ does."""
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
    """Return x w^T + bias [.., J] for x [.., K], w [J, K], bias [J]; differentiable in all."""
    return _Linear.apply(x, w, bias)


def unsupported(device: torch.device, **dims: int) -> str:
    """Return why products of these dimensions cannot be in 8 bits on `device`; "" if they can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_90"
    odd = [f"{name} {n}" for name, n in dims.items() if n % MULTIPLE]
    return f"{odd[0]} is no multiple of {MULTIPLE}" if odd else ""
