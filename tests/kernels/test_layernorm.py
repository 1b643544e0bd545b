"""LayerNorm: three-way numerics, fused residual gradient, bitwise repeat, bad input."""

import pytest
import torch
from three_way import DEVICE, DTYPES, check, rand, three_way

from kernels.launch import TUNING
from kernels.layernorm import layernorm, layernorm_bwd, layernorm_fwd, layernorm_reference


def inputs(rows: int, cols: int, dtype, seed: int = 0, shift: float = 1.0) -> list:
    x = rand(rows, cols, dtype=dtype, seed=seed, scale=3, shift=shift)
    return [x, rand(cols, dtype=dtype, seed=1, shift=1), rand(cols, dtype=dtype, seed=2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 8), (5, 123), (9, 1023), (2, 8192)])
def test_output_and_gradients(rows, cols, dtype):
    args = inputs(rows, cols, dtype)
    three_way(layernorm, layernorm_reference, args, [rand(rows, cols, dtype=dtype, seed=9)])


def test_three_dimensions_and_strided_rows():
    x, w, b = inputs(12, 40, torch.float32)
    x3 = rand(3, 4, 40)
    assert not x.is_contiguous()
    assert not x3.is_contiguous()
    assert torch.equal(layernorm(x, w, b), layernorm(x.contiguous(), w, b))
    assert torch.equal(layernorm(x3, w, b).view(12, 40), layernorm(x3.reshape(12, 40), w, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_gradient_and_rebuilt_output(dtype, monkeypatch):
    """Three programs, so each sums several rows; `dresidual` adds before rounding."""
    for sm in ("sm_80", "sm_90"):
        config = TUNING[sm]["layernorm_bwd"][0] | {"PROGRAMS": 3}
        monkeypatch.setitem(TUNING[sm], "layernorm_bwd", [config])
    x, w, b = inputs(11, 75, dtype)
    dy, dres = rand(11, 75, dtype=dtype, seed=5), rand(11, 75, dtype=dtype, seed=6)
    y, mean, rstd = layernorm_fwd(x, w, b, 1e-5)
    dx, dw, db, rebuilt = layernorm_bwd(dy, x, w, mean, rstd, dres, b)
    assert torch.equal(rebuilt, y)
    assert (dw.dtype, db.dtype) == (torch.float32, torch.float32)

    def reference(x, w, b):
        return x, layernorm_reference(x, w, b)

    results = [
        torch.autograd.grad(reference(*t), t, (dres.to(d), dy.to(d)))
        for d in (dtype, torch.float64)
        for t in [[a.detach().to(d).requires_grad_() for a in (x, w, b)]]
    ]
    for name, ours, same, exact in zip(("dx", "dw", "db"), (dx, dw, db), *results):
        check(name, ours.to(dtype), same, exact)
    assert layernorm_bwd(dy, x, w, mean, rstd)[3] is None


def test_bitwise_repeat():
    x, w, b = inputs(30, 123, torch.float16)
    dy = rand(30, 123, dtype=torch.float16, seed=4)
    _, mean, rstd = layernorm_fwd(x, w, b, 1e-5)
    first, second = (layernorm_bwd(dy, x, w, mean, rstd)[:3] for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_row_offsets_are_64_bit():
    """Row 3 starts at element 3 * 2^30; memory between rows is never touched."""
    wide = torch.empty(3 * 2**30 + 16, dtype=torch.float16, device=DEVICE)
    x = wide.as_strided((4, 16), (2**30, 1)).copy_(rand(4, 16))
    near, w, b = x.clone(), torch.ones_like(x[0]), torch.zeros_like(x[0])
    y, mean, rstd = layernorm_fwd(x, w, b, 1e-5)
    assert torch.equal(y, layernorm_fwd(near, w, b, 1e-5)[0])
    results = (layernorm_bwd(t, t, w, mean, rstd, t)[:3] for t in (x, near))
    assert all(map(torch.equal, *results))


X = rand(4, 10)
W = torch.ones(10, device=DEVICE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.double(), W, W), "x has dtype torch.float64, want bfloat16, float16 or float32"),
        ((torch.ones(2, 8193, device=DEVICE), W, W), "x has shape .2, 8193.,.* C <= 8192"),
        ((rand(10, 4).t(), W, W), "strides .1, 20., want .* contiguous in C"),
        ((X, W[:9], W), "w is torch.float32 .9,., .*want contiguous .*.10."),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        layernorm(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [1024, 2048, 5000])
def test_real_sizes_on_a_gpu(cols, dtype):
    args = inputs(4099, cols, dtype)
    upstream = rand(4099, cols, dtype=dtype, seed=9)
    three_way(layernorm, layernorm_reference, args, [upstream])
