"""Fused rotary flash attention, causal, forward and backward, on the packed projection as it lies.

    s = D^-1/2 rot(q) rot(k)^T,  p = softmax(s),  out = p v
    dv = p^T dout,  ds = p * (dout v^T - delta),  delta = rowsum(dout * out)
    dq = D^-1/2 rot^-1(ds rot(k)),  dk = D^-1/2 rot^-1(ds^T rot(q))

qkv [B, T, 3C] holds q | k | v, each [H, D] with C = H D, in rows that may belong to a wider buffer;
out [B, T, C] and dqkv [B, T, 3C] likewise: no transposes, no copies. bf16, fp16 or fp32; products,
softmax (online, base 2) and angles in fp32. A head costs 2 T^2 D FLOP forward, 5 T^2 D backward.

Rotary. Turning k inside the key loop costs registers and a second trip through shared memory for
every tile. So q and k are turned once, IN PLACE: k by a pass of its own, q by the forward program
that owns its rows. qkv then holds the rotated values, which backward needs anyway, and backward
turns dq and dk back. Gradients are those of the qkv that came in.

Backward in five matmuls, bitwise repeatable. A program owns BN keys, holds dk and dv in registers
and walks the queries. dq sums over programs; atomic fp32 adds would come in another order on every
run. So dq accumulates in fixed point: integers add associatively, and any order gives the same
bits. The step of each row is sound, not guessed: |dq| <= 2 |dout| max |v| max |k_d|, since rows of
p sum to one. 30 bits of that range leave some 20 for a typical entry, where ds has 8 (bf16) or 11.
The price is two instructions per entry of dq, against two matmuls and an exp in its own kernel.

Dropout keeps p where 16 bits of Philox(seed; key, query, head) reach dropout_p; backward draws the
same. A document mask is doc_start [B, T] int32: query t sees the keys doc_start[t] .. t. It never
decreases along T, and blocks outside are skipped, not masked. D of 80 and 96 compute as 128.
Sources: FlashAttention-2 (arXiv 2307.08691); Philox4x32-7 (Salmon et al., SC 2011).
"""

import json
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.spec import Kernel, config, types

HEAD_DIMS = (32, 64, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WANTED_DEVICE = "a GPU of sm_80 or later, or TRITON_INTERPRET=1"
PAD = 128  # statistics and dq's accumulator have T rounded up to this: no tile of theirs is cut


@triton.jit
def _rotate(ptr, t, T, cos_ptr, sin_ptr, SIGN: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr):
    """Turn dims (i, i + R/2) of the rows at ptr [N, 1], positions t [N], in place."""
    i = tl.arange(0, HALF)[None, :]
    mask = (t < T)[:, None] & (i < R // 2)
    cos = tl.load(cos_ptr + t[:, None] * (R // 2) + i, mask=mask)
    sin = tl.load(sin_ptr + t[:, None] * (R // 2) + i, mask=mask) * SIGN
    x1 = tl.load(ptr + i, mask=mask).to(tl.float32)
    x2 = tl.load(ptr + R // 2 + i, mask=mask).to(tl.float32)
    tl.store(ptr + i, x1 * cos - x2 * sin, mask=mask)
    tl.store(ptr + R // 2 + i, x2 * cos + x1 * sin, mask=mask)


@triton.jit
def _keep(seed_ptr, bh, q, k0, BN: tl.constexpr, DROP: tl.constexpr):
    """Dropout's mask [BM, BN] for queries q, keys k0 ..: a Philox call serves eight neighbours."""
    key = (k0 // 8 + tl.arange(0, BN // 8))[None, :] + 0 * q[:, None]
    a, b, c, d = tl.philox(tl.load(seed_ptr), key, q[:, None], bh, 0, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16).reshape(q.shape[0], BN)
    return halves >= tl.full([], int(DROP * 2**16 + 0.5), tl.uint32)


@triton.jit
def _rotate_k_kernel(
    qkv_ptr, cos_ptr, sin_ptr, T, stride_qkv,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k_ptr = qkv_ptr + (b.to(tl.int64) * T + m)[:, None] * stride_qkv + (H + h) * D
    _rotate(k_ptr, m, T, cos_ptr, sin_ptr, 1, R, HALF)


@triton.jit
def _fwd_kernel(
    qkv_ptr, kv, out_ptr, lse_ptr, peak_ptr, cos_ptr, sin_ptr, doc_ptr, seed_ptr,
    T, TP, stride_qkv, stride_out, scale_log2e,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, DOC: tl.constexpr,
    DROP: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    bh, row0, m0 = b * H + h, b.to(tl.int64) * T, block * BM
    m, n, d = m0 + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    dims = (d < D)[None, :]
    own = (m < T)[:, None] & dims
    q_ptr = qkv_ptr + row0 * stride_qkv + h * D
    own_ptr = q_ptr + m[:, None].to(tl.int64) * stride_qkv
    if R > 0:
        _rotate(own_ptr, m, T, cos_ptr, sin_ptr, 1, R, HALF)
        tl.debug_barrier()  # the next load reads what other threads stored
    q = tl.load(own_ptr + d, mask=own, other=0.0)
    lo = 0
    if DOC:
        doc_start = tl.load(doc_ptr + row0 + m, mask=m < T, other=0)
        lo = tl.load(doc_ptr + row0 + m0) // BN * BN
    # stepped, since n0 * stride in 64 bits would make LLVM widen n0, and with it every mask
    k_ptr = q_ptr + H * D + tl.cast(lo, tl.int64) * stride_qkv
    tile = n[:, None] * stride_qkv + d

    row_max = tl.full([BM], -1e30, tl.float32)  # finite: a block may hold no key of some query
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for diagonal in tl.static_range(2):
        hi = m0 // BN * BN
        if diagonal:
            lo, hi = hi, tl.minimum(m0 + BM, T)
        for n0 in tl.range(lo, hi, BN):
            if TMA:
                k = kv.load([b, n0, (H + h) * D]).reshape(BN, DP)
                v = kv.load([b, n0, (2 * H + h) * D]).reshape(BN, DP)
            else:
                inside = (n0 + n < T)[:, None] & dims if diagonal else dims
                k = tl.load(k_ptr + tile, mask=inside, other=0.0)
                v = tl.load(k_ptr + H * D + tile, mask=inside, other=0.0)
            k_ptr += BN * stride_qkv
            s = tl.dot(q, k.T, input_precision="ieee")
            if diagonal:
                s = tl.where(m[:, None] >= (n0 + n)[None, :], s, float("-inf"))
            if DOC:
                s = tl.where(doc_start[:, None] <= (n0 + n)[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2e)
            p = tl.exp2(s * scale_log2e - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            row_sum = row_sum * decay + tl.sum(p, 1)
            row_max = new_max
            if DROP > 0:
                p = tl.where(_keep(seed_ptr, bh, m, n0, BN, DROP), p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    acc = acc / (row_sum * (1 - DROP))[:, None]
    tl.store(out_ptr + (row0 + m)[:, None] * stride_out + h * D + d, acc, mask=own)
    tl.store(lse_ptr + bh.to(tl.int64) * TP + m, row_max + tl.log2(row_sum), mask=m < T)
    # what the bound on dq needs of these rows' keys and values
    k = tl.load(own_ptr + H * D + d, mask=own, other=0.0).to(tl.float32)
    v = tl.load(own_ptr + 2 * H * D + d, mask=own, other=0.0).to(tl.float32)
    tl.atomic_max(peak_ptr + bh * 2, tl.max(tl.abs(k)), sem="relaxed")
    tl.atomic_max(peak_ptr + bh * 2 + 1, tl.sqrt(tl.max(tl.sum(v * v, 1))), sem="relaxed")


@triton.jit
def _delta_kernel(
    out_ptr, dout_ptr, lse_ptr, delta_ptr, steps_ptr, peak_ptr, T, TP, stride_out, stride_dout,
    D: tl.constexpr, DP: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    bh = b * H + h
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)[None, :]
    row = (b.to(tl.int64) * T + m)[:, None]
    mask = (m < T)[:, None] & (d < D)
    out = tl.load(out_ptr + row * stride_out + h * D + d, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * stride_dout + h * D + d, mask=mask, other=0.0).to(tl.float32)
    stat = bh.to(tl.int64) * TP + m
    tl.store(delta_ptr + stat, tl.sum(out * dout, 1))
    tl.store(lse_ptr + stat, 0.0, mask=m >= T)  # rows of padding must give a finite p
    # Fixed-point steps to 1: the bound takes 2^30 of int32's 2^31, the rest is for rounding. NaN
    # and inf go on to dq; a row of zeros divides by something.
    peak = tl.load(peak_ptr + bh * 2) * tl.load(peak_ptr + bh * 2 + 1)
    bound = tl.sqrt(tl.sum(dout * dout, 1)) * peak * (2 / (1 - DROP))
    tl.store(steps_ptr + stat, 2.0**30 / (bound + 1e-28))


@triton.jit
def _bwd_kernel(
    qkv_ptr, q, dout, lse, delta, dq, steps_ptr, dqkv_ptr, cos_ptr, sin_ptr, doc_ptr, doc_end_ptr,
    seed_ptr, T, TP, stride_qkv, stride_dout, stride_dqkv, scale, scale_log2e,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, DOC: tl.constexpr,
    DROP: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    tl.static_assert(BN % BM == 0)
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    bh, row0, n0 = b * H + h, b.to(tl.int64) * T, tl.program_id(0) * BN
    m, n, d = tl.arange(0, BM), n0 + tl.arange(0, BN), tl.arange(0, DP)
    dims = (d < D)[None, :]
    own = (n < T)[:, None] & dims
    q_ptr = qkv_ptr + row0 * stride_qkv + h * D
    k_ptr = q_ptr + H * D + n[:, None].to(tl.int64) * stride_qkv + d
    k = tl.load(k_ptr, mask=own, other=0.0)
    v = tl.load(k_ptr + H * D, mask=own, other=0.0)
    end = T
    if DOC:
        doc_ptr += row0
        end = tl.load(doc_end_ptr + row0 + tl.minimum(n0 + BN, T) - 1)

    # On sm_80 Triton 3.7 lays out dots alike, a warp to 16 rows, when their operands share terms. p
    # and ds need that: `rows` masks q, dout, lse and delta, though the last two are padded. dq, of
    # whose 64 rows 8 warps would do each twice, must not: it shares none. And addresses hoisted out
    # of the loop would spill. `python -m kernels.resources` shows all three.
    stat0 = bh.to(tl.int64) * TP
    steps_ptr += stat0
    if not TMA:
        do_ptr = dout + row0 * stride_dout + h * D
        q_tile, do_tile = m[:, None] * stride_qkv + d, m[:, None] * stride_dout + d
        lse_ptr, delta_ptr = lse + stat0, delta + stat0
        PAIRS: tl.constexpr = DP // 2
        dq_ptr = dq.to(tl.pointer_type(tl.int64)) + stat0 * PAIRS
        dq_tile = m[:, None].to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for m0 in tl.range(n0, end, BM, disable_licm=not TMA):
        rows = m0 + m < T
        if TMA:
            qm = q.load([b, m0, h * D]).reshape(BM, DP)
            lse_m = lse.load([bh, m0]).reshape(BM)
        else:
            at = q_ptr + tl.cast(m0, tl.int64) * stride_qkv + q_tile
            qm = tl.load(at, mask=rows[:, None] & dims, other=0.0)
            lse_m = tl.load(lse_ptr + m0 + m, mask=rows, other=0.0)
        st = tl.dot(k, qm.T, input_precision="ieee")  # [BN, BM]: keys down, queries across
        pt = tl.exp2(st * scale_log2e - lse_m[None, :])
        if m0 < n0 + BN - 1:  # the diagonal cuts this block
            pt = tl.where(n[:, None] <= (m0 + m)[None, :], pt, 0.0)
        if DOC:
            start = tl.load(doc_ptr + m0 + m, mask=rows, other=T)
            pt = tl.where(n[:, None] >= start[None, :], pt, 0.0)
        if TMA:
            do = dout.load([b, m0, h * D]).reshape(BM, DP)
            delta_m = delta.load([bh, m0]).reshape(BM)
        else:
            at = do_ptr + tl.cast(m0, tl.int64) * stride_dout + do_tile
            do = tl.load(at, mask=rows[:, None] & dims, other=0.0)
            delta_m = tl.load(delta_ptr + m0 + m, mask=rows, other=0.0)
        if DROP > 0:
            keep = _keep(seed_ptr, bh, m0 + m, n0, BN, DROP).T
        kept = tl.where(keep, pt, 0.0) if DROP > 0 else pt
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
        dpt = tl.dot(v, do.T, input_precision="ieee")
        if DROP > 0:
            dpt = tl.where(keep, dpt * (1 / (1 - DROP)), 0.0)
        dst = (pt * (dpt - delta_m[None, :])).to(qm.dtype)
        steps = tl.load(steps_ptr + m0 + m)
        dk = tl.dot(dst, qm, dk, input_precision="ieee")
        part = tl.dot(dst.T, k, input_precision="ieee")
        part = (part * steps[:, None]).to(tl.int32)
        if TMA:
            dq.atomic_add([bh * TP + m0, 0], part)
        else:  # two columns to an add: a carry into the second is one step, and as repeatable
            even, odd = part.to(tl.int64).reshape(BM, PAIRS, 2).split()
            tl.atomic_add(dq_ptr + m0 * PAIRS + dq_tile, even + (odd << 32), sem="relaxed")
    dk_ptr = dqkv_ptr + (row0 + n)[:, None] * stride_dqkv + (H + h) * D
    tl.store(dk_ptr + H * D + d, dv * (1 / (1 - DROP)), mask=own)
    tl.store(dk_ptr + d, dk * scale, mask=own)
    if R > 0:
        tl.debug_barrier()
        _rotate(dk_ptr, n, T, cos_ptr, sin_ptr, -1, R, HALF)


@triton.jit
def _dq_kernel(
    dq_ptr, steps_ptr, dqkv_ptr, cos_ptr, sin_ptr, T, TP, stride_dqkv, scale,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    h, b, H = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)[None, :]
    stat = (b * H + h).to(tl.int64) * TP + m
    dq = tl.load(dq_ptr + stat[:, None] * DP + d) * scale / tl.load(steps_ptr + stat)[:, None]
    row_ptr = dqkv_ptr + (b.to(tl.int64) * T + m)[:, None] * stride_dqkv + h * D
    tl.store(row_ptr + d, dq, mask=(m < T)[:, None] & (d < D))
    if R > 0:
        tl.debug_barrier()
        _rotate(row_ptr, m, T, cos_ptr, sin_ptr, -1, R, HALF)


# By compute capability: "queries keys warps stages TMA", default first; tuning may reorder them.
# Dropout needs registers, and so tiles of its own. A padded head dim runs without TMA.
_ROWS = {80: "64 0 4 1", 90: "64 0 4 1"}
_LAUNCHES = [
    ("rotate_k", _rotate_k_kernel, _ROWS),
    ("delta", _delta_kernel, _ROWS),
    ("dq", _dq_kernel, _ROWS),
    ("fwd_d64", _fwd_kernel, {
        80: "128 64 4 2, 128 64 4 3, 128 64 8 3, 64 64 4 3, 128 128 8 2",
        90: "128 64 8 3 1, 128 128 8 2 1, 128 64 4 3 1, 64 128 4 2 1, 64 64 4 3 1, 128 64 8 3"}),
    ("bwd_d64", _bwd_kernel, {
        80: "64 128 8 2, 64 128 8 3, 32 128 8 2, 32 128 4 2, 32 64 4 2",
        90: "64 128 8 2 1, 64 128 8 3 1, 64 64 4 2 1, 32 128 8 2 1, 32 128 4 2 1, 64 128 8 2"}),
    ("fwd_d64_dropout", _fwd_kernel, {80: "128 64 8 2, 64 64 4 2", 90: "128 64 8 3 1"}),
    ("bwd_d64_dropout", _bwd_kernel, {80: "32 128 8 2, 16 128 8 2", 90: "64 128 8 2 1"}),
    ("fwd_d128", _fwd_kernel, {80: "128 64 8 2, 64 64 4 2", 90: "128 128 8 2 1, 128 64 8 3 1"}),
    ("bwd_d128", _bwd_kernel, {80: "64 64 8 2, 32 64 4 2", 90: "32 128 8 2 1, 32 64 4 2 1"}),
    ("fwd_d128_dropout", _fwd_kernel, {80: "64 64 4 2, 128 32 8 3", 90: "128 64 8 2 1"}),
    ("bwd_d128_dropout", _bwd_kernel, {80: "64 64 8 2, 32 64 8 2", 90: "32 64 8 2 1, 16 64 4 2 1"}),
]  # fmt: skip
_SIGNATURE = types(
    "qkv_ptr out_ptr dout_ptr dqkv_ptr q kv dout",
    "T TP stride_qkv stride_out stride_dout stride_dqkv",
    **{f"{name}_ptr": "*fp32" for name in ("cos", "sin", "lse", "peak", "delta", "steps")},
    **dict.fromkeys(("doc_ptr", "doc_end_ptr", "dq_ptr", "dq"), "*i32"), seed_ptr="*i64",
    lse="*fp32", delta="*fp32", scale="fp32", scale_log2e="fp32",
)  # fmt: skip
_DESCRIPTORS = {"kv": "T[1,{BN},{DP}]", "q": "T[1,{BM},{DP}]", "dout": "T[1,{BM},{DP}]"}
_DESCRIPTORS |= {"dq": "i32[{BM},{DP}]", "lse": "fp32[1,{BM}]", "delta": "fp32[1,{BM}]"}


def _kernel(name: str, fn, launches: dict[int, str]) -> Kernel:
    keys, takes = ("BM", "BN", "num_warps", "num_stages", "TMA"), set(fn.arg_names)
    table = {
        sm: [{"TMA": 0} | dict(zip(keys, map(int, row.split()))) for row in rows.split(",")]
        for sm, rows in launches.items()
    }
    D, drop = 128 if "d128" in name else 64, 0.1 if "dropout" in name else 0.0
    shape = {"D": D, "DP": D, "R": 32, "HALF": 16, "DROP": drop}
    shape, used = ({k: d[k] for k in d.keys() & takes} for d in (shape, _DESCRIPTORS))
    masks = ({"DOC": False}, {"DOC": True}) if "DOC" in takes else ({},)
    return Kernel(f"attention_{name}", fn, table, _SIGNATURE, shape, "DOC" in takes, masks, used)


KERNELS = [_kernel(*row) for row in _LAUNCHES]
_BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def _launch(op: str, args: dict) -> None:
    """Run kernel `op` with those of `args`, its arguments by name, that it takes."""
    variant = f"_d{max(64, args['DP'])}" + "_dropout" * (args["DROP"] > 0)
    kernel = _BY_NAME[f"attention_{op}" + variant * (op in ("fwd", "bwd"))]
    values = args | config(kernel, args["qkv_ptr"])
    values["TMA"] = values["TMA"] and args["D"] == args["DP"]
    if args["qkv_ptr"].is_cuda and args["qkv_ptr"].dtype is torch.float32:
        values |= {"BM": 32, "BN": 32, "TMA": 0}  # twice the bytes, and no tensor cores to feed
    for name, template in kernel.descriptors.items() if values["TMA"] else ():
        x, block = values[name], template[template.index("[") :].format(**values)
        values[name] = TensorDescriptor(x, list(x.shape), list(x.stride()), json.loads(block))
    rows, block = args["TP" if op == "delta" else "T"], values["BN" if op == "bwd" else "BM"]
    grid, names = (triton.cdiv(rows, block), args["H"], args["B"]), kernel.fn.arg_names
    with torch.cuda.device_of(args["qkv_ptr"]):
        kernel.fn[grid](**{n: values.get(n) for n in (*names, "num_warps", "num_stages")})


def _arguments(qkv, n_head, rope, drop, seed, doc_start) -> dict:
    """What forward and backward pass alike, by the kernels' names."""
    (B, T, C3), (cos, sin) = qkv.shape, rope or (None, None)
    D, half = C3 // (3 * n_head), 0 if rope is None else cos.shape[1]
    args = {"D": D, "DP": triton.next_power_of_2(D), "R": 2 * half, "DROP": drop, "B": B, "T": T}
    args |= {"H": n_head, "TP": triton.cdiv(T, PAD) * PAD, "HALF": triton.next_power_of_2(half)}
    args |= {"qkv_ptr": qkv, "stride_qkv": qkv.stride(1), "cos_ptr": cos, "sin_ptr": sin}
    args |= {"scale": D**-0.5, "scale_log2e": D**-0.5 / math.log(2), "seed_ptr": seed}
    return args | {"doc_ptr": doc_start, "DOC": doc_start is not None}


def attention_fwd(
    qkv, n_head, rope=None, dropout_p=0.0, seed=None, doc_start=None, out=None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`attention` without autograd or checks: (out, lse, peak), the latter two for `attention_bwd`.

    For a block that owns its buffers: out may be columns of a wider one. seed is a tensor.
    """
    args = _arguments(qkv, n_head, rope, dropout_p, seed, doc_start)
    B, T, C3 = qkv.shape
    out = qkv.new_empty(B, T, C3 // 3) if out is None else out
    lse = qkv.new_empty(B * n_head, args["TP"], dtype=torch.float32)  # log-sum-exp in base 2
    peak = qkv.new_zeros(B * n_head, 2, dtype=torch.float32)  # largest |k_d| and |v| of a head
    args |= {"out_ptr": out, "stride_out": out.stride(1), "lse_ptr": lse, "peak_ptr": peak}
    if rope is not None:
        _launch("rotate_k", args)
    _launch("fwd", args | {"kv": qkv})
    return out, lse, peak


def attention_bwd(
    dout, qkv, out, lse, peak, n_head,
    rope=None, dropout_p=0.0, seed=None, doc_start=None, dqkv=None
) -> Tensor:  # fmt: skip
    """dqkv [B, T, 3C]; dout, out and dqkv may be columns of wider buffers, qkv is still rotated."""
    args = _arguments(qkv, n_head, rope, dropout_p, seed, doc_start)
    dqkv = qkv.new_empty(qkv.shape) if dqkv is None else dqkv
    dq = qkv.new_zeros(lse.numel(), args["DP"], dtype=torch.int32)
    delta, steps = torch.empty_like(lse), torch.empty_like(lse)
    args |= {"lse_ptr": lse, "delta_ptr": delta, "steps_ptr": steps, "peak_ptr": peak, "dq_ptr": dq}
    for name, x in ("out", out), ("dout", dout), ("dqkv", dqkv):
        args |= {f"{name}_ptr": x, f"stride_{name}": x.stride(1)}
    if doc_start is not None:  # for each key, the first query of a later document
        later = torch.searchsorted(doc_start, doc_start, right=True, out_int32=True)
        args["doc_end_ptr"] = later
    _launch("delta", args)
    _launch("bwd", args | {"q": qkv, "dout": dout, "lse": lse, "delta": delta, "dq": dq})
    _launch("dq", args)
    return dqkv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, *args):
        out, lse, peak = attention_fwd(qkv, *args)
        if args[1] is not None:  # rope: who saved qkv before it was rotated hears of it in backward
            torch.autograd.graph.increment_version(qkv)
        ctx.save_for_backward(qkv, out, lse, peak)
        ctx.args = args
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        dout = dout if _is_rows(dout) else dout.contiguous()
        return attention_bwd(dout, *ctx.saved_tensors, *ctx.args), *(None,) * len(ctx.args)


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels can run there; on a CPU only in its interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not isinstance(_fwd_kernel, triton.JITFunction)


def _is_rows(x: Tensor) -> bool:
    """x [B, T, N]: rows of unit stride, evenly spaced, 16 bytes aligned, as the kernels read."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    aligned = x.stride(1) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return x.stride(2) == 1 and x.stride(1) >= x.shape[2] and even and aligned


def _check(ok: bool, name: str, got, want) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, want {want}")


def _check_tensor(name: str, x: Tensor, shape: tuple, dtype: torch.dtype, qkv: Tensor) -> None:
    got = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
    _check(got == f"{dtype} {shape} on {qkv.device}", name, got, f"{dtype} {shape} on {qkv.device}")
    _check(x.is_contiguous(), name, f"strides {x.stride()}", "contiguous")


def attention(
    qkv: Tensor, n_head: int, rope: tuple[Tensor, Tensor] | None = None, *, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, doc_start: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Causal attention [B, T, C] of qkv [B, T, 3C], whose q and k are ROTATED IN PLACE.

    rope: cos and sin [T or more, R/2] fp32, of `model.rope_tables`, R <= D; None does not rotate.
    dropout_p: share of p to drop, to 16 bits; seed, an int or int64 [1], decides which.
    doc_start: int32 [B, T], the first key that each query sees, as above.
    Raises ValueError, before any launch, if an argument does not fit.
    """
    shape = tuple(qkv.shape) if isinstance(qkv, Tensor) else type(qkv).__name__
    _check(len(shape) == 3 and 0 not in shape, "qkv", shape, "[B, T, 3C], none of them 0")
    _check(runs_on(qkv.device), "qkv", f"device {qkv.device}", WANTED_DEVICE)
    _check(qkv.dtype in DTYPES, "qkv", qkv.dtype, f"one of {DTYPES}")
    B, T, D = *shape[:2], shape[2] / 3 / n_head
    _check(D in HEAD_DIMS, "n_head", f"{n_head}, a head dim of {D:g}", f"one of {HEAD_DIMS}")
    _check(_is_rows(qkv), "qkv", f"strides {qkv.stride()}", "even rows, 16 bytes aligned")
    _check(rope is None or len(rope) == 2, "rope", type(rope).__name__, "(cos, sin)")
    for x in rope or ():
        R = 2 * rope[0].shape[-1]
        _check_tensor("rope", x, (max(T, len(x)), R // 2), torch.float32, qkv)
        _check(2 <= R <= D, "rope", f"{R} rotary dims", f"2 to {D:g}")
    _check(0 <= dropout_p < 1, "dropout_p", dropout_p, "0 <= p < 1")
    if doc_start is not None:
        _check_tensor("doc_start", doc_start, (B, T), torch.int32, qkv)
    if dropout_p > 0:
        seed = torch.randint(2**62, (1,), device=qkv.device) if seed is None else seed
        seed = torch.full((1,), seed, device=qkv.device) if isinstance(seed, int) else seed
        _check_tensor("seed", seed, (1,), torch.int64, qkv)
    return _Attention.apply(qkv, n_head, rope, dropout_p, seed, doc_start)


def attention_reference(qkv: Tensor, n_head: int, rope=None, doc_start=None, keep=None) -> Tensor:
    """In plain torch, in qkv's dtype, float64 too; dropout scales p by keep [B, H, T, T]."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if rope is not None:
        cos, sin = (x[:T].to(qkv.dtype) for x in rope)
        parts = (x.tensor_split([cos.shape[1], 2 * cos.shape[1]], -1) for x in (q, k))
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin, c], -1) for a, b, c in parts)
    t = torch.arange(T, device=qkv.device)
    seen = t[:, None] >= t  # [T, T], queries down
    if doc_start is not None:
        seen = seen & (t >= doc_start[:, None, :, None])  # [B, 1, T, T]
    p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    return ((p if keep is None else p * keep) @ v).transpose(1, 2).reshape(B, T, C3 // 3)
