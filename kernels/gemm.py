"""Three GEMMs with the block's elementwise work in their epilogues: mlp.py's "triton" choices.

    in_proj_fwd   qkvu = h w_in^T + b_in, and a = gelu(u) for the columns from 3C on
    out_proj_fwd  out  = x + drop1(y Wa^T + b1) + drop2(a Wm^T + b2)        w_out = [Wa | Wm]
    gelu_bwd      du   = (d2 Wm) gelu'(u), a = gelu(u), and sums of du over the rows of each tile

out_proj_fwd runs over two K ranges, y's then a's. With dropout the first product, masked, waits in
a second register tile while the second accumulates; without, both go into one accumulator.

Operands and results are bf16 or fp16, the accumulator is fp32. FLOPs are 2 N C (3C + M),
2 N C (C + M) and 2 N C M; compute bound at phi-1's widths (N = 32768, C = 2048, M = 8192: 1.9, 1.4
and 1.1 TFLOP). Tiles go in groups of GROUP_M rows so that concurrent programs share operands in L2.
On sm_90 operands arrive by TMA. Pointers are used on sm_80, where descriptors become plain loads:
no cp.async, and 350 to 1,000 bytes of spills (ptxas, triton 3.7.1, 128-wide tiles).
Every result is bitwise repeatable: one program owns a tile, and K runs in order.
"""

import json

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import Kernel, config, types
from kernels.pointwise import dropout_params, gelu, gelu_grad, keep_mask


@triton.jit
def _tile(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile; GROUP_M tile rows are done column by column."""
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
    """acc + A[row.., :K] B[col.., :K]^T, or B[:K, col..] if B_IS_KN; descriptors or pointers.

    Tile-local offsets are 32-bit and the 64-bit part of an address is a scalar: half the registers.
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
    h, w, b_ptr, out_ptr, a_ptr, n_rows, n_cols, K, first_act,
    stride_h, stride_w, stride_out, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
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
        a = gelu(u.to(tl.float32))  # of the rounded u, as the backward pass rebuilds it
        a_ptr += row.to(tl.int64) * stride_a + (col - first_act)
        tl.store(a_ptr + (m * stride_a + n), a, mask=mask & (n >= first_act - col))


@triton.jit(do_not_specialize=["seed"])
def _out_proj_fwd_kernel(
    y, wa, a, wm, b1_ptr, b2_ptr, x_ptr, out_ptr, n_rows, n_cols, K1, K2,
    stride_y, stride_a, stride_w, stride_x, stride_out, seed, threshold, scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
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
    d, w, u_ptr, du_ptr, a_ptr, sum_ptr, n_rows, n_cols, K,
    stride_d, stride_w, stride_u, stride_du, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
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
    total = tl.sum(
        tl.where(mask, du, 0.0), 0, keep_dims=True
    )  # _dot repeats the last row past the end
    tl.store(out, total, mask=n < n_cols - col)


# Candidates (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages); none is measured. sm_80's come in
# the order of shared memory's time in the K loop over the tensor cores': 0.70 where a warp has 64 x
# 64 of the tile, 1.02 where it has 64 x 32 (`python -m bench.resources --kernel=in_proj_fwd`).
_TILES = {
    80: [
        (256, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 32, 8, 3), (128, 256, 32, 8, 4),
        (128, 128, 32, 4, 4), (64, 256, 32, 4, 4), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4),
        (64, 128, 64, 4, 3), (128, 64, 64, 4, 4),
    ],
    90: [
        (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3),
        (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 128, 8, 2), (64, 256, 64, 4, 4),
    ],
}  # fmt: skip


def _configs(default_80: tuple[int, ...]) -> dict[int, list[dict]]:
    """Return a kernel's candidates: on sm_80 first the one that spills nothing in its epilogue."""
    tiles = _TILES | {80: sorted(_TILES[80], key=lambda tile: tile != default_80)}
    return {
        sm: [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "TMA": sm == 90,
             "num_warps": warps, "num_stages": stages}
            for m, n, k, warps, stages in tiles[sm]
        ]
        for sm in tiles
    }  # fmt: skip


_A, _B, _B_KN = "T[{BLOCK_M},{BLOCK_K}]", "T[{BLOCK_N},{BLOCK_K}]", "T[{BLOCK_K},{BLOCK_N}]"
IN_PROJ_FWD, OUT_PROJ_FWD, OUT_PROJ_FWD_DROPOUT, GELU_BWD = KERNELS = [
    Kernel(
        "in_proj_fwd",
        _in_proj_fwd_kernel,
        _configs((256, 128, 64, 8, 3)),
        types(
            "h w b_ptr out_ptr a_ptr",
            "n_rows n_cols K first_act stride_h stride_w stride_out stride_a",
        ),
        {},
        tensor_core=True,
        descriptors={"h": _A, "w": _B},
    ),
    *(
        Kernel(
            "out_proj_fwd" + "_dropout" * dropout,
            _out_proj_fwd_kernel,
            _configs(tile),
            types(
                "y wa a wm b1_ptr b2_ptr x_ptr out_ptr",
                "n_rows n_cols K1 K2 stride_y stride_a stride_w stride_x stride_out threshold",
                seed="i64",
                scale="fp32",
            ),
            {"DROPOUT": dropout},
            tensor_core=True,
            descriptors={"y": _A, "wa": _B, "a": _A, "wm": _B},
        )
        # dropout holds a second tile: 256 x 128 then spills 520 bytes a thread in the loops
        for dropout, tile in ((False, (128, 256, 64, 8, 3)), (True, (128, 128, 64, 8, 3)))
    ),
    Kernel(
        "gelu_bwd_gemm",
        _gelu_bwd_gemm_kernel,
        # 256 x 128 spills 436 bytes a thread after the loop, and triton 3.6.0's 7,364 in it
        _configs((128, 128, 64, 8, 3)),
        types(
            "d w u_ptr du_ptr a_ptr",
            "n_rows n_cols K stride_d stride_w stride_u stride_du stride_a",
            sum_ptr="*fp32",
        ),
        {},
        tensor_core=True,
        descriptors={"d": _A, "w": _B_KN},
    ),
]


def _launch(kernel: Kernel, n_rows: int, n_cols: int, **operands: Tensor) -> tuple[int, list, dict]:
    """(programs, operands, configuration); operands are TMA descriptors where aligned."""
    cfg = dict(config(kernel, next(iter(operands.values()))))
    assert max(t.stride(0) for t in operands.values()) < 2**23, "tile-local offsets are 32-bit"
    cfg["TMA"] = cfg["TMA"] and all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
        for t in operands.values()
    )
    programs = triton.cdiv(n_rows, cfg["BLOCK_M"]) * triton.cdiv(n_cols, cfg["BLOCK_N"])
    if not cfg["TMA"]:
        return programs, list(operands.values()), cfg
    blocks = {n: json.loads(block[1:].format(**cfg)) for n, block in kernel.descriptors.items()}
    return programs, [TensorDescriptor.from_tensor(t, blocks[n]) for n, t in operands.items()], cfg


def in_proj_fwd(h: Tensor, w_in: Tensor, b_in: Tensor, qkvu: Tensor, a: Tensor) -> None:
    """Write qkvu = h w_in^T + b_in, [N, 3C + M], and a = gelu(its last M columns), [N, M]."""
    shape = (n_rows, n_cols) = qkvu.shape
    programs, (h_, w_), cfg = _launch(IN_PROJ_FWD, *shape, h=h, w=w_in)
    _in_proj_fwd_kernel[(programs,)](
        h_, w_, b_in, qkvu, a, n_rows, n_cols, h.shape[1], n_cols - a.shape[1],
        h.stride(0), w_in.stride(0), qkvu.stride(0), a.stride(0), **cfg,
    )  # fmt: skip


def out_proj_fwd(
    y: Tensor, a: Tensor, w_out: Tensor, b1: Tensor, b2: Tensor, x: Tensor, p: float, seed: int
) -> Tensor:
    """x + drop1(y Wa^T + b1) + drop2(a Wm^T + b2), w_out = [Wa | Wm]: [C, C + M]; [N, C]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    k1, k2 = y.shape[1], a.shape[1]
    wa, wm = w_out[:, :k1], w_out[:, k1:]
    kernel = OUT_PROJ_FWD_DROPOUT if p > 0 else OUT_PROJ_FWD
    programs, (y_, wa_, a_, wm_), cfg = _launch(kernel, *x.shape, y=y, wa=wa, a=a, wm=wm)
    _out_proj_fwd_kernel[(programs,)](
        y_, wa_, a_, wm_, b1, b2, x, out, *x.shape, k1, k2, y.stride(0), a.stride(0),
        w_out.stride(0), x.stride(0), out.stride(0), seed, *dropout_params(p), DROPOUT=p > 0, **cfg,
    )  # fmt: skip
    return out


def gelu_bwd(d: Tensor, wm: Tensor, u: Tensor, du: Tensor, a: Tensor) -> Tensor:
    """Write du = (d wm) gelu'(u) and a = gelu(u), all [N, M]; return du's column sums, fp32."""
    n_rows, n_cols = u.shape
    programs, (d_, w_), cfg = _launch(GELU_BWD, n_rows, n_cols, d=d, w=wm)
    partial = u.new_empty((triton.cdiv(n_rows, cfg["BLOCK_M"]), n_cols), dtype=torch.float32)
    _gelu_bwd_gemm_kernel[(programs,)](
        d_, w_, u, du, a, partial, n_rows, n_cols, d.shape[1],
        *(t.stride(0) for t in (d, wm, u, du, a)), **cfg,
    )  # fmt: skip
    return partial.sum(0)


def accumulate_(dw: Tensor, dout: Tensor, x: Tensor, beta: float = 1.0) -> None:
    """dw = beta dw + dout^T x: the weight gradient [R, S], fp32, of dout: [N, R] and x: [N, S].

    With beta = 0, dw is written without being read. cuBLAS adds in its epilogue, in fp32
    (`out_dtype`: CUDA only). A Triton GEMM could sum dout's columns on the way, but would have to
    come within 1% of cuBLAS to gain by it.
    """
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(dw, dout.t(), x, beta=beta, out_dtype=torch.float32, out=dw)
    else:
        dw.addmm_(dout.t().float(), x.float(), beta=beta)
