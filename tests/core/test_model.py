import dataclasses

import pytest
import torch

from common.config import UserError
from model import INIT_STD, ModelConfig, Phi, flops_per_token

# Odd on purpose: no two sizes are equal, so a transposed or misplaced weight cannot fit.
ODD = ModelConfig(vocab_size=61, seq_len=19, n_layer=3, n_head=3, width=42, mlp_width=50,
                  rotary_dim=6)  # fmt: skip


def randomised(c: ModelConfig) -> Phi:
    """A model whose every parameter, biases and LayerNorms too, is random and not small."""
    torch.manual_seed(0)
    model = Phi(c)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1, 0.3)
    return model


def their_names(c: ModelConfig, ours: dict) -> dict:
    """Tensors by the names of transformers' PhiForCausalLM, from ours by the names of Phi."""
    theirs, C = {"model.embed_tokens.weight": ours["embed.weight"]}, c.width
    for kind in ("weight", "bias"):
        theirs[f"model.final_layernorm.{kind}"] = ours[f"ln_f.{kind}"]
        theirs[f"lm_head.{kind}"] = ours[f"head.{kind}"]
    for i in range(c.n_layer):
        mine, at = f"blocks.{i}", f"model.layers.{i}"
        for kind, w_or_b in (("weight", "w"), ("bias", "b")):
            theirs[f"{at}.input_layernorm.{kind}"] = ours[f"{mine}.ln.{kind}"]
            q, k, v, up = ours[f"{mine}.{w_or_b}_in"].split([C, C, C, c.mlp_width])
            theirs[f"{at}.self_attn.q_proj.{kind}"] = q
            theirs[f"{at}.self_attn.k_proj.{kind}"] = k
            theirs[f"{at}.self_attn.v_proj.{kind}"] = v
            theirs[f"{at}.mlp.fc1.{kind}"] = up
        attn, down = ours[f"{mine}.w_out"].split([C, c.mlp_width], 1)
        theirs[f"{at}.self_attn.dense.weight"], theirs[f"{at}.mlp.fc2.weight"] = attn, down
        theirs[f"{at}.self_attn.dense.bias"] = ours[f"{mine}.b_attn"]
        theirs[f"{at}.mlp.fc2.bias"] = ours[f"{mine}.b_mlp"]
    return theirs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_same_logits_loss_and_gradients_as_transformers(dtype, tolerance):
    transformers = pytest.importorskip("transformers")
    c, model = ODD, randomised(ODD).to(dtype)
    config = transformers.PhiConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        max_position_embeddings=c.seq_len, partial_rotary_factor=c.rotary_dim / c.head_dim,
        rope_theta=c.rope_theta, layer_norm_eps=1e-5, hidden_act="gelu_new",
        tie_word_embeddings=False, attn_implementation="sdpa",  # eager has its softmax in fp32
    )  # fmt: skip
    theirs = transformers.PhiForCausalLM(config).to(dtype)
    theirs.load_state_dict(their_names(c, model.state_dict()), strict=True)
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
    ours_grads = their_names(c, {n: p.grad for n, p in model.named_parameters()})
    for name, p in theirs.named_parameters():
        atol = tolerance * p.grad.abs().max().item()
        torch.testing.assert_close(ours_grads.pop(name), p.grad, rtol=tolerance, atol=atol,
                                   msg=lambda m, name=name: f"gradient of {name}: {m}")  # fmt: skip
    assert not ours_grads


def test_flops_per_token_of_phi1():
    # 6 x 1,312,817,152 matmul parameters + 6 x 24 layers x 2048 x 2048 of causal attention
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


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = Phi(dataclasses.replace(ODD, n_layer=1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    idx = torch.randperm(ODD.vocab_size)[:18].view(2, 9)  # no two tokens follow the same one
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 4}, "width 42 is not divisible by n_head 4"),
        ({"rotary_dim": 5}, "rotary_dim is 5, want an even number"),
        ({"rotary_dim": 16}, "rotary_dim is 16, want an even number up to the head dim 14"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"n_layer": 0}, "n_layer is 0, want at least 1"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ODD, **change)


def test_documents_in_a_row_do_not_see_each_other():
    """A row of two documents gives each the logits that it has alone: positions are relative."""
    model = randomised(ODD).double().eval()
    first, second = torch.randint(61, (2, 8)), torch.randint(61, (2, 11))
    doc_start = torch.tensor([0] * 8 + [8] * 11, dtype=torch.int32).expand(2, -1)
    together = model(torch.cat([first, second], 1), doc_start=doc_start)
    # The rotary tables are fp32, so that equal angles at other positions differ by its rounding.
    torch.testing.assert_close(together[:, :8], model(first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[:, 8:], model(second), rtol=1e-5, atol=1e-5)
    blind = model(torch.cat([first, second], 1))
    assert (blind[:, 8:] - together[:, 8:]).abs().max() > 0.1
