"""Cross-entropy of the LM head's logits; the gradient overwrites the logits.

    loss     = mean of lse - x[target] over the n_valid rows with target != ignore_index
    dlogits  = (softmax(x) - onehot(target)) g / n_valid,   lse = log sum exp(x),   g = dloss

Kernel: one program per row [V], two passes. The first reads the row from HBM for lse (online
softmax), the second rereads it from L2 and writes dlogits in place. A row of 51,200 bf16 logits is
100 KiB; at 16 warps a row 2 programs fit an SM, so 22 MB are in flight on an A100 (L2: 40 MB) and
27 MB on an H100 (50 MB). Memory bound: 4 bytes of HBM traffic and two exponentials per bf16 logit.
One H200: 51% of the copy rate, cause not known (77% if all second reads missed L2; LOG.md).

`linear_cross_entropy` fuses the LM head: it computes logits and all gradients chunk by chunk, so at
most `chunk_rows` rows of logits exist. Cost: three GEMMs, 6 N C V FLOP.
Dtypes: logits and gradients bf16, fp16 or fp32; statistics, loss and arithmetic fp32; the head's
weight gradient accumulates in fp32. Bitwise repeatable.
Loss scaling: forward writes dlogits before g is known. Pass `expected_grad` near g (N for a sum of
losses, or the loss scale), or fp16 gradients underflow; backward multiplies by g / expected_grad if
they differ, without a sync.
A target outside the classes gives a NaN loss: a check before launch would sync. If every row is
ignored, the loss is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm import accumulate_
from kernels.launch import check, config
from kernels.pointwise import column_sum

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # [N, V], row stride `stride`; overwritten with dlogits if GRAD
    target_ptr,  # [N] int64
    loss_ptr,  # [N] fp32, written
    scale_ptr,  # [] fp32, gradient of each row's loss
    n_cols, stride, ignore_index,
    GRAD: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one row's loss and, if GRAD, overwrite its logits with their gradient; grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits_ptr += row * stride
    col = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRAD:
            zero = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
            for start in range(0, n_cols, BLOCK_V):
                tl.store(logits_ptr + start + col, zero, mask=start + col < n_cols)
        return
    valid = (target >= 0) & (target < n_cols)
    x_target = tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
    high = -1.0e30  # finite: a block of -inf logits gives no NaN
    total = tl.zeros((BLOCK_V,), tl.float32)  # per-lane sums: one reduction, at the end
    for start in tl.range(0, n_cols, BLOCK_V, num_stages=STAGES):
        mask = start + col < n_cols
        x = tl.load(  # evict_last keeps the row in L2 for the second pass
            logits_ptr + start + col, mask=mask, other=-float("inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        new_high = tl.maximum(high, tl.max(x, 0))
        total = total * tl.exp2((high - new_high) * LOG2E) + tl.exp2((x - new_high) * LOG2E)
        high = new_high
    lse = high + tl.log(tl.sum(total, 0))
    tl.store(loss_ptr + row, lse - x_target)
    if GRAD:
        tl.debug_barrier()  # all threads read x_target before any overwrites it
        g = tl.load(scale_ptr)
        for start in tl.range(0, n_cols, BLOCK_V, num_stages=STAGES):
            mask = start + col < n_cols
            x = tl.load(
                logits_ptr + start + col, mask=mask, other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
            dx = tl.exp2((x - lse) * LOG2E) * g - tl.where(start + col == target, g, 0.0)
            tl.store(logits_ptr + start + col, dx, mask=mask)


@triton.jit
def _rescale_kernel(
    x_ptr,  # [N, C], row stride `stride`; multiplied in place by g / expected
    g_ptr, expected_ptr,  # [] fp32, actual and expected gradient of the loss
    n_cols, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rescale a row unless g == expected: decided on the device, no sync."""
    g, expected = tl.load(g_ptr), tl.load(expected_ptr)
    if g != expected:
        x_ptr += tl.program_id(0).to(tl.int64) * stride
        for start in range(0, n_cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + col, mask=col < n_cols, other=0.0).to(tl.float32)
            tl.store(x_ptr + col, x * (g / expected), mask=col < n_cols)


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: Tensor, ignore_index: int, grad: bool
) -> Tensor:
    """Return per-row losses [N] fp32 of logits [N, V]; with `grad`, overwrite logits with dlogits.

    targets [N] int64; scale [] fp32, gradient of each row's loss.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(logits.shape[0],)](
        logits, targets, losses, scale, logits.shape[1], logits.stride(0), ignore_index,
        GRAD=grad, **config("cross_entropy", logits),
    )  # fmt: skip
    return losses


def _rescale_(x: Tensor, g: Tensor, expected: Tensor) -> Tensor:
    """Multiply x [N, C] or [C] by g / expected in place, without a sync; return x."""
    rows = x.view(1, -1) if x.dim() == 1 else x
    cfg = config("rescale", x)
    _rescale_kernel[(rows.shape[0],)](rows, g, expected, rows.shape[1], rows.stride(0), **cfg)
    return x


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """Return `value` as a [] fp32 tensor; fill it on the device, as a copy would sync."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, chunk_rows, ignore_index, expected_grad, grad):
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if grad else None
        dweight, dbias = (
            torch.zeros_like(t, dtype=torch.float32) if need and grad else None
            for t, need in zip((weight, bias), ctx.needs_input_grad[1:])
        )
        ctx.expected = _scalar(expected_grad, x.device)
        share = (targets != ignore_index).sum().clamp(min=1).float().reciprocal()  # no sync
        losses, scale = [], share * ctx.expected
        for rows in (slice(i, i + chunk_rows) for i in range(0, x.shape[0], chunk_rows)):
            logits = torch.addmm(b, x[rows], w.t())
            losses.append(cross_entropy_(logits, targets[rows], scale, ignore_index, grad))
            if grad:  # logits now hold dlogits
                torch.mm(logits, w, out=dx[rows])
            if dweight is not None:
                accumulate_(dweight, logits, x[rows])
            if dbias is not None:
                dbias += column_sum(logits)
            del logits  # before the next chunk is allocated
        ctx.grads, ctx.dtypes = (dx, dweight, dbias), (x.dtype, weight.dtype, bias.dtype)
        return torch.cat(losses).sum() * share

    @staticmethod
    def backward(ctx, g):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("backward runs once: it frees the gradients that forward computed")
        scaled = (
            _rescale_(t, g, ctx.expected).to(dtype) if need else None
            for t, need, dtype in zip(grads, ctx.needs_input_grad, ctx.dtypes)
        )
        return *scaled, *(None,) * 5


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *,
    chunk_rows: int = 4096, ignore_index: int = -1, expected_grad: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """Return the mean loss, [] fp32, of logits x weight^T + bias.

    x [N, C], weight [V, C], bias [V], targets [N] int64. fp32 weight and bias work for any x: they
    are cast, and their gradients are fp32. Holds at most `chunk_rows` rows of logits.
    Raises ValueError for a bad dtype, shape, stride or device.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x has dtype {x.dtype}, want bfloat16, float16 or float32")
    if x.dim() != 2 or 0 in x.shape or x.stride(1) != 1:
        got = f"shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"x has {got}, want two dimensions, non-empty, stride 1 in the last")
    check("targets", targets, x, x.shape[:1], torch.int64)
    check("weight", weight, x, (weight.shape[0], x.shape[1]))
    check("bias", bias, x, weight.shape[:1])
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    options = chunk_rows, ignore_index, expected_grad, grad
    return _LinearCrossEntropy.apply(x, weight, bias, targets, *options)


def cross_entropy_reference(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """Compute the loss in plain torch, in the dtype of logits."""
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index)
