import numpy as np
import pytest
import torch
from conftest import save_run

from data.base.features import Hidden, Lexical
from model import ModelConfig, Phi
from tokenizer import Tokenizer

TEXTS = ["def is_even(n): return n", "def isEven(n): return n", "class Tree: pass" * 9, ""]


def test_hidden_states_are_averaged_over_tokens(tokens, tmp_path):
    torch.manual_seed(0)
    model = Phi(ModelConfig(vocab_size=512, seq_len=64, n_layer=1, n_head=2, width=32,
                            mlp_width=64, rotary_dim=8))  # fmt: skip
    hidden = Hidden(save_run(tmp_path / "run", model, Tokenizer(tokens)), [], "cpu")
    vectors = hidden.vectors(TEXTS)
    states = []
    model.eval().ln_f.register_forward_hook(lambda module, args, output: states.append(output))
    for text, vector in zip(TEXTS, vectors):
        ids = [hidden.tokenizer.end_of_text, *hidden.tokenizer.encode(text)][:64]
        model(torch.tensor([ids]))
        mean = states.pop()[0].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).detach().numpy(), abs=1e-5)


def test_lexical_distance():
    lexical = Lexical([TEXTS[0], TEXTS[2]])
    distances = lexical.distances(TEXTS)
    assert distances[[0, 1], 0] == pytest.approx([0, 0], abs=1e-3)
    assert distances[[2, 3], 0] == pytest.approx([2**0.5] * 2, abs=1e-3)
    more = lexical.distances(["def is_even(n): return n, elephant", "def even(k): elephant"])
    assert 0 < more[0, 0] < more[1, 0] < 2**0.5
    assert more.dtype == np.float32
