"""The block's autograd node against the reference, model.py's torch path."""

import dataclasses
import math

import pytest
import torch
from three_way import DEVICE, DTYPES, check

from common.config import UserError
from kernels.block import block
from model import ModelConfig, Phi, select_kernels

# No tile is full; widths are multiples of 8, as `unsupported` demands.
SHAPE = ModelConfig(vocab_size=61, seq_len=37, n_layer=1, n_head=2, width=64, mlp_width=136,
                    rotary_dim=12)  # fmt: skip


def models(dtype=torch.float32, **changes) -> tuple[Phi, Phi]:
    """Return a Triton and a torch model with the same random parameters, incl. biases and LN."""
    torch.manual_seed(0)
    shape = dataclasses.replace(SHAPE, **changes)
    ours, reference = (Phi(shape, triton).to(DEVICE, dtype) for triton in (True, False))
    with torch.no_grad():
        for p, q in zip(ours.parameters(), reference.parameters()):
            q.copy_(p.normal_(0.1, 0.2))
    return ours, reference


def tokens(shape=(2, 37), seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    idx = torch.randint(61, (shape[0], shape[1] + 1), device=DEVICE)
    targets = idx[:, 1:].clone()
    targets[0, :5] = -1
    return idx[:, :-1], targets


def gradients(model: Phi, idx, targets, scale: float = 1.0, doc_start=None) -> dict:
    model.zero_grad()
    loss = model(idx, targets, doc_start=doc_start)
    (loss * scale).backward()
    grads = {name: p.grad / scale for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | grads


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        *((dtype, {}) for dtype in DTYPES),
        (torch.float32, {"rotary_dim": 0, "n_head": 1, "mlp_width": 40, "n_layer": 2}),
    ],
)
def test_same_loss_and_gradients_as_the_torch_path(dtype, changes):
    ours, same = models(dtype, **changes)
    _, exact = models(torch.float32, **changes)
    exact.load_state_dict({k: v.float() for k, v in same.state_dict().items()})
    exact.double()
    batch, scale = tokens(), 64.0 if dtype is torch.float16 else 1.0
    a, b, c = (gradients(m, *batch, scale) for m in (ours, same, exact))
    half_ulp = 0.5 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps  # in fp32 ulps
    for name in c:  # 16 ulps: each GEMM's tiling rounds differently; the fp32 loss sees dtype's
        check(name, a[name], b[name], c[name], ulps=16 + half_ulp * (name == "loss"))


def test_documents_are_kept_apart_as_on_the_torch_path():
    ours, reference = models()
    starts = torch.tensor([[0, 9, 30], [0, 1, 17]])
    doc_start = torch.zeros(2, 37, dtype=torch.int32).scatter_(1, starts, starts.int())
    doc_start = doc_start.cummax(1).values.int().to(DEVICE)
    a, b = (gradients(m, *tokens(), doc_start=doc_start) for m in (ours, reference))
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    assert abs(a["loss"] - ours(*tokens())) > 1e-5


def test_autocast_keeps_the_stream_in_half_precision_and_gradients_in_fp32():
    ours, reference = models()
    batch = tokens()
    seen = []
    for b in ours.blocks:
        b.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast(DEVICE, torch.float16):
        loss = ours(*batch)
    (loss * 256).backward()
    exact = gradients(reference, *batch)
    assert seen == [torch.float16]
    for name, p in ours.named_parameters():
        assert p.grad.dtype == torch.float32
        error = (p.grad / 256 - exact[name]).norm() / exact[name].norm()
        assert error < 0.02, (name, error)
    rounded = ours.blocks[0].w_in.grad.half().float()
    assert not torch.equal(rounded, ours.blocks[0].w_in.grad), "was it ever fp16?"


def test_gradients_accumulate_in_place():
    ours, _ = models()
    batches = tokens((1, 12), seed=1), tokens((1, 12), seed=2)
    second, first = (gradients(ours, *batch) for batch in batches[::-1])
    where = {n: p.grad.data_ptr() for n, p in ours.named_parameters() if ".w_" in n}
    ours(*batches[1]).backward()
    for name, p in ours.named_parameters():
        want = first[name] + second[name]
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5, msg=name)
        assert where.get(name, p.grad.data_ptr()) == p.grad.data_ptr()


def test_dropout_is_replayed_and_drawn_from_the_seed():
    """Central differences of the loss match the gradient only if backward replays the masks."""
    ours, _ = models(dropout=0.2, seq_len=16)
    batch = tokens((1, 16))

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ours(*batch)

    first = loss(3)
    first.backward()
    assert loss(4) != first
    p = ours.blocks[0].w_in
    grad, step = p.grad.clone(), 1e-3 / p.grad.norm()
    with torch.no_grad():
        assert loss(3) == first
        up = p.add_(grad * step) is p and loss(3).double()
        down = p.sub_(2 * grad * step) is p and loss(3).double()
    assert (up - down).item() / (2 * step.item()) == pytest.approx(
        grad.square().sum().item(), rel=0.02
    )


def test_bitwise_repeat():
    ours, _ = models(torch.float16, dropout=0.1, seq_len=16)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(gradients(ours, *tokens((2, 16)), 64.0))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_frozen_weights_and_inputs():
    ours, reference = models(n_layer=2)
    for model in (ours, reference):
        model.blocks[0].w_in.requires_grad_(False)
        model.blocks[1].b_mlp.requires_grad_(False)
        model.embed.requires_grad_(False)
        model(*tokens((1, 12))).backward()
    for p, q in zip(ours.parameters(), reference.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_selection(monkeypatch):
    cpu = torch.device("cpu")
    assert select_kernels(dataclasses.replace(SHAPE, kernels="torch"), cpu)[0] == "torch"
    assert select_kernels(SHAPE, cpu) == ("torch", "device is cpu")
    asked = dataclasses.replace(SHAPE, kernels="triton")
    kernels, how = select_kernels(asked, torch.device(DEVICE))
    assert kernels == "triton"
    assert "in_proj_fwd" in how
    with pytest.raises(UserError, match="head dim 16"):
        select_kernels(dataclasses.replace(asked, n_head=4), torch.device(DEVICE))
    with pytest.raises(UserError, match="sm_80"):
        select_kernels(asked, torch.device("meta"))


def arguments() -> dict:
    C, M, T = 64, 72, 8
    names = {"ln_w": (C,), "ln_b": (C,), "w_in": (3 * C + M, C), "b_in": (3 * C + M,),
             "w_out": (C, C + M), "b_attn": (C,), "b_mlp": (C,)}  # fmt: skip
    values = {name: torch.zeros(shape, device=DEVICE) for name, shape in names.items()}
    rope = (torch.ones(T, 4, device=DEVICE), torch.zeros(T, 4, device=DEVICE))
    return {"x": torch.zeros(2, T, C, device=DEVICE)} | values | {"n_head": 2, "rope": rope}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("x", torch.zeros(8, 2, 64, device=DEVICE).transpose(0, 1), "contiguous"),
        ("x", torch.zeros(2, 8, 64, device="meta"), "sm_80"),
        ("w_in", torch.zeros(100, 64, device=DEVICE), "w_in"),
        ("w_out", torch.zeros(64, 136, dtype=torch.float16, device=DEVICE), "w_out is .*float16"),
        ("n_head", 4, "head dim 16"),
        ("rope", (torch.ones(4, 4, device=DEVICE),) * 2, "rope is .* .4, 4."),
        ("rope", (torch.ones(8, 20, device=DEVICE),) * 2, "rope rotates 40 dims"),
        ("dropout_p", 1.0, "dropout_p"),
        ("doc_start", torch.zeros(2, 8, dtype=torch.int64, device=DEVICE), "doc_start"),
    ],
)
def test_wrong_arguments(name, value, says):
    with pytest.raises(ValueError, match=says):
        block(**arguments() | {name: value})


def test_these_arguments_are_right():
    """Control for the test above: these pass, and a block of zeros is the identity."""
    x = torch.randn(1, 8, 64, device=DEVICE)
    doc_start = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
    out = block(**arguments() | {"x": x, "doc_start": doc_start, "dropout_p": 0.5})
    assert torch.equal(out, x)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_training_step_at_phi1_width_on_a_gpu(dtype, scale):
    """Loss and gradients at phi-1's width are as near fp32 as the torch path's."""
    changes = {"width": 2048, "n_head": 32, "mlp_width": 8192, "seq_len": 512, "vocab_size": 1000}
    shape = dataclasses.replace(SHAPE, rotary_dim=32, **changes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        ours = Phi(shape, triton=True)
        reference = Phi(shape)
    reference.load_state_dict(ours.state_dict())
    idx = torch.randint(1000, (4, 513), device="cuda")
    results = []
    for model, half in ((ours, True), (reference, True), (reference, False)):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=half):
            loss = model(idx[:, :-1], idx[:, 1:])
        (loss * scale).backward()
        grads = {n: p.grad / scale for n, p in model.named_parameters()}
        results.append(grads | {"loss": loss.detach()})
    for name, exact in results[2].items():
        a, b = ((r[name] - exact).norm() / exact.norm() for r in results[:2])
        assert math.isfinite(a)
        assert a <= 2 * b + 0.004, (name, a, b)
