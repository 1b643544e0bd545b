"""Muon against the singular value decomposition it approximates."""

import copy

import pytest
import torch

from common.muon import RMS, Muon, orthogonalize, update
from model import ModelConfig, Phi
from train import TrainConfig, make_optimizer

C, M, H = 32, 96, 2


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 48), (8, 32)])
def test_orthogonalize(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    got = orthogonalize(x * torch.tensor([1.0, 1e3, 1e-3])[:, None, None])
    got = u.mT @ got @ vh.mT / (RMS * max(shape) ** 0.5)
    on_diagonal = got.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(got, torch.diag_embed(on_diagonal), atol=1e-4, rtol=0)
    assert (on_diagonal[s > 0.005 * 1.01] - 1).abs().max() < 0.084  # as COEFFICIENTS promise
    assert on_diagonal.min() >= 0


def parts(w_in, w_out):
    """Return views of the separately orthogonalised matrices: q, k, v, up, attention, down."""
    return [*w_in.split([C, C, C, M]), *w_out.split([C, M], dim=1)]


def test_a_blocks_matrices_are_orthogonalised_apart():
    torch.manual_seed(0)
    w_in, w_out = torch.randn(3 * C + M, C), torch.randn(C, C + M)
    apart = [copy.deepcopy(p) for p in parts(*update(w_in, w_out))]
    for i, p in enumerate(parts(w_in, w_out)):
        p.mul_(3.0**i)
    for p, q in zip(parts(*update(w_in, w_out)), apart):
        torch.testing.assert_close(p, q)
        assert p.square().mean().sqrt() == pytest.approx(RMS, rel=0.2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    c = ModelConfig(vocab_size=64, seq_len=16, n_layer=2, n_head=H, width=C, mlp_width=M,
                    rotary_dim=8)  # fmt: skip
    return Phi(c)


def steps(model, optimizer: str, scale: float = 1.0, inf_at: int | None = None):
    """Train three steps with gradients scaled by `scale`; return the optimiser."""
    made = make_optimizer(model, TrainConfig(optimizer=optimizer, lr=0.01))
    made.grad_scale = torch.tensor(scale)
    for step in range(3):
        torch.manual_seed(step)
        idx = torch.randint(64, (2, 17))
        (model(idx[:, :-1], idx[:, 1:]) * scale).backward()
        made.found_inf = torch.tensor(float(step == inf_at))
        if step == inf_at:
            model.blocks[0].w_in.grad[0, 0] = torch.nan
        made.step()
        made.zero_grad()
    return made


def test_scaled_gradients_and_skipped_steps(model):
    plain, scaled, skipped = model, copy.deepcopy(model), copy.deepcopy(model)
    steps(plain, "muon")
    steps(scaled, "muon", 64.0)
    for p, q in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    before = copy.deepcopy(skipped)
    made = steps(skipped, "muon", inf_at=2)
    for (name, p), q in zip(skipped.named_parameters(), before.parameters()):
        assert p.isfinite().all(), name
        assert not p.equal(q), name
    assert all(t.isfinite().all() for state in made.state.values() for t in state.values())


def test_a_skipped_step_changes_nothing(model):
    before = copy.deepcopy(model)
    made = make_optimizer(model, TrainConfig(optimizer="muon"))
    made.found_inf = torch.tensor(1.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    made.step()
    assert all(p.equal(q) for p, q in zip(model.parameters(), before.parameters()))
    for block in model.blocks:
        assert made.state[block.w_in]["momentum"].count_nonzero() == 0


def test_what_is_no_matrix_of_a_block_is_adamws(model):
    other = copy.deepcopy(model)
    idx = torch.randint(64, (2, 17))
    for m, optimizer in ((model, "muon"), (other, "adamw")):
        m(idx[:, :-1], idx[:, 1:]).backward()
        made = make_optimizer(m, TrainConfig(optimizer=optimizer, lr=0.01))
        assert isinstance(made, Muon) == (optimizer == "muon")
        made.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.equal(q) == (not name.endswith(("w_in", "w_out"))), name
