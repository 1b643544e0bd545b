"""Attention: three-way numerics, dropout, document mask, buffers, bitwise repeat."""

import pytest
import torch
from three_way import DEVICE, DTYPES, rand, three_way

import kernels.attention as module
from bench.cases import attend
from kernels.attention import attention_bwd, attention_fwd, attention_reference
from kernels.launch import TUNING, capability
from model import rope_tables

INTERPRETED = DEVICE == "cpu"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks inside Triton's interpreter")


def strided(qkv):
    """Return a differentiable copy with strided rows: attention rotates q and k in place."""
    wide = qkv.new_zeros(*qkv.shape[:2], qkv.shape[2] + 64)
    wide[..., : qkv.shape[2]] = qkv
    return wide[..., : qkv.shape[2]]


def ours(n_head, rope, **options):
    return lambda qkv: attend(strided(qkv), n_head, rope, **options)


def reference(n_head, rope, **options):
    return lambda qkv: attention_reference(qkv.contiguous(), n_head, rope, **options)


def table(T, R):
    return tuple(t.to(DEVICE) for t in rope_tables(T + 3, R)) if R else None


def documents(B, T, start_frac=0.1):  # doc_start [B, T] int32, random lengths
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < start_frac
    starts[:, 0] = True
    return torch.where(starts, torch.arange(T), 0).cummax(1).values.int().to(DEVICE)


def tiles(monkeypatch, fwd: tuple, bwd: tuple, tma: bool = False):
    """Set the (queries, keys) tiles: small ones give a short sequence many tiles."""
    sm = f"sm_{capability(torch.empty(0, device=DEVICE))}"
    for name in TUNING[sm]:
        for op, (BM, BN) in (("fwd", fwd), ("bwd", bwd)):
            if name.startswith(f"attention_{op}"):
                cfg = {"BM": BM, "BN": BN, "TMA": int(tma), "num_warps": 4, "num_stages": 2}
                monkeypatch.setitem(TUNING[sm], name, [cfg])


# T near multiples of the tile sizes; R = 0, part of D (not only powers of 2), all of D
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "H", "D", "R"),
    [(1, 1, 1, 32, 32), (2, 17, 2, 64, 32), (1, 63, 1, 80, 32), (2, 65, 1, 96, 96),
     (1, 127, 1, 128, 64), (1, 200, 1, 64, 20), (1, 129, 1, 32, 0)],
)  # fmt: skip
def test_output_and_gradients(B, T, H, D, R, dtype):
    args = [rand(B, T, 3 * H * D, dtype=dtype, seed=T)], [rand(B, T, H * D, dtype=dtype, seed=1)]
    three_way(ours(H, table(T, R)), reference(H, table(T, R)), *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fwd", "bwd"), [((32, 32), (16, 32)), ((16, 64), (32, 32)), ((64, 32), (16, 64))]
)
def test_many_tiles_and_documents(fwd, bwd, dtype, monkeypatch):
    """Sharp softmax (scores up to 30): the running maximum changes from tile to tile."""
    tiles(monkeypatch, fwd, bwd)
    B, T, H, D = 2, 100, 1, 32
    qkv = rand(B, T, 3 * H * D, dtype=dtype, seed=3, scale=2.5)
    upstream = [rand(B, T, H * D, dtype=dtype, seed=4, scale=3, shift=1)]
    three_way(ours(H, table(T, 16)), reference(H, table(T, 16)), [qkv], upstream)
    docs = {"doc_start": documents(B, T)}
    docs["doc_start"][1] = (torch.arange(T) - 20).clamp(min=0)  # a sliding window
    three_way(ours(H, table(T, 16), **docs), reference(H, table(T, 16), **docs), [qkv], upstream)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN
def test_blocks_of_other_documents_are_skipped(monkeypatch):
    """Poison keys before a document and queries after it with NaN: neither is read."""
    tiles(monkeypatch, (16, 16), (16, 16))
    T, D = 96, 32
    doc_start = (torch.arange(T) // 32 * 32).int()[None].to(DEVICE)
    qkv, dout = rand(1, T, 3 * D), rand(1, T, D, seed=1).contiguous()
    good, lse, peak = attention_fwd(strided(qkv), 1, doc_start=doc_start)
    for name, rows in ("key", slice(0, 32)), ("query", slice(64, 96)):
        x = strided(qkv)
        x[:, rows] = torch.nan
        out, lse, _ = attention_fwd(x, 1, doc_start=doc_start)
        assert torch.equal(out[:, 32:64], good[:, 32:64]), name
        dqkv = attention_bwd(dout, x, good, lse, peak, 1, doc_start=doc_start)
        assert dqkv[:, 32:64].isfinite().all(), name
        assert not dqkv[:, rows, D:].isfinite().any(), name


def test_buffers_wider_than_their_tensors():
    """out and dqkv write only their own columns; dout may be strided."""
    B, T, H, D = 2, 70, 2, 32
    C, rope = H * D, table(T, 32)
    qkv, dout = rand(B, T, 3 * C), rand(B, T, C, seed=1)
    x = strided(qkv)
    out, lse, peak = attention_fwd(x, H, rope)
    dqkv = attention_bwd(dout.contiguous(), x, out, lse, peak, H, rope)
    wide_out = torch.full((B, T, C + 32), torch.nan, device=DEVICE)
    wide_dqkv = torch.full((B, T, 3 * C + 32), torch.nan, device=DEVICE)
    x = strided(qkv)
    result = attention_fwd(x, H, rope, out=wide_out[..., :C])
    attention_bwd(dout, x, *result, H, rope, dqkv=wide_dqkv[..., : 3 * C])
    assert torch.equal(wide_out[..., :C], out)
    assert torch.equal(wide_dqkv[..., : 3 * C], dqkv)
    assert wide_out[..., C:].isnan().all()
    assert wide_dqkv[..., 3 * C :].isnan().all()


def dropout_mask(B, T, H, D, p, seed, **options):
    """Return the forward kernel's keep [B, H, T, T]: q = k = 0 and v one-hot, one dim per key."""
    qkv = torch.zeros(B, T, 3, H, D, device=DEVICE)
    qkv[:, torch.arange(T), 2, :, torch.arange(T) % D] = 1.0
    outs = []
    for first in range(0, T, D):
        x = qkv.clone()
        x[:, :first, 2], x[:, first + D :, 2] = 0.0, 0.0
        y = attend(x.view(B, T, -1), H, p=p, seed=seed, **options)
        outs.append(y.view(B, T, H, D).transpose(1, 2) > 0)
    return torch.cat(outs, -1)[..., :T]


def test_dropout_statistics():
    B, T, H, D, p = 2, 150, 2, 128, 0.3
    seen = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril().expand(B, H, T, T)
    keep = dropout_mask(B, T, H, D, p, 11)
    assert not keep[~seen].any()
    n = seen.sum().item()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(keep[seen].float().mean().item() - (1 - p)) < 4 * sigma
    # only chance agreement: heads, sequences, seeds, neighbours, one Philox call (8, 16, 24 apart)
    chance, both = p * p + (1 - p) ** 2, seen[0, 0].sum().item()
    pairs = [(keep[0, 0], keep[0, 1]), (keep[0, 0], keep[1, 0])]
    pairs += [(keep[0, 0], dropout_mask(B, T, H, D, p, 12)[0, 0])]
    for a, b in pairs:
        assert abs((a == b)[seen[0, 0]].float().mean().item() - chance) < 5 / both**0.5
    for i, j in (0, 1), (1, 0), (1, 1), (0, 8), (8, 0), (8, 8), (0, 16), (0, 24):
        a, b = keep[0, 0, i:, j:], keep[0, 0, : T - i, : T - j]
        both = seen[0, 0, i:, j:] & seen[0, 0, : T - i, : T - j]
        assert abs((a == b)[both].float().mean().item() - chance) < 5 / both.sum().item() ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_gradients_and_replay(dtype, monkeypatch):
    """The mask is independent of tiling, and backward redraws forward's."""
    B, T, H, D, p = 1, 70, 1, 32, 0.2
    keep = dropout_mask(B, T, H, D, p, 5)
    tiles(monkeypatch, (32, 32), (16, 32))
    assert torch.equal(keep, dropout_mask(B, T, H, D, p, 5))
    docs, rope = {"doc_start": documents(B, T)}, table(T, 32)
    args = [rand(B, T, 3 * H * D, dtype=dtype)], [rand(B, T, H * D, dtype=dtype, seed=1)]
    scale = {"keep": keep.to(dtype) / (1 - p)}
    three_way(ours(H, rope, p=p, seed=5), reference(H, rope, **scale), *args)
    both = reference(H, rope, **scale, **docs)
    three_way(ours(H, rope, p=p, seed=5, **docs), both, *args)


def run_twice(qkv, dout, H, rope, change):
    results = []
    for step in range(2):
        if step:
            change()
        x = strided(qkv).detach().requires_grad_()
        out = attend(x, H, rope)
        results.append((out, *torch.autograd.grad(out, x, dout)))
    return results


@interpreted
def test_any_order_of_programs_gives_the_same_bits(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    tiles(monkeypatch, (16, 16), (16, 16))
    forward = builder.set_grid_idx

    def reverse():
        last_first = lambda x, y, z: forward(builder.grid_dim[0] - 1 - x, y, z)  # noqa: E731
        monkeypatch.setattr(builder, "set_grid_idx", last_first)

    T, D = 70, 32
    first, second = run_twice(rand(1, T, 3 * D), rand(1, T, D, seed=1), 1, table(T, 32), reverse)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@interpreted
def test_descriptors_give_the_same(monkeypatch):
    """Compare TMA and pointer paths, with descriptor atomics added to the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _ir

    def create_descriptor_reduce(self, kind, desc, value, indices):
        ptrs, mask = desc.materialize_pointers(indices)
        mask = TensorHandle(mask, module.tl.int1)
        self.create_atomic_rmw(_ir.ATOMIC_OP.ADD, ptrs, value, mask, _ir.MEM_SEMANTIC.RELAXED, None)

    name = "create_descriptor_reduce"
    monkeypatch.setattr(InterpreterBuilder, name, create_descriptor_reduce, raising=False)
    for B, T, H, D in (1, 75, 2, 32), (1, 40, 1, 80):  # D = 80 is padded: no TMA
        tiles(monkeypatch, (32, 16), (16, 32))
        first, second = run_twice(
            *(rand(B, T, 3 * H * D), rand(B, T, H * D, seed=1), H, table(T, 32)),
            lambda: tiles(monkeypatch, (32, 16), (16, 32), tma=True),
        )
        (out, grad), (out2, grad2) = first, second
        assert torch.equal(out, out2)
        assert torch.equal(grad[..., H * D :], grad2[..., H * D :])
        # the pointer path adds column pairs: a carry between them is one fixed-point step
        torch.testing.assert_close(grad, grad2, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fwd", "bwd", "starts"),
    [((16, 32), (16, 16), [0]), ((16, 32), (64, 64), [0, 40, 95]),
     ((128, 64), (16, 32), [0, 30, 64, 100]), ((32, 32), (32, 64), [0, 33, 64])],
)  # fmt: skip
def test_fixed_point_reaches_its_bound_and_no_further(fwd, bwd, starts, monkeypatch):
    """Drive dq to its bound: two opposite keys and values at each document's start, scaled per
    document, get half of every query's attention each, aligned with dout."""
    tiles(monkeypatch, fwd, bwd)
    T, D = 140, 32
    x = torch.zeros(1, T, 3, D)
    x[:, :, 0, 0], x[:, :, 1, 0] = 7.0, -7.0  # other keys get almost no attention
    doc_start, size = torch.zeros(1, T, dtype=torch.int32), [1.0, 0.1, 10.0, 3.0]
    for start, scale in zip(starts, size):
        doc_start[:, start:] = start
        for t, sign in (start, scale), (start + 1, -scale):
            x[0, t, 1, 0], x[0, t, 1, 1:], x[0, t, 2] = 7.0, 3 * sign, 5 * sign
    qkv, doc_start = x.view(1, T, -1).to(DEVICE), doc_start.to(DEVICE)
    dout = torch.full((1, T, D), 7.0, device=DEVICE)
    options = {"doc_start": doc_start}
    _, grad = three_way(ours(1, None, **options), reference(1, None, **options), [qkv], [dout])
    for start, scale in zip([s - 1 for s in starts[1:]] + [T - 1], size):
        bound = 7 * 5 * scale * D * 3 * scale * D**-0.5
        assert grad[0, start, 1:D].abs().max() > 0.99 * bound


def outlier_dim(qkv):
    qkv[:, :, 1, :, 5] *= 50


def outlier_token(qkv):
    qkv[:, 20, 1:] *= 1000


def sink_key(qkv):
    """Attention sink: all queries attend to the first key, large in one dim, value near zero."""
    qkv[:, 0, 1], qkv[:, 0, 1, :, 7] = 0.0, 50.0
    qkv[:, :, 0, :, 7] = qkv[:, :, 0, :, 7].abs() + 0.5
    qkv[:, 0, 2] *= 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outlier", "first", "document"),
    [(outlier_dim, 0, 0), (sink_key, 0, 0), (outlier_token, 64, 64), (outlier_token, 70, 70),
     (outlier_token, 32, 0)],
)  # fmt: skip
def test_fixed_point_is_as_good_as_fp32_adds(outlier, first, document, dtype, monkeypatch):
    """Compare dq from row `first` on; a second document begins at row `document`, if not 0."""
    tiles(monkeypatch, (32, 32), (32, 32))
    T, D, grads = 128, 32, {}
    qkv = rand(1, T, 3 * D, seed=2).contiguous()
    outlier(qkv.view(1, T, 3, 1, D))
    qkv, dout = qkv.to(dtype), rand(1, T, D, dtype=dtype, seed=1).contiguous()
    doc_start = torch.where(torch.arange(T) < document, 0, document).int()[None].to(DEVICE)
    exact = qkv.double().requires_grad_()
    out = attention_reference(exact, 1, None, doc_start)
    (exact,) = torch.autograd.grad(out, exact, dout.double())
    exact = exact[:, first:, :D]
    for fixed in True, False:
        x = qkv.clone().requires_grad_()
        out = attend(x, 1, doc_start=doc_start, fixed_point=fixed)
        (grad,) = torch.autograd.grad(out, x, dout)
        grads[fixed] = grad[:, first:, :D].double()
    ours_err, adds_err = ((grads[fixed] - exact).norm() for fixed in (True, False))
    # fp32 (interpreter only): 30 fixed-point bits cover less than a float's range
    floor = 16 * torch.finfo(dtype).eps * exact.norm() if dtype is torch.float32 else 0
    assert ours_err <= 2 * adds_err + floor
    slopes = [(g * exact).sum() / exact.square().sum() for g in grads.values()]
    assert abs(slopes[0] - slopes[1]) < 1e-3


@pytest.mark.parametrize("scale", [1e-25, 1e-15])
def test_small_gradients(scale):
    qkv, dout = rand(1, 40, 192).contiguous().requires_grad_(), rand(1, 40, 64, seed=1) * scale
    (want,) = torch.autograd.grad(attention_reference(qkv.double(), 2), qkv, dout.double())
    (grad,) = torch.autograd.grad(attend(qkv, 2), qkv, dout)
    torch.testing.assert_close(grad / scale, want / scale, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on casting NaN
@pytest.mark.parametrize(
    ("place", "bad"),
    [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf),
     ("dout", torch.nan), ("dout", torch.inf)],
)  # fmt: skip
def test_nan_and_inf_show_in_every_gradient(place, bad, monkeypatch):
    """Every gradient they reach is non-finite; dq of earlier tiles stays finite."""
    tiles(monkeypatch, (32, 32), (32, 32))
    T, D, at = 96, 32, 40
    qkv = rand(1, T, 3 * D, dtype=torch.float16).contiguous()
    dout = rand(1, T, D, dtype=torch.float16, seed=1).contiguous()
    if place == "dout":
        dout[:, at, 5] = bad
    else:
        qkv[:, at, "qkv".index(place) * D + 5] = bad
    (grad,) = torch.autograd.grad(attend(qkv.requires_grad_(), 1), qkv, dout)
    dq, dk, dv = grad.view(T, 3, D).isfinite().unbind(1)
    reached = slice(at, at + 1) if place in ("q", "dout") else slice(at, T)
    assert not dq[reached].any()
    assert dq[:32].all()
    assert not (dk[0].any() and dv[0].any())  # the first key: all queries see it


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "T", "H", "D", "R"),
    [(2, 2048, 4, 64, 32), (1, 1000, 2, 64, 64), (3, 333, 2, 32, 0), (1, 777, 2, 80, 32),
     (1, 515, 2, 96, 48), (2, 1024, 2, 128, 128)],
)  # fmt: skip
def test_on_gpu(B, T, H, D, R, dtype):
    rope, docs = table(T, R), {"doc_start": documents(B, T, 0.01)}
    qkv, dout = rand(B, T, 3 * H * D, dtype=dtype), rand(B, T, H * D, dtype=dtype, seed=1)
    for options in {}, docs:
        want = reference(H, rope, **options)
        first = three_way(ours(H, rope, **options), want, [qkv], [dout])
        again = three_way(ours(H, rope, **options), want, [qkv], [dout])
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_every_configuration_on_gpu(D, monkeypatch):
    T, H = 1024, 2
    rope = table(T, 32)
    qkv = rand(1, T, 3 * H * D, dtype=torch.bfloat16)
    dout = rand(1, T, H * D, dtype=torch.bfloat16, seed=1)
    tables = TUNING[f"sm_{capability(qkv)}"]
    for name in (f"attention_fwd_d{D}", f"attention_bwd_d{D}"):
        for cfg in tables[name]:
            with monkeypatch.context() as m:
                m.setitem(tables, name, [cfg])
                three_way(ours(H, rope), reference(H, rope), [qkv], [dout])


@pytest.mark.gpu
def test_dropout_on_gpu():
    B, T, H, D, p = 2, 300, 2, 64, 0.1
    keep, rope = dropout_mask(B, T, H, D, p, 7), table(T, 32)
    seen = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril().expand(B, H, T, T)
    assert abs(keep[seen].float().mean().item() - (1 - p)) < 5e-3
    qkv = rand(B, T, 3 * H * D, dtype=torch.bfloat16)
    dout = rand(B, T, H * D, dtype=torch.bfloat16, seed=1)
    scale = {"keep": keep.to(torch.bfloat16) / (1 - p)}
    three_way(ours(H, rope, p=p, seed=7), reference(H, rope, **scale), [qkv], [dout])
