"""Causal flash attention with rotary embeddings, forward and backward, in place on packed qkv.

Maths, per head:
    s = D^-1/2 rot(q) rot(k)^T,  p = softmax(s),  out = p v
    dv = p^T dout,  ds = p * (dout v^T - delta),  delta = rowsum(dout * out)
    dq = D^-1/2 rot^-1(ds rot(k)),  dk = D^-1/2 rot^-1(ds^T rot(q))

Layout: qkv and dqkv [B, T, 3C] are q | k | v, each [H, D] with C = H D; out and dout are [B, T, C].
Each may be a column slice of a wider buffer (evenly spaced rows). No transposes, no copies.
Dtypes: bf16, fp16 or fp32 in and out; fp32 accumulators, angles and online softmax (by exp2).
Cost: 2 T^2 D FLOP forward and 5 T^2 D backward per head and sequence (causal half). Forward moves
at least 7C elements a token (4C without rotary). One H200, 8 x 2048 tokens, dropout 0.1, untuned:
140 TFLOP/s forward, 130 backward (LOG.md, 2026-11-28). D of 80 and 96 compute as 128. Needs sm_80.

Rotary: q and k are rotated once, IN PLACE: k by its own kernel, q by the forward program that owns
its rows. Rotating k in the key loop would cost registers and a second trip through shared memory
per tile. Backward needs the rotated values anyway. It rotates dq and dk back: dqkv is the gradient
of the unrotated qkv.

Backward: five matmuls, bitwise repeatable. A program owns BN keys, keeps dk and dv in registers and
loops over queries. Programs add to dq by atomics, in a different order every run. So dq accumulates
in int32 fixed point: integer addition is associative, any order gives the same bits.

Fixed-point scale: let acc = ds rot(k), dq before scaling and rotation. Rows of p sum to one, so per
dim d, with e over dims and maxima over visible keys,
    |acc_d| <= (sum_e |dout_e| max |v_e| / (1 - dropout_p) + |delta|) max |k_d|
The bound maps to 2^30. Maxima are per dim, over the blocks of keys that the query can see, so
  - an outlier dim costs the other dims no precision;
  - an outlier token costs none in earlier blocks, in other documents only in the block they share;
  - a query that sees the outlier but barely attends to it loses log2(outlier / typical) bits.
Typical entries keep about 20 significant bits; ds itself has 8 (bf16) or 11 (fp16). int32 leaves a
factor 2 above 2^30 for rounding errors, p's too while |scores| < 2^22. Cost per entry and key tile:
two multiplies, an add, a floor, a conversion. Against fp32 atomics it was not timed.

Dropout: keep if a 16-bit draw of Philox(seed; key, query, head) >= round(65535 dropout_p). It is
counter-based, so backward redraws the mask and stores none. With m = keep / (1 - dropout_p):
    out = (m p) v,  dv = (m p)^T dout,  ds = p * (m (dout v^T) - delta)

Masks: doc_start [B, T] int32, non-decreasing along T, limits query t to keys doc_start[t] .. t: its
document, or a sliding window. Tiles outside are skipped, not masked.
Sources: FlashAttention-2 (arXiv 2307.08691); Philox4x32-7 (Salmon et al., SC 2011).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import config

HEAD_DIMS = (32, 64, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WANTED_DEVICE = "a CUDA GPU, sm_80 or later, or TRITON_INTERPRET=1"
PAD = 128  # round T up to this in the statistics and dq's accumulator: no partial tiles
FIXED_POINT = True  # False: fp32 atomics for dq, not bitwise repeatable


@triton.jit
def _rotate(ptr, t, T, cos_ptr, sin_ptr, SIGN: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr):
    """Rotate dims (i, i + R/2) of rows ptr [N, 1] at positions t [N] in place; SIGN = -1: back."""
    i = tl.arange(0, HALF)[None, :]
    mask = (t < T)[:, None] & (i < R // 2)
    cos = tl.load(cos_ptr + t[:, None] * (R // 2) + i, mask=mask)
    sin = tl.load(sin_ptr + t[:, None] * (R // 2) + i, mask=mask) * SIGN
    x1 = tl.load(ptr + i, mask=mask).to(tl.float32)
    x2 = tl.load(ptr + R // 2 + i, mask=mask).to(tl.float32)
    tl.store(ptr + i, x1 * cos - x2 * sin, mask=mask)
    tl.store(ptr + R // 2 + i, x2 * cos + x1 * sin, mask=mask)


@triton.jit
def _load_tile(
    x, b, t0, column, T, stride, CUT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Load rows t0 .. t0 + ROWS, columns column .. column + D of sequence b, as [ROWS, DP].

    x is a TMA descriptor of [B, T, N], or a pointer to the sequence with row stride `stride`.
    CUT: zero the rows beyond T (TMA always does).
    """
    if TMA:
        tile = x.load([b, t0, column]).reshape(ROWS, DP)
    else:
        n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, DP)[None, :]
        inside = (d < D) & (t0 + n < T) if CUT else d < D
        tile = tl.load(x + column + t0 * stride + (n * stride + d), mask=inside, other=0.0)
    return tile


@triton.jit
def _mask(x, q, k, doc_start, fill, diagonal, DOC: tl.constexpr):
    """Set x to `fill` where query q may not see key k, positions from any common origin.

    `diagonal` tiles need the causal mask.
    """
    if diagonal:
        x = tl.where(k <= q, x, fill)
    if DOC:
        x = tl.where(k >= doc_start, x, fill)
    return x


@triton.jit
def _keep(
    seed_ptr, bh, q0, k0, BM: tl.constexpr, BN: tl.constexpr, DROP: tl.constexpr,
    TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Return dropout's keep mask [BM, BN] for queries q0 .. and keys k0 ..

    q0 is a multiple of 16, k0 of 32 (16 if TRANSPOSED).
    One Philox call yields 8 draws: queries i, i + 8 by keys j, j + 8, j + 16, j + 24. One thread
    owns all eight in the mma and wgmma accumulator layout, so no value crosses threads. TRANSPOSED
    (backward): a thread owns two of the keys, so two threads make the call and use half each.
    """
    q = (q0 // 2 + tl.arange(0, BM // 2))[:, None]
    if TRANSPOSED:
        r = (k0 // 2 + tl.arange(0, BN // 2))[None, :]
        k, upper = r // 16 * 8 + r % 8, r // 8 % 2 == 1
        a, b, c, d = tl.philox(tl.load(seed_ptr), k + 0 * q, q + 0 * k, bh, 0, 7)
        words = tl.join(tl.where(upper, c, a), tl.where(upper, d, b))
        draws = tl.join(words << 16, words).reshape(BM // 16, 8, BN // 16, 8, 2, 2)
        draws = draws.permute(0, 4, 1, 2, 5, 3).reshape(BM, BN)
    else:
        k = (k0 // 4 + tl.arange(0, BN // 4))[None, :]
        a, b, c, d = tl.philox(tl.load(seed_ptr), k + 0 * q, q + 0 * k, bh, 0, 7)
        words = tl.join(tl.join(a, c), tl.join(b, d))
        draws = tl.join(words << 16, words).reshape(BM // 16, 8, BN // 32, 8, 2, 2, 2)
        draws = draws.permute(0, 5, 1, 2, 4, 6, 3).reshape(BM, BN)
    # 65535, not 65536: dropout_p near 1 must not wrap to 0
    return draws >= tl.full([], int(DROP * 65535 + 0.5) << 16, tl.uint32)


@triton.jit
def _rotate_k_kernel(
    qkv_ptr,  # [B, T, 3C], row stride stride_qkv; the k columns are rotated
    cos_ptr, sin_ptr,  # [T or more, R/2] fp32
    T, stride_qkv, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Rotate one head of k in BM rows, in place; grid (T / BM, H, B)."""
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k_ptr = qkv_ptr + (b.to(tl.int64) * T + m)[:, None] * stride_qkv + (H + h) * D
    _rotate(k_ptr, m, T, cos_ptr, sin_ptr, 1, R, HALF)


@triton.jit
def _fwd_kernel(
    qkv_ptr,  # [B, T, 3C], row stride stride_qkv; k is rotated already, q is rotated here
    kv,  # TMA descriptor of qkv, tile [1, BN, DP]; unused unless TMA
    out_ptr,  # [B, T, C], row stride stride_out, written
    lse_ptr,  # [B H, TP] fp32, written: log2(sum(exp(s))) per query
    peak_ptr,  # [B H, TP/BM, 1 + DOC, 2, DP] int32, written: bits of max |k_d|, |v_d| over BM keys
    cos_ptr, sin_ptr,  # [T or more, R/2] fp32; unused if R = 0
    doc_ptr,  # [B, T] int32, first visible key per query; unused unless DOC
    seed_ptr,  # [1] int64, Philox key; unused if DROP = 0
    T, TP, stride_qkv, stride_out, scale_log2e,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, DOC: tl.constexpr,
    DROP: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Compute BM rows of one head of out, looping over tiles of BN keys; grid (T / BM, H, B)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # longest rows first: causal load balance
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    bh, row0, m0 = b * H + h, b.to(tl.int64) * T, block * BM
    m, n, d = m0 + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    own = (m < T)[:, None] & (d < D)[None, :]
    qkv_ptr += row0 * stride_qkv
    own_ptr = qkv_ptr + h * D + m[:, None].to(tl.int64) * stride_qkv
    if R > 0:
        _rotate(own_ptr, m, T, cos_ptr, sin_ptr, 1, R, HALF)
        tl.debug_barrier()  # the next load reads other threads' stores
    q = tl.load(own_ptr + d, mask=own, other=0.0)
    first, doc_start = 0, 0
    if DOC:
        doc_start = tl.load(doc_ptr + row0 + m, mask=m < T, other=0)[:, None]
        first = tl.load(doc_ptr + row0 + m0) // BN * BN
    if not TMA:
        kv = qkv_ptr

    row_max = tl.full([BM], -1e30, tl.float32)  # finite: no NaN if a row sees no key of a tile
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for diagonal in tl.static_range(2):  # tiles below the diagonal skip the causal mask
        lo = m0 // BN * BN if diagonal else first
        hi = tl.minimum(m0 + BM, T) if diagonal else m0 // BN * BN
        for n0 in tl.range(lo, hi, BN):
            k = _load_tile(kv, b, n0, (H + h) * D, T, stride_qkv, diagonal, BN, D, DP, TMA)
            v = _load_tile(kv, b, n0, (2 * H + h) * D, T, stride_qkv, diagonal, BN, D, DP, TMA)
            s = tl.dot(q, k.T, input_precision="ieee")
            s = _mask(s, m[:, None] - n0, n[None, :], doc_start - n0, float("-inf"), diagonal, DOC)
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2e)  # online softmax
            p = tl.exp2(s * scale_log2e - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            row_sum = row_sum * decay + tl.sum(p, 1)
            row_max = new_max
            if DROP > 0:
                p = tl.where(_keep(seed_ptr, bh, m0, n0, BM, BN, DROP, False), p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    acc = acc / (row_sum * (1 - DROP))[:, None]
    tl.store(out_ptr + (row0 + m)[:, None] * stride_out + h * D + d, acc, mask=own)
    tl.store(lse_ptr + bh.to(tl.int64) * TP + m, row_max + tl.log2(row_sum), mask=m < T)
    # int32 bits order non-negative floats correctly and NaN highest, so a NaN reaches dq
    peak_ptr += (bh * (TP // BM) + block).to(tl.int64) * (1 + DOC) * 2 * DP + d
    k = tl.abs(tl.load(own_ptr + H * D + d, mask=own, other=0.0).to(tl.float32))
    v = tl.abs(tl.load(own_ptr + 2 * H * D + d, mask=own, other=0.0).to(tl.float32))
    k, v = k.to(tl.int32, bitcast=True), v.to(tl.int32, bitcast=True)
    tl.store(peak_ptr, tl.max(k, 0))
    tl.store(peak_ptr + DP, tl.max(v, 0))
    if DOC:  # keys that the last query sees: later queries see no others of this block
        last = m[:, None] >= tl.load(doc_ptr + row0 + tl.minimum(m0 + BM, T) - 1)
        tl.store(peak_ptr + 2 * DP, tl.max(tl.where(last, k, 0), 0))
        tl.store(peak_ptr + 3 * DP, tl.max(tl.where(last, v, 0), 0))


@triton.jit
def _peaks(peak_ptr, lo, hi, last_only: tl.constexpr, DOC: tl.constexpr, DP: tl.constexpr):
    """Return max |k_d| and |v_d| [1, DP], as int32 bits, over blocks lo .. hi of one head.

    last_only: only over keys that queries of later blocks can see.
    """
    k, v = tl.zeros([1, DP], tl.int32), tl.zeros([1, DP], tl.int32)
    for j0 in range(lo, hi, 16):
        j = (j0 + tl.arange(0, 16))[:, None]
        at = peak_ptr + (j * (1 + DOC) + last_only) * 2 * DP
        k = tl.maximum(k, tl.max(tl.load(at, mask=j < hi, other=0), 0, keep_dims=True))
        v = tl.maximum(v, tl.max(tl.load(at + DP, mask=j < hi, other=0), 0, keep_dims=True))
    return k, v


@triton.jit
def _delta_kernel(
    out_ptr, dout_ptr,  # [B, T, C], row strides stride_out, stride_dout
    lse_ptr, delta_ptr,  # [B H, TP] fp32; delta is written, lse is zeroed beyond T
    peak_ptr,  # [B H, TP/PEAK, 1 + DOC, 2, DP] int32, from the forward kernel
    row_scale_ptr, dim_scale_ptr,  # [B H, TP], [B H, TP/BM, DP] fp32, written: dq's fixed point
    doc_ptr,  # [B, T] int32, first visible key per query; unused unless DOC
    T, TP, stride_out, stride_dout,
    D: tl.constexpr, DP: tl.constexpr, DOC: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr,
    PEAK: tl.constexpr
):  # fmt: skip
    """Compute delta, and dq's scales from the peaks of all visible blocks of PEAK keys."""
    block, h, b, H = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    bh, row0, m0 = b * H + h, b.to(tl.int64) * T, block * BM
    m, d = m0 + tl.arange(0, BM), tl.arange(0, DP)[None, :]
    row, own = (row0 + m)[:, None], (m < T)[:, None] & (d < D)
    out = tl.load(out_ptr + row * stride_out + h * D + d, mask=own, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * stride_dout + h * D + d, mask=own, other=0.0).to(tl.float32)
    delta, stat = tl.sum(out * dout, 1), bh.to(tl.int64) * TP + m
    tl.store(delta_ptr + stat, delta)
    tl.store(lse_ptr + stat, 0.0, mask=m >= T)  # keeps p finite in padding rows

    own_block, last_block = m0 // PEAK, (tl.minimum(m0 + BM, T) - 1) // PEAK
    peak_ptr += bh.to(tl.int64) * (TP // PEAK) * (1 + DOC) * 2 * DP + d
    k_own, v_own = _peaks(peak_ptr, own_block, last_block + 1, False, DOC, DP)
    first = 0
    if DOC:
        doc_start = tl.load(doc_ptr + row0 + m, mask=m < T, other=T)[:, None]
        first = tl.min(doc_start)
    k_all, v_all = _peaks(peak_ptr, first // PEAK, own_block, DOC, DOC, DP)
    k_peak = tl.maximum(k_all, k_own).to(tl.float32, bitcast=True)
    k_peak = tl.where(k_peak < 1e-30, 1e-30, k_peak)  # avoid 1 / 0; NaN and inf pass on to dq
    v_peak, share = tl.maximum(v_all, v_own), 1.0
    if DOC:  # rows that see only their own blocks: |k_d| <= share * k_peak_d
        sees_earlier = doc_start < own_block * PEAK
        v_peak = tl.where(sees_earlier, v_peak, v_own)
        share = tl.where(sees_earlier, 1.0, tl.max(k_own.to(tl.float32, bitcast=True) / k_peak))
    v_peak = v_peak.to(tl.float32, bitcast=True)
    bound = tl.sum(tl.abs(dout) * v_peak, 1) / (1 - DROP) + tl.abs(delta)
    bound = bound[:, None] * share
    # map the bound to 2^30: the factor 2 below int32's limit absorbs rounding
    tl.store(row_scale_ptr + stat[:, None], 2.0**30 / tl.where(bound < 1e-28, 1e-28, bound))
    tl.store(dim_scale_ptr + (bh * (TP // BM) + block).to(tl.int64) * DP + d, 1 / k_peak)


@triton.jit
def _bwd_kernel(
    qkv_ptr,  # [B, T, 3C], row stride stride_qkv; q and k rotated
    q, dout,  # TMA descriptors of qkv, dout [B, T, C], tile [1, BM, DP]; else pointers, stride_dout
    lse_ptr, delta_ptr, row_scale_ptr,  # [B H, TP] fp32, from the delta kernel
    dim_scale_ptr,  # [B H, TP/BM, DP] fp32, from the delta kernel
    dq,  # [B H TP, DP] int32 if FIXED, else fp32; zeroed, added to; TMA descriptor, tile [BM, DP]
    dqkv_ptr,  # [B, T, 3C], row stride stride_dqkv; the k and v columns are written
    cos_ptr, sin_ptr,  # [T or more, R/2] fp32; unused if R = 0
    doc_ptr,  # [B, T] int32, first visible key per query; unused unless DOC
    doc_end_ptr,  # [B, T] int32, first query that no longer sees each key; unused unless DOC
    seed_ptr,  # [1] int64, Philox key; unused if DROP = 0
    T, TP, stride_qkv, stride_dout, stride_dqkv, scale, scale_log2e,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, DOC: tl.constexpr,
    DROP: tl.constexpr, FIXED: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Compute BN rows of dk and dv and add their part of dq; grid (T / BN, H, B)."""
    tl.static_assert(BN % BM == 0)
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    bh, row0, n0 = b * H + h, b.to(tl.int64) * T, tl.program_id(0) * BN
    m, n, d = tl.arange(0, BM), n0 + tl.arange(0, BN), tl.arange(0, DP)
    own = (n < T)[:, None] & (d < D)[None, :]
    qkv_ptr += row0 * stride_qkv
    k_ptr = qkv_ptr + (H + h) * D + n[:, None].to(tl.int64) * stride_qkv + d
    k = tl.load(k_ptr, mask=own, other=0.0)
    v = tl.load(k_ptr + H * D, mask=own, other=0.0)
    end = T
    if DOC:
        end = tl.load(doc_end_ptr + row0 + tl.minimum(n0 + BN, T) - 1)
    stat0 = bh.to(tl.int64) * TP
    lse_ptr += stat0
    delta_ptr += stat0
    row_scale_ptr += stat0
    dim_scale_ptr += stat0 // BM * DP
    if not TMA:
        q, dout = qkv_ptr, dout + row0 * stride_dout
        dq += stat0 * DP

    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for m0 in tl.range(n0, end, BM, disable_licm=not TMA):  # hoisted addresses would spill
        qm = _load_tile(q, b, m0, h * D, T, stride_qkv, True, BM, D, DP, TMA)
        lse = tl.load(lse_ptr + m0 + m)
        st = tl.dot(k, qm.T, input_precision="ieee")  # S^T [BN, BM]: dv and dk need no transpose
        pt = tl.exp2(st * scale_log2e - lse[None, :])
        doc_start = 0
        if DOC:
            doc_start = tl.load(doc_ptr + row0 + m0 + m, mask=m0 + m < T, other=0)[None, :]
        diagonal = m0 < n0 + BN - 1 if TMA else True  # sm_80: branching spills, always mask
        pt = _mask(pt, (m0 + m)[None, :], n[:, None], doc_start, 0.0, diagonal, DOC)
        do = _load_tile(dout, b, m0, h * D, T, stride_dout, True, BM, D, DP, TMA)
        delta = tl.load(delta_ptr + m0 + m)
        if FIXED:
            row_scale = tl.load(row_scale_ptr + m0 + m)[:, None]
            dim_scale = tl.load(dim_scale_ptr + m0 // BM * DP + d)[None, :]
        if DROP > 0:
            keep = _keep(seed_ptr, bh, m0, n0, BM, BN, DROP, True).T
        kept = tl.where(keep, pt, 0.0) if DROP > 0 else pt
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
        dpt = tl.dot(v, do.T, input_precision="ieee")
        if DROP > 0:
            dpt = tl.where(keep, dpt * (1 / (1 - DROP)), 0.0)
        dst = (pt * (dpt - delta[None, :])).to(qm.dtype)
        dk = tl.dot(dst, qm, dk, input_precision="ieee")
        part = tl.dot(dst.T, k, input_precision="ieee")
        if FIXED:
            part = tl.floor(part * dim_scale * row_scale + 0.5).to(tl.int32)  # to the nearest
        if TMA:  # TMA reduce-add
            dq.atomic_add([bh * TP + m0, 0], part)
        elif FIXED:  # two columns per atomic; a negative even sum leaves the odd one 1 unit low
            even, odd = part.to(tl.int64).reshape(BM, DP // 2, 2).split()
            pairs = dq.to(tl.pointer_type(tl.int64)) + m0 * (DP // 2)
            pairs += m[:, None] * (DP // 2) + tl.arange(0, DP // 2)
            tl.atomic_add(pairs, even + (odd << 32), sem="relaxed")
        else:
            tl.atomic_add(dq + m0 * DP + m[:, None] * DP + d, part, sem="relaxed")
    dk_ptr = dqkv_ptr + (row0 + n)[:, None] * stride_dqkv + (H + h) * D
    tl.store(dk_ptr + H * D + d, dv * (1 / (1 - DROP)), mask=own)
    tl.store(dk_ptr + d, dk * scale, mask=own)
    if R > 0:
        tl.debug_barrier()
        _rotate(dk_ptr, n, T, cos_ptr, sin_ptr, -1, R, HALF)


@triton.jit
def _dq_kernel(
    dq_ptr,  # [B H, TP, DP] int32 if FIXED, else fp32: summed by the backward kernel
    row_scale_ptr, dim_scale_ptr,  # [B H, TP], [B H, TP/BM, DP] fp32, from the delta kernel
    dqkv_ptr,  # [B, T, 3C], row stride stride_dqkv; the q columns are written
    cos_ptr, sin_ptr,  # [T or more, R/2] fp32; unused if R = 0
    T, TP, stride_dqkv, scale,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, FIXED: tl.constexpr,
    BM: tl.constexpr
):  # fmt: skip
    """Scale BM rows of dq back and rotate them back; grid (T / BM, H, B)."""
    block, h, b, H = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    m, d = block * BM + tl.arange(0, BM), tl.arange(0, DP)[None, :]
    stat = ((b * H + h).to(tl.int64) * TP + m)[:, None]
    dq = tl.load(dq_ptr + stat * DP + d) * scale
    if FIXED:
        dim_scale_ptr += ((b * H + h) * (TP // BM) + block).to(tl.int64) * DP
        dq = dq / tl.load(row_scale_ptr + stat) / tl.load(dim_scale_ptr + d)
    row_ptr = dqkv_ptr + (b.to(tl.int64) * T + m)[:, None] * stride_dqkv + h * D
    tl.store(row_ptr + d, dq, mask=(m < T)[:, None] & (d < D))
    if R > 0:
        tl.debug_barrier()
        _rotate(row_ptr, m, T, cos_ptr, sin_ptr, -1, R, HALF)


def _tile(op: str, qkv: Tensor, D: int, dropout_p: float) -> dict:
    """Return the tile and launch options of "fwd" or "bwd" for this device and head dim.

    BM queries by BN keys, powers of 2 from 16 (BN from 32) to 128; backward needs BN % BM == 0.
    TMA is off where the head dim is padded.
    """
    name = f"attention_{op}_d{64 if D <= 64 else 128}" + "_dropout" * (dropout_p > 0)
    tile = config(name, qkv)
    if qkv.is_cuda and qkv.dtype is torch.float32:
        tile |= {"BM": 32, "BN": 32, "TMA": 0}  # twice the bytes, no tensor cores
    tile["TMA"] = tile["TMA"] and D == triton.next_power_of_2(D)
    return tile


def _shape(qkv: Tensor, n_head: int, rope) -> tuple:
    """Return (B, H, T, TP), the head's constexprs {D, R, HALF}, cos and sin."""
    B, T, C3 = qkv.shape
    D, (cos, sin) = C3 // (3 * n_head), rope or (None, None)
    half = 0 if rope is None else cos.shape[1]
    head = {"D": D, "R": 2 * half, "HALF": triton.next_power_of_2(half)}
    return (B, n_head, T, triton.cdiv(T, PAD) * PAD), head, cos, sin


def _descriptor(x: Tensor, rows: int, DP: int) -> TensorDescriptor:
    """Return a TMA descriptor of x [B, T, N] with tiles of `rows` rows by one head."""
    strides = [x.shape[1] * x.stride(1), x.stride(1), 1]  # stride(0) is arbitrary at B = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, rows, DP])


def attention_fwd(
    qkv, n_head, rope=None, dropout_p=0.0, seed=None, doc_start=None, out=None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (out [B, T, C], lse, peak); ROTATE q and k in qkv. `attention_bwd` takes lse and peak.

    qkv [B, T, 3C]  unit column stride, evenly spaced rows, 16-byte aligned
    rope            (cos, sin), each [T or more, R/2] fp32, R <= D; None: no rotation
    dropout_p, seed drop probability (the threshold has 16 bits); seed is int64 [1]
    doc_start       int32 [B, T], first visible key per query; None: 0
    out             output buffer, may be columns of a wider one; None allocates
    Arguments are not checked here; `block` checks them.
    """
    (B, H, T, TP), head, cos, sin = _shape(qkv, n_head, rope)
    DP, doc = triton.next_power_of_2(head["D"]), doc_start is not None
    tile = _tile("fwd", qkv, head["D"], dropout_p)
    out = qkv.new_empty(B, T, H * head["D"]) if out is None else out
    lse = qkv.new_empty(B * H, TP, dtype=torch.float32)
    peak = qkv.new_empty(B * H, TP // tile["BM"], 1 + doc, 2, DP, dtype=torch.int32)
    if rope is not None:
        _rotate_k_kernel[triton.cdiv(T, 64), H, B](
            qkv, cos, sin, T, qkv.stride(1), **head, BM=64, num_warps=4
        )
    kv = _descriptor(qkv, tile["BN"], DP) if tile["TMA"] else qkv
    _fwd_kernel[triton.cdiv(T, tile["BM"]), H, B](
        qkv, kv, out, lse, peak, cos, sin, doc_start, seed, T, TP, qkv.stride(1), out.stride(1),
        head["D"] ** -0.5 / math.log(2), **head, DP=DP, DOC=doc, DROP=dropout_p, **tile,
    )  # fmt: skip
    return out, lse, peak


def attention_bwd(
    dout, qkv, out, lse, peak, n_head,
    rope=None, dropout_p=0.0, seed=None, doc_start=None, dqkv=None
) -> Tensor:  # fmt: skip
    """Return dqkv [B, T, 3C] of the unrotated qkv; dout, out, dqkv may be strided like qkv."""
    (B, H, T, TP), head, cos, sin = _shape(qkv, n_head, rope)
    D, DP, doc = head["D"], peak.shape[-1], doc_start is not None
    tile = _tile("bwd", qkv, D, dropout_p)
    BM, BN = tile["BM"], tile["BN"]
    dqkv = qkv.new_empty(qkv.shape) if dqkv is None else dqkv
    dq = qkv.new_zeros(B * H * TP, DP, dtype=torch.int32 if FIXED_POINT else torch.float32)
    delta, row_scale = torch.empty_like(lse), torch.empty_like(lse)
    dim_scale = lse.new_empty(B * H, TP // BM, DP)
    doc_end = None
    if doc:
        keys = torch.arange(T, dtype=torch.int32, device=qkv.device).expand(B, T).contiguous()
        doc_end = torch.searchsorted(doc_start, keys, right=True, out_int32=True)
    _delta_kernel[TP // BM, H, B](
        out, dout, lse, delta, peak, row_scale, dim_scale, doc_start, T, TP, out.stride(1),
        dout.stride(1), D=D, DP=DP, DOC=doc, DROP=dropout_p, BM=BM, PEAK=TP // peak.shape[1],
        num_warps=4,
    )  # fmt: skip
    q, do, dq_ = qkv, dout, dq
    if tile["TMA"]:
        q, do = _descriptor(qkv, BM, DP), _descriptor(dout, BM, DP)
        dq_ = TensorDescriptor.from_tensor(dq, [BM, DP])
    _bwd_kernel[triton.cdiv(T, BN), H, B](
        qkv, q, do, lse, delta, row_scale, dim_scale, dq_, dqkv, cos, sin, doc_start, doc_end, seed,
        T, TP, qkv.stride(1), dout.stride(1), dqkv.stride(1), D**-0.5, D**-0.5 / math.log(2),
        **head, DP=DP, DOC=doc, DROP=dropout_p, FIXED=FIXED_POINT, **tile,
    )  # fmt: skip
    _dq_kernel[triton.cdiv(T, BM), H, B](
        dq, row_scale, dim_scale, dqkv, cos, sin, T, TP, dqkv.stride(1), D**-0.5,
        **head, DP=DP, FIXED=FIXED_POINT, BM=BM, num_warps=4,
    )  # fmt: skip
    return dqkv


def runs_on(device: torch.device) -> bool:
    """Return whether the kernels run on `device`; on a CPU, only in Triton's interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not isinstance(_fwd_kernel, triton.JITFunction)


def attention_reference(qkv: Tensor, n_head: int, rope=None, doc_start=None, keep=None) -> Tensor:
    """Compute out in plain torch, in qkv's dtype; dropout scales p by keep [B, H, T, T]."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if rope is not None:
        cos, sin = (x[:T].to(qkv.dtype) for x in rope)
        parts = (x.tensor_split([cos.shape[1], 2 * cos.shape[1]], -1) for x in (q, k))
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin, c], -1) for a, b, c in parts)
    t = torch.arange(T, device=qkv.device)
    seen = t[:, None] >= t  # [T, T], queries in rows
    if doc_start is not None:
        seen = seen & (t >= doc_start[:, None, :, None])  # [B, 1, T, T]
    p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    return ((p if keep is None else p * keep) @ v).transpose(1, 2).reshape(B, T, C3 // 3)
