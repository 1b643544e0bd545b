import dataclasses

import pytest
import torch

from common.config import UserError
from model import INIT_STD, ModelConfig, Phi, flops_per_token
from tools.hf import parts

# No two sizes are equal, so a transposed or misplaced weight cannot fit.
ODD = ModelConfig(vocab_size=61, seq_len=19, n_layer=3, n_head=3, width=42, mlp_width=50,
                  rotary_dim=6)  # fmt: skip


def randomised(c: ModelConfig) -> Phi:
    """Return a model with large random parameters, biases and LayerNorms included."""
    torch.manual_seed(0)
    model = Phi(c)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1, 0.3)
    return model


def test_same_logits_loss_and_gradients_as_transformers():
    transformers = pytest.importorskip("transformers")
    c, model, tolerance = ODD, randomised(ODD).double(), 1e-10
    config = transformers.PhiConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        max_position_embeddings=c.seq_len, partial_rotary_factor=c.rotary_dim / c.head_dim,
        rope_theta=c.rope_theta, layer_norm_eps=1e-5, hidden_act="gelu_new",
        tie_word_embeddings=False, attn_implementation="sdpa",  # eager computes softmax in fp32
    )  # fmt: skip
    theirs = transformers.PhiForCausalLM(config).double()
    theirs.load_state_dict(parts(model), strict=True)
    # Both libraries compute the rotary tables in fp32; theirs casts them to the model's dtype.
    torch.manual_seed(1)
    idx = torch.randint(c.vocab_size, (2, c.seq_len + 1))
    x, y = idx[:, :-1], idx[:, 1:]

    logits = theirs(x).logits
    torch.testing.assert_close(model(x), logits, rtol=tolerance, atol=tolerance)
    ours_loss = model(x, y)
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(ours_loss, their_loss, rtol=tolerance, atol=tolerance)

    ours_loss.backward()
    their_loss.backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for p in model.parameters():
        p.data = p.grad
    torch.testing.assert_close(dict(parts(model)), their_grads, rtol=tolerance, atol=tolerance)


def test_flops_per_token_of_phi1():
    # 6 x 1,312,817,152 matmul parameters + 6 x 24 layers x 2048 x 2048 for causal attention
    assert flops_per_token(ModelConfig()) == 6 * 1_312_817_152 + 6 * 24 * 2048 * 2048


def test_initialisation():
    torch.manual_seed(0)
    model = Phi(dataclasses.replace(ODD, width=192, n_head=6, rotary_dim=16, vocab_size=500))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(INIT_STD, rel=0.05), name
        else:
            assert (p == name.endswith("weight")).all(), name


def test_causal():
    model = randomised(ODD).eval()
    a = torch.randint(ODD.vocab_size, (1, 12))
    b = a.clone()
    b[0, 7:] = (b[0, 7:] + 1) % ODD.vocab_size
    ours, changed = model(a), model(b)
    torch.testing.assert_close(ours[:, :7], changed[:, :7], rtol=0, atol=0)
    assert (ours[:, 7:] - changed[:, 7:]).abs().amax() > 1e-2


def test_ignored_targets():
    model = randomised(ODD)
    idx, targets = torch.randint(ODD.vocab_size, (2, 2, 12))
    masked = targets.clone()
    masked[:, 6:] = -1
    torch.testing.assert_close(model(idx, masked), model(idx[:, :6], targets[:, :6]))


def test_dropout_only_in_training():
    model = randomised(dataclasses.replace(ODD, dropout=0.5))
    idx = torch.randint(ODD.vocab_size, (2, 12))
    assert (model(idx) != model(idx)).any()
    assert (model.eval()(idx) == model(idx)).all()


def test_starting_at_the_identity():
    """With zero_init, the blocks start as the identity: logits = head(ln_f(embed(idx)))."""
    model = Phi(dataclasses.replace(ODD, zero_init=True))
    idx = torch.randint(ODD.vocab_size, (2, 12))
    assert model(idx).equal(model.head(model.ln_f(model.embed(idx))))


@pytest.mark.parametrize("change", ["n_head=4", "rotary_dim=5", "rotary_dim=16", "dropout=1",
                                    "n_layer=0", "kernels=cuda"])  # fmt: skip
def test_impossible_shapes(change):
    name, value = change.split("=")
    with pytest.raises(UserError, match=name):
        dataclasses.replace(ODD, **{name: int(value) if value.isdigit() else value})


def test_documents_in_a_row_do_not_see_each_other():
    """Two documents in one row get the same logits as alone: positions are relative."""
    model = randomised(ODD).double().eval()
    first, second = torch.randint(61, (2, 8)), torch.randint(61, (2, 11))
    doc_start = torch.tensor([0] * 8 + [8] * 11, dtype=torch.int32).expand(2, -1)
    together = model(torch.cat([first, second], 1), doc_start=doc_start)
    # The rotary tables are fp32, so equal relative angles differ by fp32 rounding.
    torch.testing.assert_close(together[:, :8], model(first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[:, 8:], model(second), rtol=1e-5, atol=1e-5)
    blind = model(torch.cat([first, second], 1))
    assert (blind[:, 8:] - together[:, 8:]).abs().max() > 0.1
