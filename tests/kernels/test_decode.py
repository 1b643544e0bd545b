"""Decode kernels: three-way numerics, and batch invariance bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from three_way import DEVICE, DTYPES, check, rand

import model
from kernels import decode


def linear_reference(x, w, b, norm, act_cols, residual):
    """Return (out, act) in x's dtype."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[1:], *norm)
    y = F.linear(x, w, b)
    if residual is not None:
        return residual + y, None
    out, u = y.split([len(w) - act_cols, act_cols], dim=1)
    return out, F.gelu(u, approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "rows", "K", "cols", "act_cols"),
    [
        ("in", 1, 40, 50, 23),  # gelu starts inside a tile; K % BLOCK_K != 0
        ("in", 18, 144, 64, 32),
        ("out", 3, 300, 21, 0),
        ("out", 17, 64, 48, 0),
        ("head", 5, 72, 70, 0),
    ],
)
def test_linear(kind, rows, K, cols, act_cols, dtype):
    x, w = rand(rows, K, dtype=dtype, shift=0.5), rand(cols, K, dtype=dtype, seed=1).contiguous()
    w *= K**-0.5
    b = rand(cols, dtype=dtype, seed=2)
    residual = rand(rows, cols, dtype=dtype, seed=3) if kind == "out" else None
    norm = None
    if kind != "out":
        norm = (rand(K, dtype=dtype, seed=4, shift=1.0), rand(K, dtype=dtype, seed=5))
    buffer = torch.full((rows, cols + 16), 7.0, device=DEVICE, dtype=dtype)
    out_dtype = torch.float32 if kind == "head" else dtype
    out = torch.full((rows, cols - act_cols + 8), 7.0, device=DEVICE, dtype=out_dtype)
    inner, act = out[:, : cols - act_cols], buffer[:, 8 : 8 + act_cols] if act_cols else None
    if residual is not None:
        inner.copy_(residual)
    decode.linear(x, w, b, inner, norm=norm and (*norm, 1e-5), act=act)

    def reference(to):
        moved = norm and tuple(t.to(to) for t in norm)
        kept = residual if residual is None else residual.to(to)
        return linear_reference(x.to(to), w.to(to), b.to(to), moved, act_cols, kept)

    same, exact = reference(dtype), reference(torch.float64)
    check("out", inner, same[0], exact[0])
    assert (out[:, cols - act_cols :] == 7).all(), "wrote past its columns"
    if act_cols:
        check("act", act, same[1], exact[1])
        assert (buffer[:, :8] == 7).all()
        assert (buffer[:, 8 + act_cols :] == 7).all()


def attention_reference(qkv, cache, position, cos, sin):
    """Attend row by row in qkv's dtype; `cache` already holds the new entries."""
    N, H, D = len(qkv), cache.shape[2], cache.shape[4]
    rows = []
    for n in range(N):
        p = position[n]
        q = model.rotate(qkv[n].view(3, H, 1, D)[:1], cos[p : p + 1], sin[p : p + 1])[0]
        k, v = cache[:, n, :, : p + 1]
        rows.append(F.scaled_dot_product_attention(q, k, v).flatten())
    return torch.stack(rows)


def attention_case(positions, H, D, R, dtype, S=400):
    """Return a launch's inputs and the expected cache afterwards."""
    N = len(positions)
    qkv, cache = rand(N, 3 * H * D, dtype=dtype), rand(2, N, H, S, D, dtype=dtype, seed=1)
    cache = cache.contiguous()
    cos, sin = (t.to(DEVICE) for t in model.rope_tables(S, R))
    position = torch.tensor(positions, device=DEVICE)
    after = cache.clone()
    for n, p in enumerate(positions):
        k, v = qkv[n].view(3, H, 1, D)[1:]
        after[0, n, :, p] = model.rotate(k[None], cos[p : p + 1], sin[p : p + 1])[0, :, 0]
        after[1, n, :, p] = v[:, 0]
    return qkv, cache, position, cos, sin, after


def launch(qkv, cache, position, cos, sin, scratch):
    out = torch.empty(len(qkv), qkv.shape[1] // 3, device=DEVICE, dtype=qkv.dtype)
    decode.attention(qkv, *cache, position, cos, sin, out, *scratch)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("positions", "H", "D", "R"),
    [
        ([0, 5, 127, 128, 399], 2, 32, 16),  # one to four pieces
        ([300, 1], 1, 80, 32),  # padded head dim
        ([7], 1, 16, 0),
    ],
)
def test_attention(positions, H, D, R, dtype):
    *case, after = attention_case(positions, H, D, R, dtype)
    qkv, cache, position, cos, sin = case
    scratch = decode.scratch(len(qkv), H, cache.shape[3], D, DEVICE)
    ours = launch(*case, scratch)
    assert not scratch[1].any(), "counters must return to zero"
    exact = attention_reference(*(t.double() if t.is_floating_point() else t for t in (
        qkv, after, position, cos, sin)))  # fmt: skip
    check("out", ours, attention_reference(qkv, after, position, cos, sin), exact)
    check("cache", cache, after, after.double())
    assert torch.equal(launch(*case, scratch), ours), "a second launch must match"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_each_other(dtype, monkeypatch):
    """Each row alone equals that row in a batch, bit for bit. The interpreter's dot is BLAS, which
    sums by row position; `in_order` replaces it."""

    def in_order(a, b, dtype):
        return (a[:, :, None] * b.astype(dtype)).sum(1)

    if DEVICE == "cpu":
        monkeypatch.setattr("triton.runtime.interpreter.np.matmul", in_order)
    x, b = rand(20, 48, dtype=dtype), rand(33, dtype=dtype)
    w = rand(33, 48, dtype=dtype).contiguous()
    norm = (rand(48, dtype=dtype, seed=4), rand(48, dtype=dtype, seed=5), 1e-5)
    whole, alone = (torch.empty(n, 33, device=DEVICE, dtype=dtype) for n in (20, 1))
    decode.linear(x, w, b, whole, norm=norm)
    for row in (0, 15, 19):
        decode.linear(x[row : row + 1], w, b, alone, norm=norm)
        assert torch.equal(alone[0], whole[row])
    *case, _ = attention_case([130, 3, 250], 2, 16, 8, dtype, S=256)
    qkv, cache, position, cos, sin = case
    whole = launch(*case, decode.scratch(3, 2, 256, 16, DEVICE))
    for row in range(3):
        part = (qkv[row : row + 1], cache[:, row : row + 1], position[row : row + 1], cos, sin)
        assert torch.equal(launch(*part, decode.scratch(1, 2, 256, 16, DEVICE))[0], whole[row])
