"""Batched single-token decoding: fused linear layers, and attention over a KV cache. No autograd.

    linear      out = LN(x) W^T + b or out += x W^T + b;  optionally act = gelu(last columns)
    attention   rotate q, k to position p; write k, v to the cache at p;
                out = softmax(q K^T / sqrt(D)) V over cache positions 0 .. p

A transformer block is three launches: LN + in_proj + GELU, attention, out_proj + residual. Memory
bound: each launch reads W, or the keys and values, once. Dtypes: bf16, fp16 or fp32; accumulators,
LayerNorm statistics, softmax and angles are fp32.

Batch invariance: a row's bits depend neither on the number of rows nor on the other rows.
  - `linear` pads to tiles of 16 rows and runs K in one order, without split-K.
  - `attention` is split-KV (Flash-Decoding, Dao et al., 2023): one program per BLOCK_S positions;
    the last program of a head to finish, found by an atomic counter, merges the pieces in order and
    resets the counter to zero.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import config
from kernels.pointwise import gelu

# Fixed, not tuned: batch invariance must not depend on tuning.json.
ROWS = 16  # rows of a tile of `linear`, the tensor cores' minimum
BLOCK_S = 128  # cache positions per piece of `attention`


@triton.jit
def _linear_kernel(
    x_ptr,  # [N, K], row stride stride_x
    w_ptr,  # [J, K] contiguous
    b_ptr,  # [J]
    ln_w_ptr, ln_b_ptr,  # [K], LayerNorm weight and bias; unused unless NORM
    out_ptr,  # [N, first_act], row stride stride_out; written, or added to if RESIDUAL
    act_ptr,  # [N, J - first_act], row stride stride_act; written if ACT
    n_rows, n_cols, K, first_act, stride_x, stride_out, stride_act, eps,
    NORM: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a tile of out and act; NORM first computes its rows' LayerNorm statistics."""
    tiles_m = tl.cdiv(n_rows, BLOCK_M)  # neighbours share a W tile in L2
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    x_ptr += m.to(tl.int64) * stride_x + k[None, :]
    w_ptr += n.to(tl.int64) * K + k[:, None]
    rows, cols = m < n_rows, n < n_cols
    if NORM:
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            inside = rows & (k[None, :] < K - k0)
            total += tl.load(x_ptr + k0, mask=inside, other=0.0).to(tl.float32)
        mean = (tl.sum(total, 1) / K)[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            inside = rows & (k[None, :] < K - k0)
            x = tl.load(x_ptr + k0, mask=inside, other=0.0).to(tl.float32) - mean
            total += tl.where(inside, x * x, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(total, 1) / K + eps)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        left = K - k0
        x = tl.load(x_ptr + k0, mask=rows & (k[None, :] < left), other=0.0)
        w = tl.load(w_ptr + k0, mask=cols & (k[:, None] < left), other=0.0)
        if NORM:
            ln_w = tl.load(ln_w_ptr + k0 + k, mask=k < left, other=0.0).to(tl.float32)
            ln_b = tl.load(ln_b_ptr + k0 + k, mask=k < left, other=0.0).to(tl.float32)
            x = ((x.to(tl.float32) - mean) * rstd * ln_w + ln_b).to(w.dtype)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(b_ptr + n, mask=cols, other=0.0).to(tl.float32)
    out_ptr += m.to(tl.int64) * stride_out + n
    if RESIDUAL:
        acc += tl.load(out_ptr, mask=rows & cols, other=0.0).to(tl.float32)
    tl.store(out_ptr, acc, mask=rows & cols & (n < first_act))
    if ACT:
        a = gelu(acc.to(act_ptr.dtype.element_ty).to(tl.float32))  # round u first, as model.py does
        act_ptr += m.to(tl.int64) * stride_act + (n - first_act)
        tl.store(act_ptr, a, mask=rows & cols & (n >= first_act))


@triton.jit
def _rotated(ptr, d, cos, sin, D: tl.constexpr, R: tl.constexpr):
    """Load q or k [DP] at ptr and rotate pairs (i, i + R/2); cos = 1, sin = 0 beyond R."""
    pair = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))
    x = tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)
    other = tl.load(ptr + pair, mask=d < D, other=0.0).to(tl.float32)
    rotated = x * cos + tl.where(d < R // 2, -other, other) * sin
    return rotated.to(ptr.dtype.element_ty).to(tl.float32)  # round as model.py does


@triton.jit
def _attention_kernel(
    qkv_ptr,  # [N, 3C], row stride stride_qkv; q | k | v, each [H, D], not rotated
    k_ptr, v_ptr,  # cache [N, H, S, D], strides stride_b, stride_h, D, 1; position p is written
    out_ptr,  # [N, C], row stride stride_out, written
    position_ptr,  # [N] int64, p
    cos_ptr, sin_ptr,  # [S, R/2] fp32
    part_ptr,  # [N H, pieces, DP + 16] fp32, scratch: acc [DP], peak and total of each piece
    count_ptr,  # [N H] int32, scratch: pieces finished; zero before and after a launch
    stride_qkv, stride_b, stride_h, stride_out, scale_log2e,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Attend to one piece of the cache; a head's last program merges all. Grid (pieces, H, N)."""
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    position = tl.load(position_ptr + b).to(tl.int32)
    first = tl.program_id(0) * BLOCK_S
    if first > position:
        return
    d, s = tl.arange(0, DP), first + tl.arange(0, BLOCK_S)
    angle = position * (R // 2) + tl.where(d < R // 2, d, d - R // 2)
    cos = tl.load(cos_ptr + angle, mask=d < R, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=d < R, other=0.0)
    qkv_ptr += b.to(tl.int64) * stride_qkv + h * D
    q = _rotated(qkv_ptr, d, cos, sin, D, R)
    cache = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    k_ptr, v_ptr = k_ptr + cache, v_ptr + cache
    old = (s < position)[:, None] & (d < D)[None, :]
    k = tl.load(k_ptr + s[:, None] * D + d[None, :], mask=old, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + s[:, None] * D + d[None, :], mask=old, other=0.0).to(tl.float32)
    if position < first + BLOCK_S:  # this piece holds the new key and value
        new_k = _rotated(qkv_ptr + H * D, d, cos, sin, D, R)
        new_v = tl.load(qkv_ptr + 2 * H * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(k_ptr + position * D + d, new_k, mask=d < D)
        tl.store(v_ptr + position * D + d, new_v, mask=d < D)
        k = tl.where((s == position)[:, None], new_k[None, :], k)
        v = tl.where((s == position)[:, None], new_v[None, :], v)
    score = tl.sum(q[None, :] * k, 1) * scale_log2e
    score = tl.where(s <= position, score, float("-inf"))
    peak = tl.max(score, 0)
    p = tl.exp2(score - peak)
    acc, total = tl.sum(p[:, None] * v, 0), tl.sum(p, 0)
    out_ptr += b.to(tl.int64) * stride_out + h * D
    pieces = position // BLOCK_S + 1
    if pieces == 1:
        tl.store(out_ptr + d, acc / total, mask=d < D)
        return
    bh = (b * H + h).to(tl.int64)
    part_ptr += bh * tl.num_programs(0) * (DP + 16)
    mine = part_ptr + tl.program_id(0) * (DP + 16)
    tl.store(mine + d, acc)
    tl.store(mine + DP, peak)
    tl.store(mine + DP + 1, total)
    tl.debug_barrier()  # all threads store before one counts the piece
    if tl.atomic_add(count_ptr + bh, 1) == pieces - 1:
        tl.debug_barrier()
        peak = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        acc = tl.zeros([DP], tl.float32)
        for i in range(0, pieces):
            its = part_ptr + i * (DP + 16)
            its_peak = tl.load(its + DP)
            top = tl.maximum(peak, its_peak)
            fade, weight = tl.exp2(peak - top), tl.exp2(its_peak - top)
            acc = acc * fade + tl.load(its + d) * weight
            total = total * fade + tl.load(its + DP + 1) * weight
            peak = top
        tl.store(out_ptr + d, acc / total, mask=d < D)
        tl.store(count_ptr + bh, 0)


def linear(
    x: Tensor, w: Tensor, b: Tensor, out: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None, act: Tensor | None = None,
) -> None:  # fmt: skip
    """Write LN(x) w^T + b to `out` if `norm` (weight, bias, eps) is given, else add x w^T + b.

    x [N, K], w [J, K] contiguous and b [J] share a dtype; `out` may be fp32. With `act` [N, M], out
    [N, J - M] gets the first columns, act gelu of the rest. Rows of x, out and act may be strided.
    """
    assert w.shape == (out.shape[1] + (0 if act is None else act.shape[1]), x.shape[1])
    kernel = "out_proj" if norm is None else "head" if act is None else "in_proj"
    cfg = config(f"decode_{kernel}", x)
    programs = triton.cdiv(len(x), ROWS) * triton.cdiv(len(w), cfg["BLOCK_N"])
    ln_w, ln_b, eps = norm or (None, None, 0.0)
    _linear_kernel[(programs,)](
        x, w, b, ln_w, ln_b, out, act, len(x), len(w), x.shape[1], out.shape[1],
        x.stride(0), out.stride(0), 0 if act is None else act.stride(0), eps,
        NORM=norm is not None, ACT=act is not None, RESIDUAL=norm is None, BLOCK_M=ROWS, **cfg,
    )  # fmt: skip


def scratch(rows: int, n_head: int, positions: int, head_dim: int, device) -> tuple[Tensor, Tensor]:
    """Return scratch (part, count) for `attention`; reusable across launches."""
    pieces = triton.cdiv(positions, BLOCK_S)
    part = torch.empty(rows * n_head, pieces, triton.next_power_of_2(head_dim) + 16, device=device)
    return part, torch.zeros(rows * n_head, dtype=torch.int32, device=device)


def attention(
    qkv: Tensor, k: Tensor, v: Tensor, position: Tensor, cos: Tensor, sin: Tensor, out: Tensor,
    part: Tensor, count: Tensor,
) -> None:  # fmt: skip
    """Write attention of qkv [N, 3C] at `position` [N] int64 to `out` [N, C]; append to the cache.

    k, v [N, H, S, D], D innermost: the cache, which gets the new keys and values at `position`.
    cos, sin fp32 [S, R/2] from model.rope_tables; part, count from `scratch`.
    """
    N, H, S, D = k.shape
    assert k.stride() == v.stride()
    grid = (triton.cdiv(S, BLOCK_S), H, N)
    _attention_kernel[grid](
        qkv, k, v, out, position, cos, sin, part, count, qkv.stride(0), k.stride(0), k.stride(1),
        out.stride(0), D**-0.5 / math.log(2), D=D, DP=triton.next_power_of_2(D),
        R=2 * cos.shape[1], **config("decode_attention", qkv) | {"BLOCK_S": BLOCK_S},
    )  # fmt: skip
