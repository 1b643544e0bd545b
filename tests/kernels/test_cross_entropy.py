"""Cross-entropy: three-way numerics alone and with the head, the in-place contract, bad input."""

import pytest
import torch
from three_way import DEVICE, DTYPES, check, gradients, rand, three_way

from kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
    linear_cross_entropy_fwd_bwd,
)
from kernels.launch import TUNING

G = torch.tensor(256.0, device=DEVICE)  # upstream gradient, as loss scaling makes it


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 128 classes, so that a row of a few hundred is several blocks."""
    for sm in ("sm_80", "sm_90"):
        config = TUNING[sm]["cross_entropy"][0] | {"BLOCK_V": 128, "num_warps": 1}
        monkeypatch.setitem(TUNING[sm], "cross_entropy", [config])


def targets(rows: int, classes: int, ignored: tuple = ()) -> torch.Tensor:
    t = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    t[list(ignored)] = -1
    return t.to(DEVICE)


def alone(t, z_loss=0.0, **kwargs):
    """(ours, reference) as functions of logits; ours gets a copy to consume."""
    return (
        lambda x: cross_entropy(x.clone(), t, z_loss=z_loss, **kwargs),
        lambda x: cross_entropy_reference(x, t, ignore_index=-1, z_loss=z_loss),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (4, 123), (3, 1023), (2, 256)])
def test_loss_and_gradient(rows, classes, z_loss, dtype):
    ours, reference = alone(
        targets(rows, classes, ignored=range(2, rows, 2)), z_loss, expected_grad=G
    )
    logits = rand(rows, classes, dtype=dtype, scale=4)
    exact = gradients(reference, [logits.double()], [G])
    for i, (a, b, c) in enumerate(
        zip(gradients(ours, [logits], [G]), gradients(reference, [logits], [G]), exact)
    ):
        check(f"result {i}", a.to(dtype), b, c)  # our loss is fp32, torch's has the dtype


def test_loss_is_fp32_and_ignored_rows_have_no_gradient():
    t = targets(5, 200, ignored=(0, 3))
    loss, grad = gradients(alone(t)[0], [rand(5, 200, dtype=torch.float16)], [G])
    assert loss.dtype == torch.float32
    assert (grad.abs().sum(1) > 0).tolist() == [False, True, True, False, True]


def test_gradient_takes_the_place_of_the_logits():
    logits = rand(4, 200).requires_grad_()
    before, place = logits.detach().clone(), logits.data_ptr()
    (grad,) = torch.autograd.grad(cross_entropy(logits, targets(4, 200)), logits)
    assert grad.data_ptr() == place
    with torch.no_grad():
        logits.copy_(before)
        cross_entropy(logits, targets(4, 200))
    assert torch.equal(logits, before), "without a gradient the logits stay as they are"


def test_backward_runs_once():
    loss = cross_entropy(rand(4, 200).requires_grad_(), targets(4, 200))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_expected_grad_changes_rounding_only():
    """Right or wrong, the hint changes no result; right, it saves small ones from underflow."""
    t, logits = targets(4, 1000), rand(4, 1000, scale=4)
    results = [
        gradients(alone(t, expected_grad=hint)[0], [logits], [G]) for hint in (G, 256.0, 1.0, 3.0)
    ]
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1], rtol=1e-6, atol=0)
    zeros = [
        (gradients(alone(t, expected_grad=hint)[0], [logits.half()], [G])[1] == 0).float().mean()
        for hint in (1.0, G)
    ]
    assert zeros[1] < zeros[0] / 2


def test_extreme_logits():
    x = rand(3, 300, scale=1e4)
    x[0, :150] = -float("inf")  # a whole block of classes that are masked out
    t = torch.tensor([299, 0, 7], device=DEVICE)
    ours, reference = alone(t)
    three_way(ours, reference, [x], [G])


def test_targets_that_are_no_class():
    x = rand(3, 300)
    for bad in (300, -2, 2**40):
        loss = cross_entropy(x.clone(), torch.tensor([1, bad, 2], device=DEVICE))
        assert loss.isnan()
    loss, grad = gradients(alone(torch.full((3,), -1, device=DEVICE))[0], [x], [G])
    assert loss.item() == 0
    assert not grad.any()


def test_bitwise_repeat():
    x, t = rand(6, 500, dtype=torch.float16), targets(6, 500)
    first, second = (gradients(alone(t, 0.1)[0], [x], [G]) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_row_offsets_are_64_bit():
    wide = torch.empty(3 * 2**30 + 16, dtype=torch.float16, device=DEVICE)
    x = wide.as_strided((4, 16), (2**30, 1)).copy_(rand(4, 16))
    t, near = targets(4, 16), x.clone().requires_grad_()
    loss = cross_entropy(x.requires_grad_(), t)
    assert torch.equal(loss, cross_entropy(near, t))
    assert torch.equal(x, near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_with_the_head(chunk_rows, dtype):
    """10 rows, so that 4 leaves a rest and 100 is one chunk."""
    t = targets(10, 150, ignored=(1, 8))
    args = [
        rand(10, 24, dtype=dtype),
        rand(150, 24, dtype=dtype, seed=1).contiguous(),
        rand(150, dtype=dtype, seed=2),
    ]

    def ours(x, w, b):
        return linear_cross_entropy(x, w, b, t, chunk_rows=chunk_rows, z_loss=0.01, expected_grad=G)

    def reference(x, w, b):
        logits = torch.nn.functional.linear(x, w, b)
        return cross_entropy_reference(logits, t, z_loss=0.01)

    results = [
        gradients(fn, [a.to(d) for a in args], [G])
        for fn, d in ((ours, dtype), (reference, dtype), (reference, torch.float64))
    ]
    for i, (a, b, c) in enumerate(zip(*results)):
        check(f"result {i}", a.to(dtype), b, c)


def test_head_adds_to_gradient_buffers_in_fp32():
    x, w, b = rand(6, 16), rand(40, 16, seed=1).contiguous(), rand(40, seed=2)
    t, options = targets(6, 40), {"chunk_rows": 4}
    dw, db = torch.zeros_like(w), torch.zeros_like(b)
    linear_cross_entropy_fwd_bwd(x, w, b, t, dw, db, **options)
    once = dw.clone(), db.clone()
    linear_cross_entropy_fwd_bwd(x, w, b, t, dw, db, **options)
    torch.testing.assert_close((dw / 2, db / 2), once)
    assert linear_cross_entropy_fwd_bwd(x, w, b, t, dw, db, grad=False, **options)[1] is None
    torch.testing.assert_close((dw / 2, db / 2), once)


def test_head_needs_input_grad():
    x, w, b = rand(6, 16).requires_grad_(), rand(40, 16).contiguous(), rand(40)
    linear_cross_entropy(x, w, b, targets(6, 40)).backward()
    assert x.grad.shape == x.shape
    assert w.grad is None
    assert b.grad is None


X, T = rand(4, 10), targets(4, 10)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.double(), T), "logits has dtype torch.float64, want bfloat16"),
        ((rand(10, 4).t(), T), "logits has shape .4, 10., strides .1, 20., want two dimensions"),
        ((X[0], T), "logits has shape .10,., .* want two dimensions"),
        ((X, T.int()), "targets are torch.int32 .4,. on .*, want int64 .4. on"),
        ((X, T[:3]), "targets are torch.int64 .3,."),
        ((X, T.repeat(2)[::2]), "targets have strides .2,., want contiguous"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, X[:, :9], X[:, 0], T, 2), "weight is torch.float32 .4, 9. on .*, want contiguous"),
        ((X, X.contiguous(), X[:2, 0], T, 2), "bias is torch.float32 .2,."),
        ((X, X.half(), X[:, 0], T, 2), "weight is torch.float16"),
        ((X, X.contiguous(), X[:, 0].contiguous(), T, 0), "chunk_rows is 0, want at least 1"),
    ],
)
def test_bad_head(args, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*args[:-1], chunk_rows=args[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_sizes_on_a_gpu(dtype, monkeypatch):
    monkeypatch.undo()  # of small_blocks
    t = targets(515, 51200, ignored=range(0, 515, 7))
    ours, reference = alone(t, 1e-4, expected_grad=G)
    logits = rand(515, 51200, dtype=dtype, scale=4)
    results = gradients(ours, [logits], [G]), gradients(reference, [logits], [G])
    exact = gradients(reference, [logits.double()], [G])
    for i, (a, b, c) in enumerate(zip(*results, exact)):
        check(f"result {i}", a.to(dtype), b, c)
