"""Pointwise kernels between the projections' GEMMs: tanh-GELU, residual dropout, bias gradients.

    gelu(u)  = u s,   s = sigmoid(2k u (1 + c u^2)),   k = sqrt(2 / pi),   c = 0.044715
    gelu'(u) = s + u s (1 - s) 2k (1 + 3c u^2)          (tanh(z) = 2 sigmoid(2z) - 1)

    gelu_fwd      a = gelu(u)                                      reads 1, writes 1 element
    gelu_bwd      du = da gelu'(u), a = gelu(u), sum of du         reads 2, writes 2
    residual_fwd  out = x + drop1(z1 + b1) + drop2(z2 + b2)        reads 3, writes 1
    residual_bwd  d1 = drop1(dout), d2 = drop2(dout), their sums   reads 1, writes 2 (p = 0: 0)
    column_sum    bias gradient of a tensor that no kernel above writes
    quantise      x / scale in 8 bits                              reads 1, writes 1/2

Arithmetic is fp32 for any tensor dtype. Memory bound: HBM bytes = the counts above x rows x columns
x element size. Bias gradients are column sums, bitwise repeatable without atomics: each program
sums fixed rows, then torch sums the programs' partial results.

Dropout: counter-based Philox-4x32. One call yields eight 16-bit draws for eight neighbouring
columns; a draw below round(65536 p) drops its element. The counter is (column group, row, branch),
so a mask depends only on the seed, not the tiling; backward redraws it. Seven rounds are the fewest
that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, table 2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import config


@triton.jit
def gelu(u):
    """Return the tanh-GELU of u, fp32."""
    return u * tl.sigmoid(1.5957691216057308 * u * (1.0 + 0.044715 * u * u))


@triton.jit
def gelu_grad(u):
    """Return the derivative of `gelu` at u, fp32."""
    s = tl.sigmoid(1.5957691216057308 * u * (1.0 + 0.044715 * u * u))
    return s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)


@triton.jit
def keep_mask(seed, branch, row, col, threshold, BLOCK_N: tl.constexpr):
    """Return the keep mask [BLOCK_M, BLOCK_N] of rows `row`, columns from `col`, col % 8 == 0."""
    group = col // 8 + tl.arange(0, BLOCK_N // 8)
    zero = row[:, None] * 0 + group[None, :] * 0
    w0, w1, w2, w3 = tl.philox(
        seed, zero + group[None, :], zero + row[:, None], zero + branch, zero, 7
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(row.shape[0], BLOCK_N // 2)
    halves = tl.join(words & 0xFFFF, words >> 16).reshape(row.shape[0], BLOCK_N)
    return halves.to(tl.int32) >= threshold


def dropout_params(p: float) -> tuple[int, float]:
    """Return (threshold, scale) for drop probability p; scale multiplies kept elements."""
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold)


@triton.jit
def _gelu_fwd_kernel(
    u_ptr, a_ptr,  # [N, M], row strides stride_u, stride_a; a is written
    n_rows, n_cols, stride_u, stride_a, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Compute a tile of a = gelu(u)."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < n_rows) & (col < n_cols)
    u = tl.load(u_ptr + row.to(tl.int64) * stride_u + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + row.to(tl.int64) * stride_a + col, gelu(u), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    da_ptr, u_ptr,  # [N, M], row strides stride_da, stride_u
    du_ptr, a_ptr,  # [N, M], row strides stride_du, stride_a, written
    sum_ptr,  # [programs, M] fp32 contiguous, written: column sums of du per program
    n_rows, n_cols, stride_da, stride_u, stride_du, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute du and a for BLOCK_N columns of every num_programs-th row tile; sum du over rows."""
    col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, step = tl.program_id(0) * BLOCK_M, tl.num_programs(0) * BLOCK_M
    for start in tl.range(first, n_rows, step, num_stages=STAGES):  # grid-stride, pipelined
        row = (start + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
        mask = (row < n_rows) & (col < n_cols)
        u = tl.load(u_ptr + row * stride_u + col, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + row * stride_da + col, mask=mask, other=0.0).to(tl.float32)
        du = da * gelu_grad(u)
        tl.store(du_ptr + row * stride_du + col, du, mask=mask)
        tl.store(a_ptr + row * stride_a + col, gelu(u), mask=mask)
        total += du
    out = sum_ptr + tl.program_id(0).to(tl.int64) * n_cols + col
    tl.store(out, tl.sum(total, 0, keep_dims=True), mask=col < n_cols)


@triton.jit(do_not_specialize=["seed"])  # no recompile per seed
def _residual_fwd_kernel(
    x_ptr, z1_ptr, b1_ptr, z2_ptr, b2_ptr,  # x, z [N, C], strides stride_x, _z1, _z2; b [C]
    out_ptr,  # [N, C], row stride stride_out, written
    n_rows, n_cols, stride_x, stride_z1, stride_z2, stride_out, seed, threshold, scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute a tile of out = x + drop1(z1 + b1) + drop2(z2 + b2)."""
    row32 = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    row, col = row32[:, None].to(tl.int64), (first_col + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < n_rows) & (col < n_cols)
    z1 = tl.load(z1_ptr + row * stride_z1 + col, mask=mask, other=0.0).to(tl.float32)
    z2 = tl.load(z2_ptr + row * stride_z2 + col, mask=mask, other=0.0).to(tl.float32)
    z1 += tl.load(b1_ptr + col, mask=col < n_cols, other=0.0).to(tl.float32)
    z2 += tl.load(b2_ptr + col, mask=col < n_cols, other=0.0).to(tl.float32)
    if DROPOUT:
        z1 = tl.where(keep_mask(seed, 0, row32, first_col, threshold, BLOCK_N), z1 * scale, 0.0)
        z2 = tl.where(keep_mask(seed, 1, row32, first_col, threshold, BLOCK_N), z2 * scale, 0.0)
    x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out + col, x + z1 + z2, mask=mask)


@triton.jit(do_not_specialize=["seed"])  # no recompile per seed
def _residual_bwd_kernel(
    dout_ptr,  # [N, C], row stride stride_dout
    d1_ptr, d2_ptr,  # [N, C] contiguous, written if DROPOUT
    sum_ptr,  # [programs, 1 + DROPOUT, C] fp32, written: column sums of d1, d2 per program
    n_rows, n_cols, stride_dout, seed, threshold, scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute d1 and d2 for BLOCK_N columns of every num_programs-th row tile; sum over rows."""
    first_col = tl.program_id(1) * BLOCK_N
    col = (first_col + tl.arange(0, BLOCK_N))[None, :]
    total1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, step = tl.program_id(0) * BLOCK_M, tl.num_programs(0) * BLOCK_M
    for start in tl.range(first, n_rows, step, num_stages=STAGES):
        row32 = start + tl.arange(0, BLOCK_M)
        row = row32[:, None].to(tl.int64)
        mask = (row < n_rows) & (col < n_cols)
        dout = tl.load(dout_ptr + row * stride_dout + col, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            keep1 = keep_mask(seed, 0, row32, first_col, threshold, BLOCK_N)
            keep2 = keep_mask(seed, 1, row32, first_col, threshold, BLOCK_N)
            d1, d2 = tl.where(keep1, dout * scale, 0.0), tl.where(keep2, dout * scale, 0.0)
            tl.store(d1_ptr + row * n_cols + col, d1, mask=mask)
            tl.store(d2_ptr + row * n_cols + col, d2, mask=mask)
            total1 += d1
            total2 += d2
        else:
            total1 += dout
    out = sum_ptr + tl.program_id(0).to(tl.int64) * (2 * n_cols if DROPOUT else n_cols) + col
    tl.store(out, tl.sum(total1, 0, keep_dims=True), mask=col < n_cols)
    if DROPOUT:
        tl.store(out + n_cols, tl.sum(total2, 0, keep_dims=True), mask=col < n_cols)


@triton.jit
def _quantise_kernel(
    x_ptr,  # [R, S], row stride stride_x
    scale_ptr,  # [] fp32
    q_ptr,  # [R, S] e4m3 or e5m2, contiguous, written
    n_rows, n_cols, stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Compute a tile of q = x / scale."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :].to(tl.int64)
    mask = (row < n_rows) & (col < n_cols)
    x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
    x = (x / tl.load(scale_ptr)).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * n_cols + col, x, mask=mask)


def _launch(kernel: str, x: Tensor, sums: int = 0) -> tuple[tuple[int, int], Tensor, dict]:
    """Return (grid, buffer for partial sums [programs, sums * C], launch options) for x [N, C]."""
    cfg = config(kernel, x)
    programs, (n_rows, n_cols) = cfg.pop("PROGRAMS", 0), x.shape
    grid = triton.cdiv(n_rows, cfg["BLOCK_M"]), triton.cdiv(n_cols, cfg["BLOCK_N"])
    if sums:  # at most as many programs as fit an A100 or H100 at once
        grid = min(grid[0], triton.cdiv(programs, grid[1])), grid[1]
    return grid, x.new_empty((grid[0], sums * n_cols), dtype=torch.float32), cfg


def gelu_fwd(u: Tensor, a: Tensor) -> None:
    """Write a = gelu(u), both [N, M]; rows may be strided."""
    grid, _, cfg = _launch("gelu_fwd", u)
    _gelu_fwd_kernel[grid](u, a, *u.shape, u.stride(0), a.stride(0), **cfg)


def gelu_bwd(da: Tensor, u: Tensor, du: Tensor, a: Tensor) -> Tensor:
    """Write du = da * gelu'(u) and a = gelu(u), all [N, M]; return du's fp32 column sums [M]."""
    grid, partial, cfg = _launch("gelu_bwd", u, sums=1)
    strides = (t.stride(0) for t in (da, u, du, a))
    _gelu_bwd_kernel[grid](da, u, du, a, partial, *u.shape, *strides, **cfg)
    return partial.sum(0)


def residual_fwd(
    x: Tensor, z1: Tensor, b1: Tensor, z2: Tensor, b2: Tensor, p: float, seed: int
) -> Tensor:
    """Return x + drop1(z1 + b1) + drop2(z2 + b2) [N, C]; independent masks, drop probability p."""
    grid, _, cfg = _launch("residual_fwd", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = (t.stride(0) for t in (x, z1, z2, out))
    _residual_fwd_kernel[grid](
        x, z1, b1, z2, b2, out, *x.shape, *strides, seed, *dropout_params(p), DROPOUT=p > 0, **cfg
    )
    return out


def residual_bwd(dout: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (d1, d2, db1, db2), gradients of `residual_fwd`; db fp32. At p = 0, d1 = d2 = dout."""
    grid, partial, cfg = _launch("residual_bwd", dout, sums=2 if p > 0 else 1)
    d1, d2 = dout, dout
    if p > 0:
        d1, d2 = (torch.empty(dout.shape, dtype=dout.dtype, device=dout.device) for _ in "12")
    _residual_bwd_kernel[grid](
        dout, d1, d2, partial, *dout.shape, dout.stride(0), seed, *dropout_params(p),
        DROPOUT=p > 0, **cfg,
    )  # fmt: skip
    sums = partial.sum(0).view(-1, dout.shape[1])
    return d1, d2, sums[0], sums[-1].clone()  # two parameters' gradients must not alias


def column_sum(x: Tensor) -> Tensor:
    """Return the fp32 column sums [C] of x [N, C], whose rows may be strided."""
    return residual_bwd(x, 0.0, 0)[2]


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x / scale [R, S] in the 8-bit `dtype`; rows of x may be strided."""
    grid, _, cfg = _launch("quantise", x)
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    _quantise_kernel[grid](x, scale, q, *x.shape, x.stride(0), **cfg)
    return q
