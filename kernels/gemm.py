"""Three GEMMs with fused epilogues, the "triton" choices of mlp.py.

    in_proj_fwd   qkvu = h w_in^T + b_in, a = gelu(u) for columns from 3C on
    out_proj_fwd  out  = x + drop1(y Wa^T + b1) + drop2(a Wm^T + b2)        w_out = [Wa | Wm]
    gelu_bwd      du   = (d2 Wm) gelu'(u), a = gelu(u), and column sums of du per tile

out_proj_fwd loops over two K ranges, y's then a's. Without dropout both accumulate into one tile.
With dropout the masked first product waits in a second register tile.
Dtypes: bf16 or fp16 operands and results, fp32 accumulators. Bitwise repeatable: one program owns
a tile and runs K in order, without split-K.
Cost: 2 N C (3C + M), 2 N C (C + M) and 2 N C M FLOP; compute bound at phi-1's widths (N = 32768,
C = 2048, M = 8192: 1.9, 1.4 and 1.1 TFLOP).

sm_90 loads operands by TMA. sm_80 uses pointers: descriptors lower to plain loads there, without
cp.async, and spill hundreds of bytes (128-wide tiles). With dropout out_proj_fwd takes 128 x 128
tiles: two 256 x 128 accumulators spill 520 bytes a thread in the loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import config
from kernels.pointwise import dropout_params, gelu, gelu_grad, keep_mask


@triton.jit
def _tile(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the first row and column of this program's tile.

    Grouped ordering, GROUP_M tile rows by column: concurrent programs share operands in L2.
    """
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    return (group * GROUP_M + in_group % group_rows) * BLOCK_M, in_group // group_rows * BLOCK_N


@triton.jit
def _dot(
    acc, a, b, row, col, n_rows, n_cols, K, stride_a, stride_b, B_IS_KN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return acc + A B^T for the tile at (row, col), or acc + A B if B_IS_KN.

    a [n_rows, K], b [n_cols, K] (or [K, n_cols] if B_IS_KN): TMA descriptors if TMA, else pointers
    with row strides stride_a, stride_b. Pointer path: the 64-bit part of an address is a scalar and
    tile-local offsets are 32-bit, which halves the address registers.
    """
    if TMA:
        for k in range(0, K, BLOCK_K):
            b_tile = b.load([k, col]) if B_IS_KN else b.load([col, k]).T
            acc = tl.dot(a.load([row, k]), b_tile, acc)
    else:
        m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        a += row.to(tl.int64) * stride_a
        a_offset = tl.minimum(m, n_rows - 1 - row)[:, None] * stride_a + k[None, :]
        if B_IS_KN:
            b += col
            b_offset = k[:, None] * stride_b + n[None, :]
        else:
            b += col.to(tl.int64) * stride_b
            b_offset = tl.minimum(n, n_cols - 1 - col)[None, :] * stride_b + k[:, None]
        for k0 in range(0, K, BLOCK_K):
            b_mask = k[:, None] < K - k0
            if B_IS_KN:
                b_mask = b_mask & (n[None, :] < n_cols - col)
            a_tile = tl.load(a + a_offset, mask=k[None, :] < K - k0, other=0.0)
            b_tile = tl.load(b + b_offset, mask=b_mask, other=0.0)
            acc = tl.dot(a_tile, b_tile, acc)
            a += BLOCK_K
            b += BLOCK_K * stride_b if B_IS_KN else BLOCK_K
    return acc


@triton.jit
def _in_proj_fwd_kernel(
    h, w,  # [N, C], [3C + M, C]: TMA descriptors, or pointers with row strides stride_h, stride_w
    b_ptr,  # [3C + M]
    out_ptr,  # qkvu [N, 3C + M], row stride stride_out, written
    a_ptr,  # [N, M], row stride stride_a, written: gelu of the columns from first_act = 3C on
    n_rows, n_cols, K, first_act, stride_h, stride_w, stride_out, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Compute a tile of qkvu = h w^T + b and, in u's columns, a = gelu(u)."""
    row, col = _tile(n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _dot(
        acc, h, w, row, col, n_rows, n_cols, K, stride_h, stride_w, False,
        BLOCK_M, BLOCK_N, BLOCK_K, TMA,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (m < n_rows - row) & (n < n_cols - col)
    acc += tl.load(b_ptr + col + n, mask=n < n_cols - col, other=0.0).to(tl.float32)
    u = acc.to(out_ptr.dtype.element_ty)
    out_ptr += row.to(tl.int64) * stride_out + col
    tl.store(out_ptr + (m * stride_out + n), u, mask=mask)
    if col + BLOCK_N > first_act:
        a = gelu(u.to(tl.float32))  # of the rounded u, so backward recomputes the same a
        a_ptr += row.to(tl.int64) * stride_a + (col - first_act)
        tl.store(a_ptr + (m * stride_a + n), a, mask=mask & (n >= first_act - col))


@triton.jit(do_not_specialize=["seed"])  # no recompile per seed
def _out_proj_fwd_kernel(
    y, wa, a, wm,  # [N, C], [C, C], [N, M], [C, M]: TMA or pointers (stride_y, _w, _a, _w)
    b1_ptr, b2_ptr,  # [C]
    x_ptr, out_ptr,  # [N, C], row strides stride_x, stride_out; out is written
    n_rows, n_cols, K1, K2, stride_y, stride_a, stride_w, stride_x, stride_out,
    seed, threshold, scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute a tile of out = x + drop1(y wa^T + b1) + drop2(a wm^T + b2)."""
    row, col = _tile(n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    b1 = tl.load(b1_ptr + col + n, mask=n < n_cols - col, other=0.0).to(tl.float32)
    b2 = tl.load(b2_ptr + col + n, mask=n < n_cols - col, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _dot(
        acc, y, wa, row, col, n_rows, n_cols, K1, stride_y, stride_w, False,
        BLOCK_M, BLOCK_N, BLOCK_K, TMA,
    )  # fmt: skip
    if DROPOUT:
        keep = keep_mask(seed, 0, row + tl.arange(0, BLOCK_M), col, threshold, BLOCK_N)
        first = tl.where(keep, (acc + b1) * scale, 0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _dot(
        acc, a, wm, row, col, n_rows, n_cols, K2, stride_a, stride_w, False,
        BLOCK_M, BLOCK_N, BLOCK_K, TMA,
    )  # fmt: skip
    if DROPOUT:
        keep = keep_mask(seed, 1, row + tl.arange(0, BLOCK_M), col, threshold, BLOCK_N)
        acc = first + tl.where(keep, (acc + b2) * scale, 0.0)
    else:
        acc += b1 + b2
    mask = (m < n_rows - row) & (n < n_cols - col)
    x_ptr += row.to(tl.int64) * stride_x + col
    out_ptr += row.to(tl.int64) * stride_out + col
    acc += tl.load(x_ptr + (m * stride_x + n), mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (m * stride_out + n), acc, mask=mask)


@triton.jit
def _gelu_bwd_gemm_kernel(
    d, w,  # d2 [N, C], Wm [C, M]: TMA descriptors, or pointers with row strides stride_d, stride_w
    u_ptr,  # [N, M], row stride stride_u
    du_ptr, a_ptr,  # [N, M], row strides stride_du, stride_a, written
    sum_ptr,  # [N/BLOCK_M, M] fp32 contiguous, written: column sums of du per tile row
    n_rows, n_cols, K, stride_d, stride_w, stride_u, stride_du, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Compute a tile of du = (d w) gelu'(u), of a = gelu(u), and du's column sums."""
    row, col = _tile(n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _dot(
        acc, d, w, row, col, n_rows, n_cols, K, stride_d, stride_w, True,
        BLOCK_M, BLOCK_N, BLOCK_K, TMA,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (m < n_rows - row) & (n < n_cols - col)
    u_ptr += row.to(tl.int64) * stride_u + col
    du_ptr += row.to(tl.int64) * stride_du + col
    a_ptr += row.to(tl.int64) * stride_a + col
    u = tl.load(u_ptr + (m * stride_u + n), mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + (m * stride_a + n), gelu(u), mask=mask)  # before du, or registers spill
    du = acc * gelu_grad(u)
    tl.store(du_ptr + (m * stride_du + n), du, mask=mask)
    out = sum_ptr + (row // BLOCK_M).to(tl.int64) * n_cols + col + n
    total = tl.sum(tl.where(mask, du, 0.0), 0, keep_dims=True)  # _dot repeats the last row
    tl.store(out, total, mask=n < n_cols - col)


def _launch(
    kernel: str, shape: torch.Size, *operands: Tensor, b_is_kn: bool = False
) -> tuple[int, list, dict]:
    """Return (programs, operands, launch options) for an output of `shape`.

    operands: A, B of each product in turn; returned as TMA descriptors if all are 16-byte aligned.
    """
    cfg = config(kernel, operands[0])
    M, N, K = (cfg[f"BLOCK_{x}"] for x in "MNK")
    assert max(t.stride(0) for t in operands) < 2**23, "row strides must be below 2**23"
    cfg["TMA"] = cfg["TMA"] and all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in operands
    )
    if cfg["TMA"]:
        blocks = [M, K], [K, N] if b_is_kn else [N, K]
        pairs = zip(operands, blocks * (len(operands) // 2))
        operands = [TensorDescriptor.from_tensor(t, block) for t, block in pairs]
    return triton.cdiv(shape[0], M) * triton.cdiv(shape[1], N), operands, cfg


def in_proj_fwd(h: Tensor, w_in: Tensor, b_in: Tensor, qkvu: Tensor, a: Tensor) -> None:
    """Write qkvu = h w_in^T + b_in [N, 3C + M] and a = gelu(last M columns) [N, M]."""
    n_rows, n_cols = qkvu.shape
    programs, (h_, w_), cfg = _launch("in_proj_fwd", qkvu.shape, h, w_in)
    _in_proj_fwd_kernel[(programs,)](
        h_, w_, b_in, qkvu, a, n_rows, n_cols, h.shape[1], n_cols - a.shape[1],
        h.stride(0), w_in.stride(0), qkvu.stride(0), a.stride(0), **cfg,
    )  # fmt: skip


def out_proj_fwd(
    y: Tensor, a: Tensor, w_out: Tensor, b1: Tensor, b2: Tensor, x: Tensor, p: float, seed: int
) -> Tensor:
    """Return x + drop1(y Wa^T + b1) + drop2(a Wm^T + b2) [N, C]; w_out = [Wa | Wm] [C, C + M]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    k1, k2 = y.shape[1], a.shape[1]
    wa, wm = w_out[:, :k1], w_out[:, k1:]
    kernel = "out_proj_fwd" + "_dropout" * (p > 0)
    programs, (y_, wa_, a_, wm_), cfg = _launch(kernel, x.shape, y, wa, a, wm)
    _out_proj_fwd_kernel[(programs,)](
        y_, wa_, a_, wm_, b1, b2, x, out, *x.shape, k1, k2, y.stride(0), a.stride(0),
        w_out.stride(0), x.stride(0), out.stride(0), seed, *dropout_params(p), DROPOUT=p > 0, **cfg,
    )  # fmt: skip
    return out


def gelu_bwd(d: Tensor, wm: Tensor, u: Tensor, du: Tensor, a: Tensor) -> Tensor:
    """Write du = (d wm) gelu'(u) and a = gelu(u), both [N, M]; return du's fp32 column sums [M]."""
    n_rows, n_cols = u.shape
    programs, (d_, w_), cfg = _launch("gelu_bwd_gemm", u.shape, d, wm, b_is_kn=True)
    partial = u.new_empty((triton.cdiv(n_rows, cfg["BLOCK_M"]), n_cols), dtype=torch.float32)
    _gelu_bwd_gemm_kernel[(programs,)](
        d_, w_, u, du, a, partial, n_rows, n_cols, d.shape[1],
        *(t.stride(0) for t in (d, wm, u, du, a)), **cfg,
    )  # fmt: skip
    return partial.sum(0)


def accumulate_(dw: Tensor, dout: Tensor, x: Tensor, beta: float = 1.0) -> None:
    """Write the weight gradient dw = beta dw + dout^T x: dw [R, S] fp32, dout [N, R], x [N, S].

    beta = 0 does not read dw. cuBLAS adds in its epilogue, in fp32 (`out_dtype`: CUDA only). A
    Triton GEMM could also sum dout's columns, but must then be nearly as fast as cuBLAS.
    """
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(dw, dout.t(), x, beta=beta, out_dtype=torch.float32, out=dw)
    else:
        dw.addmm_(dout.t().float(), x.float(), beta=beta)
