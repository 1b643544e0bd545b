"""Cross-entropy: three-way numerics, in-place gradient, chunked head, bad input."""

import pytest
import torch
from three_way import DEVICE, DTYPES, check, gradients, rand

from kernels.cross_entropy import (
    cross_entropy_,
    cross_entropy_reference,
    linear_cross_entropy,
)
from kernels.launch import TUNING

G = torch.tensor(256.0, device=DEVICE)  # upstream gradient, as with loss scaling


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Use blocks of 128 classes: a row of a few hundred spans several."""
    for sm in ("sm_80", "sm_90"):
        config = TUNING[sm]["cross_entropy"][0] | {"BLOCK_V": 128, "num_warps": 1}
        monkeypatch.setitem(TUNING[sm], "cross_entropy", [config])


def targets(rows: int, classes: int, ignored: tuple = ()) -> torch.Tensor:
    t = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    t[list(ignored)] = -1
    return t.to(DEVICE)


def alone(logits, t, g=G) -> list:
    """Return [loss, d(g loss)/dlogits] from one launch on a copy of the logits."""
    x, n = logits.clone(), (t != -1).sum().clamp(min=1)
    losses = cross_entropy_(x, t, g / n, -1, grad=True)
    return [losses.sum() / n, x]


def three_way(logits, t) -> None:
    def reference(x):
        return cross_entropy_reference(x, t)

    same = gradients(reference, [logits], [G])
    exact = gradients(reference, [logits.double()], [G])
    for name, a, b, c in zip(("loss", "gradient"), alone(logits, t), same, exact):
        check(name, a.to(logits.dtype), b, c)  # ours is fp32, torch's has the logits' dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (4, 123), (3, 1023), (2, 256)])
def test_loss_and_gradient(rows, classes, dtype):
    t = targets(rows, classes, ignored=range(2, rows, 2))
    three_way(rand(rows, classes, dtype=dtype, scale=4), t)


def test_without_a_gradient_the_logits_stay():
    logits, t = rand(4, 200), targets(4, 200)
    x = logits.clone()
    losses = cross_entropy_(x, t, G, -1, grad=False)
    assert torch.equal(losses.sum() / 4, alone(logits, t)[0])
    assert torch.equal(x, logits)


def test_extreme_logits():
    x = rand(3, 300, scale=1e4)
    x[0, :150] = -float("inf")  # a whole block of masked classes
    three_way(x, torch.tensor([299, 0, 7], device=DEVICE))


def test_targets_that_are_no_class():
    x = rand(3, 300)
    for bad in (300, -2, 2**40):
        assert alone(x, torch.tensor([1, bad, 2], device=DEVICE))[0].isnan()
    loss, grad = alone(x, torch.full((3,), -1, device=DEVICE))
    assert loss.item() == 0
    assert not grad.any()


def test_bitwise_repeat():
    x, t = rand(6, 500, dtype=torch.float16), targets(6, 500)
    assert all(map(torch.equal, alone(x, t), alone(x, t)))


def test_row_offsets_are_64_bit():
    wide = torch.empty(3 * 2**30 + 16, dtype=torch.float16, device=DEVICE)
    x = wide.as_strided((4, 16), (2**30, 1)).copy_(rand(4, 16))
    t, near = targets(4, 16), x.clone()
    a, b = (cross_entropy_(y, t, G, -1, grad=True) for y in (x, near))
    assert torch.equal(a, b)
    assert torch.equal(x, near)


def head(rows=10, classes=150, width=24, dtype=torch.float32) -> list:
    return [
        rand(rows, width, dtype=dtype),
        rand(classes, width, dtype=dtype, seed=1).contiguous(),
        rand(classes, dtype=dtype, seed=2),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_with_the_head(chunk_rows, dtype):
    """10 rows: chunks of 4 leave a remainder, 100 is one chunk."""
    t, args = targets(10, 150, ignored=(1, 8)), head(dtype=dtype)

    def ours(x, w, b):
        return linear_cross_entropy(x, w, b, t, chunk_rows=chunk_rows, expected_grad=G)

    def reference(x, w, b):
        return cross_entropy_reference(torch.nn.functional.linear(x, w, b), t)

    results = [
        gradients(fn, [a.to(d) for a in args], [G])
        for fn, d in ((ours, dtype), (reference, dtype), (reference, torch.float64))
    ]
    for i, (a, b, c) in enumerate(zip(*results)):
        check(f"result {i}", a.to(dtype), b, c)


def test_expected_grad_changes_rounding_only():
    """Any hint gives the same results; the right one keeps small gradients from underflow."""
    t, args = targets(10, 150), head()
    first, *others = (
        gradients(lambda *a, h=h: linear_cross_entropy(*a, t, expected_grad=h), args, [G])
        for h in (G, 256.0, 1.0, 3.0)
    )
    for other in others:
        assert torch.equal(other[0], first[0])
        for a, b in zip(other[1:], first[1:]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())
    logits, t = rand(4, 1000, dtype=torch.float16, scale=4), targets(4, 1000)
    unscaled, scaled = ((alone(logits, t, g)[1] == 0).float().mean() for g in (G / G, G))
    assert scaled < unscaled / 2


def test_backward_runs_once():
    x, w, b = head()
    loss = linear_cross_entropy(x.requires_grad_(), w, b, targets(10, 150))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


X, T = rand(4, 10), targets(4, 10)
W, B = X.contiguous(), X[:, 0].contiguous()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.double(), W, B, T), "x has dtype torch.float64, want bfloat16"),
        ((rand(10, 4).t(), W, B, T), "x has shape .4, 10., strides .1, 20., want two dimensions"),
        ((X, W, B, T.int().repeat(2)[::2]), "targets is .*int32 .* strides .2,., .*want cont"),
        ((X, X[:, :9], B, T), "weight is torch.float32 .4, 9."),
        ((X, W, X[:2, 0], T), "bias is torch.float32 .2,."),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_sizes_on_a_gpu(dtype, monkeypatch):
    monkeypatch.undo()  # undo small_blocks
    t = targets(515, 51200, ignored=range(0, 515, 7))
    three_way(rand(515, 51200, dtype=dtype, scale=4), t)
