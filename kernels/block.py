"""Parallel block x + drop(attention(ln(x))) + drop(mlp(ln(x))) as one autograd node.

Memory: the node saves 9 C elements a token, where op-by-op autograd saves each op's own inputs:
    x  C        qkv  3C, rotated        u  M = 4C        y  C, attention output
plus bytes a token: 8 of LayerNorm statistics, 4 H of lse, C / 16 of peaks (x 2 with doc_start).
Backward recomputes h = ln(x) in LayerNorm's backward and a = gelu(u) in GELU's.

Layout: qkv and u are columns of one buffer [N, 3C + M], and so are their gradients: in_proj's
backward is one GEMM for dh and one for dw.

Dtypes: activations and their gradients are bf16, fp16 or fp32. Weights may be fp32 for any x: they
are cast once per call, and their gradients stay fp32. If fp32 w_in or w_out already has a gradient,
dw is added to it in place and autograd gets None: accumulate with `backward`, not
`torch.autograd.grad`.
"""

import torch
from torch import Tensor

from kernels import fp8, mlp
from kernels.attention import (
    DTYPES,
    HEAD_DIMS,
    WANTED_DEVICE,
    attention_bwd,
    attention_fwd,
    runs_on,
)
from kernels.gemm import accumulate_
from kernels.launch import check
from kernels.layernorm import MAX_WIDTH, layernorm_bwd, layernorm_fwd
from kernels.pointwise import column_sum

EPS = 1e-5  # LayerNorm
PARAMETERS = ("ln_w", "ln_b", "w_in", "b_in", "w_out", "b_attn", "b_mlp")


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, ln_w, ln_b, w_in, b_in, w_out, b_attn, b_mlp, n_head, rope, p, seeds, doc, in_fp8
    ):
        (B, T, C), dtype = x.shape, x.dtype
        rows = x.view(B * T, C)
        w_in_, b_in_, w_out_, b_attn_, b_mlp_ = (
            w.to(dtype) for w in (w_in, b_in, w_out, b_attn, b_mlp)
        )
        seed = None if p == 0 else torch.full((1,), seeds[0], device=x.device)
        h, mean, rstd = layernorm_fwd(rows, ln_w, ln_b, EPS)
        qkvu, a = mlp.in_proj_fwd(h, w_in_, b_in_, in_fp8)
        qkv = qkvu.view(B, T, -1)[..., : 3 * C]
        y, lse, peak = attention_fwd(qkv, n_head, rope, p, seed, doc)
        biases = b_attn_, b_mlp_
        out = mlp.out_proj_fwd(y.view(-1, C), a, w_out_, *biases, rows, p, seeds[1], in_fp8)
        ctx.save_for_backward(
            *(x, mean, rstd, qkvu, y, lse, peak, seed, doc),
            *(ln_w, ln_b, w_in, w_in_, w_out, w_out_),
        )
        ctx.options, ctx.rope, ctx.in_fp8 = (n_head, p, seeds[1]), rope, in_fp8
        ctx.dtypes = [w.dtype for w in (ln_w, ln_b, w_in, b_in, w_out, b_attn, b_mlp)]
        return out  # [B T, C]: `block` reshapes it outside, where autograd records the view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, mean, rstd, qkvu, y, lse, peak, seed, doc, ln_w, ln_b, *weights = ctx.saved_tensors
        (w_in, w_in_, w_out, w_out_), (n_head, p, residual_seed) = weights, ctx.options
        (B, T, C), need = x.shape, ctx.needs_input_grad
        rows, dout = x.view(B * T, C), dout.contiguous()
        dqkvu = torch.empty_like(qkvu)
        qkv, dqkv = (t.view(B, T, -1)[..., : 3 * C] for t in (qkvu, dqkvu))
        into_in, dw_in = _gradient(w_in, need[3])
        into_out, dw_out = _gradient(w_out, need[5])

        dy, db_attn, db_mlp, db_up = mlp.out_proj_bwd(
            dout, y.view(-1, C), qkvu[:, 3 * C :], w_out_, dqkvu[:, 3 * C :], *into_out,
            p=p, seed=residual_seed, in_fp8=ctx.in_fp8,
        )  # fmt: skip
        dy = dy.view(B, T, C)
        attention_bwd(dy, qkv, y, lse, peak, n_head, ctx.rope, p, seed, doc, dqkv)
        db_in = torch.cat([column_sum(dqkvu[:, : 3 * C]), db_up])
        if ctx.in_fp8:
            dqkvu = fp8.quantise(dqkvu, fp8.E5M2, columns=True)
            dh = fp8.grad_x(dqkvu, w_in_, x.dtype)
        else:
            dh = dqkvu @ w_in_
        dx, dln_w, dln_b, h = layernorm_bwd(dh, rows, ln_w, mean, rstd, dout, bias=ln_b)
        if need[3]:
            add_product_ = fp8.accumulate_ if ctx.in_fp8 else accumulate_
            add_product_(into_in[0], dqkvu, h, into_in[1])
        gradients = dln_w, dln_b, dw_in, db_in, dw_out, db_attn, db_mlp
        cast = (
            g.to(dtype) if n and g is not None else None
            for g, n, dtype in zip(gradients, need[1:], ctx.dtypes)
        )
        return dx.view(B, T, C), *cast, *(None,) * 6


def _gradient(w: Tensor, needed: bool) -> tuple[tuple, Tensor | None]:
    """Return ((fp32 dw buffer, beta), the gradient that backward returns for w)."""
    if not needed:
        return (None, 0.0), None
    if w.is_leaf and w.grad is not None and w.grad.dtype == torch.float32:
        return (w.grad, 1.0), None
    dw = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    return (dw, 0.0), dw


def unsupported(width: int, n_head: int, mlp_width: int, rotary_dim: int) -> str:
    """Return why the kernels reject a block of this shape, or "" if they accept it."""
    if width // n_head not in HEAD_DIMS:
        return f"head dim {width // n_head} (width / n_head) is not one of {HEAD_DIMS}"
    if width > MAX_WIDTH:
        return f"width {width} is above {MAX_WIDTH}"
    if width % 8 or mlp_width % 8:
        return f"width {width} and mlp_width {mlp_width} must both be multiples of 8"
    if rotary_dim % 2:
        return f"rotary_dim {rotary_dim} is odd, want an even number"
    return ""


def block(
    x: Tensor,
    ln_w: Tensor, ln_b: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_attn: Tensor,
    b_mlp: Tensor,
    n_head: int,
    rope: tuple[Tensor, Tensor] | None,
    dropout_p: float = 0.0,
    seeds: tuple[int, int] = (0, 0),
    doc_start: Tensor | None = None,
    in_fp8: bool = False,
) -> Tensor:  # fmt: skip
    """Return the block's output [B, T, C] for x [B, T, C]; differentiable in x and parameters.

    ln_w, ln_b, b_attn, b_mlp [C]; w_in [3C + M, C], b_in [3C + M]; w_out [C, C + M]
    rope        (cos, sin), each fp32 [T or more, R/2], contiguous; None: no rotation
    dropout_p   drop probability in attention and both branches; `seeds`: (attention's, branches')
    doc_start   int32 [B, T], first visible key per query; None: 0
    in_fp8      run the projections' GEMMs in fp8 (fp8.py)
    Raises ValueError before any launch if the kernels reject an argument.
    """
    if x.dim() != 3 or 0 in x.shape or x.dtype not in DTYPES or not x.is_contiguous():
        got = f"{x.dtype} of shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"x is {got}, want contiguous non-empty [B, T, C], dtype in {DTYPES}")
    if not runs_on(x.device):
        raise ValueError(f"x is on {x.device}, want {WANTED_DEVICE}")
    (B, T, C), hidden = x.shape, w_in.shape[0] - 3 * x.shape[2]
    R = 0 if rope is None else 2 * rope[0].shape[-1]
    if hidden < 1:
        raise ValueError(f"w_in is {tuple(w_in.shape)}, want [3C + M, C] with C = {C}")
    if n_head < 1 or C % n_head:
        raise ValueError(f"n_head is {n_head}, want a divisor of C = {C}")
    if why := unsupported(C, n_head, hidden, R):
        raise ValueError(f"x, n_head, w_in: {why}")
    shapes = (C,), (C,), (3 * C + hidden, C), (3 * C + hidden,), (C, C + hidden), (C,), (C,)
    parameters = ln_w, ln_b, w_in, b_in, w_out, b_attn, b_mlp
    for name, w, shape in zip(PARAMETERS, parameters, shapes):
        check(name, w, x, shape)
    for t in rope or ():
        check("rope", t, x, (max(T, len(t)), R // 2), torch.float32)
    if R > C // n_head:
        raise ValueError(f"rope rotates {R} dims, want at most the head dim {C // n_head}")
    if doc_start is not None:
        check("doc_start", doc_start, x, (B, T), torch.int32)
    if in_fp8 and (why := fp8.unsupported(x.device, rows=B * T, C=C, M=hidden)):
        raise ValueError(f"in_fp8: {why}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, want 0 <= p < 1")
    options = n_head, rope, dropout_p, seeds, doc_start, in_fp8
    return _Block.apply(x, *parameters, *options).view(B, T, C)
