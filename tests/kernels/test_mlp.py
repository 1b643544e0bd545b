"""Projections of the block: three-way numerics of every choice, dropout, bias sums."""

import math

import pytest
import torch
from three_way import DEVICE, DTYPES, gradients, rand, three_way

from bench.cases import Op
from kernels import gemm, mlp, pointwise
from kernels.launch import TUNING
from kernels.mlp import projections_reference

CHOICES = ["triton", "triton tma", "cublas"]


def project(x, h, y, w_in, b_in, w_out, b_attn, b_mlp, p=0.0, seed=0) -> tuple:
    """Call mlp.py as the block does; return differentiable (qkv, out)."""

    def run(x, h, y, w_in, b_in, w_out, b_attn, b_mlp):
        qkvu, a = mlp.in_proj_fwd(h, w_in, b_in)
        out = mlp.out_proj_fwd(y, a, w_out, b_attn, b_mlp, x, p, seed)
        split = 3 * h.shape[1]

        def backward(dqkv, dout):
            dqkvu = torch.empty_like(qkvu)
            dw_in, dw_out = (torch.empty(w.shape, device=w.device) for w in (w_in, w_out))
            dqkvu[:, :split] = dqkv
            dy, db_attn, db_mlp, db_up = mlp.out_proj_bwd(
                dout.contiguous(), y, qkvu[:, split:], w_out, dqkvu[:, split:], dw_out, 0.0, p, seed
            )
            db_in = torch.cat([pointwise.column_sum(dqkvu[:, :split]), db_up])
            gemm.accumulate_(dw_in, dqkvu, h, 0.0)
            grads = dout, dqkvu @ w_in, dy, dw_in, db_in, dw_out, db_attn, db_mlp
            return tuple(g.to(h.dtype) for g in grads)

        return (qkvu[:, :split].clone(), out), backward

    return Op.apply(run, x, h, y, w_in, b_in, w_out, b_attn, b_mlp)


@pytest.fixture
def choose(monkeypatch):
    """Return choose(choice): use `choice` for every op, with small tiles and few programs."""

    def use(choice: str) -> None:
        ops = dict.fromkeys(mlp.GEMM[80], choice[:6])
        monkeypatch.setattr(mlp, "GEMM", {80: ops, 90: ops})
        tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "TMA": "tma" in choice}
        few = {"BLOCK_M": 16, "BLOCK_N": 64, "PROGRAMS": 2, "STAGES": 2, "num_warps": 4}
        monkeypatch.delitem(TUNING, "measured", raising=False)
        for table in TUNING.values():
            for name in ("in_proj_fwd", "out_proj_fwd", "out_proj_fwd_dropout", "gelu_bwd_gemm"):
                monkeypatch.setitem(table, name, [tile | {"num_warps": 4, "num_stages": 2}])
            for name in ("gelu_bwd", "residual_bwd"):
                monkeypatch.setitem(table, name, [few])

    return use


def inputs(rows: int, width: int, hidden: int, dtype) -> list:
    """Return x, h, y with strided rows, weights scaled to keep products near 1, and biases."""
    shapes = [(3 * width + hidden, width), (3 * width + hidden,), (width, width + hidden)]
    matrices = [rand(rows, width, dtype=dtype, seed=i) for i in range(3)]
    weights = [rand(*s, dtype=dtype, seed=3 + i, scale=width**-0.5) for i, s in enumerate(shapes)]
    return [*matrices, *weights, *(rand(width, dtype=dtype, seed=i) for i in (6, 7))]


def upstream(rows: int, width: int, dtype) -> list:
    return [rand(rows, 3 * width, dtype=dtype, seed=8), rand(rows, width, dtype=dtype, seed=9)]


def masks(rows: int, width: int, p: float, seed: int) -> tuple:
    """Return the two masks that backward draws."""
    ones = torch.ones(rows, width, device=DEVICE)
    return tuple(d != 0 for d in pointwise.residual_bwd(ones, p, seed)[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("rows", "width", "hidden"), [(1, 8, 16), (123, 40, 72), (65, 33, 47)])
def test_outputs_and_gradients(rows, width, hidden, choice, dtype, choose):
    """Tiles straddle these widths; at (65, 33, 47) rows are unaligned and TMA falls back."""
    choose(choice)
    args = inputs(rows, width, hidden, dtype)
    three_way(project, projections_reference, args, upstream(rows, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_dropout_is_replayed(choice, dtype, choose):
    choose(choice)
    p, seed, (rows, width) = 0.3, 2**40 + 7, (75, 40)
    keep = masks(rows, width, p, seed)
    p_exact = round(p * 65536) / 65536
    three_way(
        lambda *a: project(*a, p, seed),
        lambda *a: projections_reference(*a, keep, p_exact),
        inputs(rows, width, 56, dtype),
        upstream(rows, width, dtype),
    )


def test_dropout_statistics():
    """Masks keep 1 - p overall, per row and per column; masks and seeds are independent."""
    p, (rows, width) = 0.1, (250, 256)
    a, b = (m.double() for m in masks(rows, width, p, 1))
    other = masks(rows, width, p, 2)[0].double()
    sigma = math.sqrt(p * (1 - p))
    for mask in (a, b, other):
        assert abs(mask.mean() - (1 - p)) < 4 * sigma / math.sqrt(rows * width)
        assert (mask.mean(0) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(rows)
        assert (mask.mean(1) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(width)
    shifted = a.roll(1, 0), a.roll(1, 1), a.roll(8, 1)
    for pair in (b, other, *shifted):
        correlation = ((a - a.mean()) * (pair - pair.mean())).mean() / sigma**2
        assert abs(correlation) < 4 / math.sqrt(rows * width)
    assert torch.equal(a[:123, :40], masks(123, 40, p, 1)[0].double()), "mask depends on shape"


def test_dropped_elements_are_zero_and_kept_ones_scaled():
    d1, d2, db1, db2 = pointwise.residual_bwd(torch.ones(50, 24, device=DEVICE), 0.5, 3)
    assert set(d1.unique().tolist()) == set(d2.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(db1, d1.sum(0))
    torch.testing.assert_close(db2, d2.sum(0))
    # equal without dropout, but shared memory would accumulate both parameters' gradients
    *_, db1, db2 = pointwise.residual_bwd(torch.ones(5, 8, device=DEVICE), 0.0, 0)
    assert torch.equal(db1, db2)
    assert db1.data_ptr() != db2.data_ptr()


@pytest.mark.parametrize("choice", CHOICES)
def test_bitwise_repeat(choice, choose):
    choose(choice)
    args, grads = inputs(70, 24, 40, torch.float16), upstream(70, 24, torch.float16)
    first, second = (gradients(lambda *a: project(*a, 0.1, 5), args, grads) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # sigmoid(-300) = 0 = 1 / inf
@pytest.mark.parametrize("choice", CHOICES)
def test_activation_is_rebuilt_bitwise_at_any_size(choice, choose, monkeypatch):
    """Huge inputs give u or 0, never NaN; backward recomputes forward's a."""
    choose(choice)
    u = torch.tensor([-300.0, -20.0, -5.0, -0.0, 0.5, 5.0, 20.0, 300.0], device=DEVICE).half()
    h, w_out = torch.ones(3, 8, device=DEVICE).half(), torch.ones(8, 16, device=DEVICE).half()
    w_in = torch.cat([torch.zeros(24, 8, device=DEVICE).half(), torch.diag(u)])
    qkvu, a = mlp.in_proj_fwd(h, w_in, torch.zeros(32, device=DEVICE).half())
    torch.testing.assert_close(qkvu[0, 24:], u)
    torch.testing.assert_close(a[0], torch.nn.functional.gelu(u, approximate="tanh"))
    operands, du = [], torch.empty_like(a)
    monkeypatch.setattr(mlp, "accumulate_", lambda dw, dout, x, beta: operands.append(x))
    mlp.out_proj_bwd(h, h, qkvu[:, 24:], w_out, du, torch.empty(8, 16))
    assert torch.equal(operands[1], a)
    assert not du.isnan().any()


@pytest.mark.parametrize("shape", [(1, 1), (1000, 3), (37, 600)])
def test_column_sum(shape):
    x = rand(*shape, dtype=torch.float16)
    want = x.double().sum(0).float()
    torch.testing.assert_close(pointwise.column_sum(x), want, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_row_offsets_are_64_bit():
    """520 rows, 2^22 elements apart; memory between them is never touched."""
    wide = torch.empty(520 * 2**22, dtype=torch.float16, device=DEVICE)
    near = rand(520, 16, dtype=torch.float16)
    far = wide.as_strided((520, 16), (2**22, 1)).copy_(near)
    w, b = rand(16, 16, dtype=torch.float16), rand(16, dtype=torch.float16)
    for op in (
        lambda t: pointwise.residual_fwd(t, t, b, t, b, 0.0, 0),
        lambda t: pointwise.gelu_bwd(t, t, torch.empty_like(near), torch.empty_like(near)),
        lambda t: gemm.gelu_bwd(t, w, t, torch.empty_like(near), torch.empty_like(near)),
        lambda t: gemm.out_proj_fwd(t, t, torch.cat([w, w], 1), b, b, t, 0.0, 0),
    ):
        assert torch.equal(op(far), op(near))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", ["triton", "cublas"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_real_sizes_on_a_gpu(choice, p, dtype, monkeypatch):
    monkeypatch.setattr(mlp, "choice", lambda op, x: choice)
    rows, width = 1100, 1024
    keep = masks(rows, width, p, 3) if p else None
    three_way(
        lambda *a: project(*a, p, 3),
        lambda *a: projections_reference(*a, keep, round(p * 65536) / 65536),
        inputs(rows, width, 4 * width, dtype),
        upstream(rows, width, dtype),
    )
