"""FP8 products: what is rounded, the error it costs, and training with it."""

import pytest
import torch
import torch.nn.functional as F
from test_block import SHAPE, gradients, tokens
from three_way import DEVICE, rand

from kernels import fp8, pointwise
from model import Phi

if why := fp8.unsupported(torch.device(DEVICE)):
    pytest.skip(why, allow_module_level=True)

UNIT = {fp8.E4M3: 2**-4, fp8.E5M2: 2**-3}  # largest relative rounding error of a normal number
ROUND = {"vocab_size": 61, "seq_len": 32, "width": 64, "mlp_width": 144}


@pytest.mark.parametrize("dtype", list(UNIT))
def test_quantise_uses_the_whole_range(dtype):
    x = rand(37, 48, scale=1e-3)
    x[3, 5] = -2.0
    q = fp8.quantise(x, dtype, columns=True)
    assert q.rows.dtype == q.columns.dtype == dtype
    assert q.rows[3, 5].item() == -torch.finfo(dtype).max
    assert torch.equal(q.rows.float(), q.columns.float().t())
    error = (q.rows.float() * q.scale - x).abs()
    smallest = torch.finfo(dtype).smallest_normal * q.scale
    assert (error <= UNIT[dtype] * x.abs().clamp(min=smallest)).all()
    assert error.max() > 0
    assert not fp8.quantise(torch.zeros(16, 16, device=DEVICE), dtype).rows.float().any()


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("shape", [(1, 16), (130, 70)])
def test_the_kernel_rounds_as_torch_does(dtype, shape):
    x = rand(*shape)
    want = (x / 0.01).to(dtype)
    q = pointwise.quantise(x, torch.tensor(0.01, device=DEVICE), dtype)
    same = q.float() == want.float()
    if DEVICE == "cpu":  # the interpreter drops a carry into the exponent
        same |= (want.float().frexp().mantissa.abs() == 0.5) & (2 * q.float() == want.float())
    assert same.all()


def dequantised(x, dtype) -> torch.Tensor:
    q = fp8.quantise(x, dtype)
    return q.rows.double() * q.scale.double()


def test_linear_is_the_product_of_what_was_rounded():
    x, w, b, dy = rand(2, 24, 48), rand(32, 48, seed=1), rand(32, seed=2), rand(2, 24, 32, seed=3)
    inputs = [t.detach().requires_grad_() for t in (x, w, b)]
    out = fp8.linear(*inputs)
    out.backward(dy)
    x8, w8 = dequantised(x.flatten(0, 1), fp8.E4M3), dequantised(w, fp8.E4M3)
    dy8 = dequantised(dy.flatten(0, 1), fp8.E5M2)
    want = x8 @ w8.t() + b.double(), dy8 @ w8, dy8.t() @ x8, dy.double().sum((0, 1))
    plain = [t.detach().requires_grad_() for t in (x, w, b)]
    F.linear(*plain).backward(dy)
    exact = F.linear(*plain), *(t.grad for t in plain)
    got = out, *(t.grad for t in inputs)
    for i, (a, right, near) in enumerate(zip(got, want, exact)):
        torch.testing.assert_close(a.double().view_as(right), right, rtol=1e-5, atol=1e-5)
        error = ((a - near).norm() / near.norm()).item()
        assert error < 1e-6 if i == 3 else 0.01 < error < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaled_mm_multiplies_as_the_emulation_does(dtype, monkeypatch):
    """_scaled_mm runs on tensor cores, and torch has a CPU version too."""
    x, w, b, dy = (rand(*shape, dtype=dtype, seed=i)
                   for i, shape in enumerate(((48, 64), (80, 64), (80,), (48, 80))))  # fmt: skip

    def products(emulated: bool) -> tuple:
        monkeypatch.setattr(fp8, "emulated", lambda x: emulated)
        q = fp8.quantise(dy, fp8.E5M2, columns=True)
        out = fp8.forward(x, w, b), fp8.forward(x, w), fp8.grad_x(q, w, dtype), fp8.grad_w(q, x)
        return out

    for ours, want in zip(products(False), products(True)):
        assert ours.dtype == want.dtype
        error = ((ours.double() - want.double()).norm() / want.double().norm()).item()
        assert error < (1e-2 if dtype is torch.bfloat16 else 2e-3)


def test_a_gradient_that_is_not_finite_stays_so():
    for wrong in (torch.inf, torch.nan):
        x, w, dy = rand(16, 16).requires_grad_(), rand(16, 16, seed=1), rand(16, 16, seed=2)
        dy[3, 4] = wrong
        fp8.linear(x, w, w[0]).backward(dy)
        assert not x.grad.isfinite().any()


def models(**changes) -> list[Phi]:
    """Return fp8 models, Triton and torch, and a plain torch one, with equal weights."""
    shape = SHAPE.__class__(**vars(SHAPE) | ROUND | changes)
    torch.manual_seed(0)
    made = [Phi(shape, triton, fp8=in_fp8).to(DEVICE) for triton, in_fp8 in
            ((True, True), (False, True), (False, False))]  # fmt: skip
    with torch.no_grad():
        for p, *others in zip(*(m.parameters() for m in made)):
            p.normal_(0.0, 0.2)
            [q.copy_(p) for q in others]
    return made


def test_both_paths_round_alike():
    ours, reference, plain = models()
    a, b, c = (gradients(m, *tokens((2, 32))) for m in (ours, reference, plain))
    for name in c:
        apart = ((x[name] - b[name]).norm() / b[name].norm() for x in (a, c))
        ours_apart, rounding = (x.item() for x in apart)
        assert ours_apart < 0.35 * rounding + 1e-6, (name, ours_apart, rounding)
    assert a["loss"] != c["loss"]
    again = gradients(ours, *tokens((2, 32)))
    assert all(torch.equal(a[name], again[name]) for name in a)
    ours(*tokens((2, 32))).backward()  # accumulates into existing gradients
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, 2 * a[name], msg=name)
    for model in (ours, reference):
        logits = model.eval()(tokens((2, 32))[0])  # eval does not quantise
        torch.testing.assert_close(logits, plain.eval()(tokens((2, 32))[0]), rtol=1e-3, atol=1e-3)


def test_a_model_trains():
    model = models()[1]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(15):
        losses.append(model(*tokens((2, 32))))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_what_cannot_be_in_8_bits(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert fp8.unsupported(cpu, a=64, b=144) == ""
    assert fp8.unsupported(cpu, a=64, b=72) == "b 72 is not a multiple of 16"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability, why in (((8, 0), "A100 is older than sm_90, which fp8 needs"), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)  # noqa: B023
        assert fp8.unsupported(gpu, a=64) == why
