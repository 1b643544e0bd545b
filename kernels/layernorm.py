"""LayerNorm with fp32 statistics; backward fuses the residual gradient's add.

    forward    mean = sum(x) / C, rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)
               xhat = (x - mean) rstd, y = xhat w + b
    backward   g = dy w, dx = rstd (g - sum(g) / C - xhat sum(g xhat) / C) [+ dresidual]
               dw = sum over rows of dy xhat, db = sum over rows of dy

Fusions: in a block x + f(ln(x)), x gets the residual's gradient plus this dx; `dresidual` adds it
without an extra pass. `bias` makes backward rewrite y for one extra store, so the caller need not
save y for the next projection's weight gradient.

Dtypes: x, y and gradients bf16, fp16 or fp32; statistics and arithmetic fp32. Memory bound: forward
reads and writes one element (4 bytes in bf16); backward reads two or three and writes one or two.
One H200: forward at 75% of the copy rate, backward at 98% (LOG.md, 2026-11-28).
C <= 8192: one program holds a row in registers. dw and db are bitwise repeatable without atomics: a
fixed set of programs sums fixed rows, then torch sums their partial results (per configuration).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check, config

MAX_WIDTH = 8192


@triton.jit
def _layernorm_fwd_kernel(
    x_ptr, y_ptr,  # [N, C], row strides stride_x, stride_y; y is written
    w_ptr, b_ptr,  # [C]
    mean_ptr, rstd_ptr,  # [N] fp32, written
    n_cols, stride_x, stride_y, eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise one row; grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    mask = col < n_cols
    x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + col, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / n_cols
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n_cols + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * stride_y + col, centred * rstd * w + b, mask=mask)


@triton.jit
def _layernorm_bwd_kernel(
    dy_ptr, x_ptr,  # [N, C], row strides stride_dy, stride_x
    w_ptr, b_ptr,  # [C]; b only if REBUILD_Y
    mean_ptr, rstd_ptr,  # [N] fp32, from the forward kernel
    dres_ptr,  # [N, C], row stride stride_dres; added to dx if RESIDUAL
    dx_ptr, y_ptr,  # [N, C] contiguous, written; y only if REBUILD_Y
    sum_ptr,  # [programs, 2, C] fp32 contiguous, written: dw and db per program
    n_rows, n_cols, stride_dy, stride_x, stride_dres,
    RESIDUAL: tl.constexpr, REBUILD_Y: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx for rows program_id, program_id + programs, ...; sum their dw and db."""
    col = tl.arange(0, BLOCK_C)
    mask = col < n_cols
    w = tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
    if REBUILD_Y:
        b = tl.load(b_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_C,), tl.float32)
    db = tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=STAGES):  # pipelined
        row = tl.cast(i, tl.int64)
        x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            dres = tl.load(dres_ptr + row * stride_dres + col, mask=mask, other=0.0)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        xhat = (x - mean) * rstd  # unmasked: dy = 0 beyond the row, so the sums hold
        g = dy * w
        dx = rstd * (g - (tl.sum(g, 0) + xhat * tl.sum(g * xhat, 0)) / n_cols)
        if RESIDUAL:
            dx += dres.to(tl.float32)
        tl.store(dx_ptr + row * n_cols + col, dx, mask=mask)
        if REBUILD_Y:
            tl.store(y_ptr + row * n_cols + col, xhat * w + b, mask=mask)
        dw += dy * xhat
        db += dy
    out = sum_ptr + tl.program_id(0).to(tl.int64) * 2 * n_cols + col
    tl.store(out, dw, mask=mask)
    tl.store(out + n_cols, db, mask=mask)


def _config(kernel: str, x: Tensor) -> dict:
    """Return launch options for rows of x; scale num_warps from the table's phi-1 width, 2048."""
    block = triton.next_power_of_2(x.shape[1])
    cfg = config(kernel, x)
    cfg["num_warps"] = min(16, max(1, cfg["num_warps"] * block // 2048))
    return cfg | {"BLOCK_C": block}


def layernorm_fwd(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y [N, C], mean [N], rstd [N]); rows of x may be strided, mean and rstd are fp32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty((2, x.shape[0]), dtype=torch.float32, device=x.device)
    _layernorm_fwd_kernel[(x.shape[0],)](
        x, y, w, b, mean, rstd, x.shape[1], x.stride(0), y.stride(0), eps,
        **_config("layernorm_fwd", x),
    )  # fmt: skip
    return y, mean, rstd


def layernorm_bwd(
    dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor,
    dresidual: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return (dx, dw, db, y): dx and y [N, C], dw and db [C] fp32.

    dx includes `dresidual` if given; y is recomputed if `bias` is given, else None. Rows of dy, x
    and dresidual may be strided; dx and y are new and contiguous.
    """
    n_rows, n_cols = x.shape
    cfg = _config("layernorm_bwd", x)
    programs = min(cfg.pop("PROGRAMS"), n_rows)  # as many as fit an A100 or H100 at once
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(dx) if bias is not None else None
    partial = torch.empty((programs, 2, n_cols), dtype=torch.float32, device=x.device)
    _layernorm_bwd_kernel[(programs,)](
        dy, x, w, bias, mean, rstd, dresidual, dx, y, partial, n_rows, n_cols,
        dy.stride(0), x.stride(0), 0 if dresidual is None else dresidual.stride(0),
        RESIDUAL=dresidual is not None, REBUILD_Y=bias is not None, **cfg,
    )  # fmt: skip
    dw, db = partial.sum(0)
    return dx, dw, db, y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, eps):
        rows = x.reshape(-1, x.shape[-1])
        y, mean, rstd = layernorm_fwd(rows, w, b, eps)
        ctx.save_for_backward(rows, w, mean, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, w, mean, rstd = ctx.saved_tensors
        rows = dy.reshape(x.shape)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()  # expanded gradient
        dx, dw, db, _ = layernorm_bwd(rows, x, w, mean, rstd)
        found = dx.view(dy.shape), dw.to(w.dtype), db.to(w.dtype), None
        return *(g if n else None for g, n in zip(found, ctx.needs_input_grad)),


def layernorm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """Return LayerNorm of x [..., C] over its last dimension; w, b [C] in x's dtype or fp32.

    Raises ValueError if the kernels reject a dtype, device, shape or stride.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x has dtype {x.dtype}, want bfloat16, float16 or float32")
    if x.numel() == 0 or x.shape[-1] > MAX_WIDTH or x.stride(-1) != 1 < x.shape[-1]:
        got = f"shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"x has {got}, want [..., C], C <= {MAX_WIDTH}, contiguous in C")
    check("w", w, x, x.shape[-1:])
    check("b", b, x, x.shape[-1:])
    return _LayerNorm.apply(x, w, b, eps)


def layernorm_reference(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute `layernorm` in plain torch, in x's dtype."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, eps)
