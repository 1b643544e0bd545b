import pytest
import torch

from bench.decode import Config, measure, step_bytes
from model import ModelConfig, Phi

TINY = {"vocab_size": 64, "seq_len": 32, "n_layer": 2, "n_head": 2, "width": 32, "mlp_width": 64}


def test_step_bytes_are_the_tensors_that_a_step_reads():
    """All parameters but the embedding (one row of it) and the LayerNorms; then the cache."""
    c = ModelConfig(**TINY, rotary_dim=8)
    named = Phi(c).named_parameters()
    read = sum(p.numel() for n, p in named if "ln" not in n and "embed" not in n)
    # the step adds one bias to the residual, the model has two
    assert step_bytes(c, 0, 0, 2) == 2 * (read - c.n_layer * c.width)
    cache = torch.zeros(c.n_layer, 2, 3, c.n_head, 10, c.head_dim)
    assert step_bytes(c, 3, 10, 4) - step_bytes(c, 0, 0, 4) == cache.numel() * 4


def test_measure():
    pytest.importorskip("transformers")
    config = Config(**TINY, rotary_dim=8, batch=(2,), prompt_tokens=4, new_tokens=6, rounds=2,
                    device="cpu")  # fmt: skip
    rows = measure(config)
    assert [r["impl"] for r in rows] == ["ours", "transformers", "transformers static"]
    for row in rows:
        assert row["same_frac"] == 1
        assert row["tokens_per_s"] == pytest.approx(2 * 6 / row["p50_ms"] * 1e3)
    assert rows[0]["ours_times"] == 1


def test_too_long():
    with pytest.raises(ValueError, match="30 \\+ 6 tokens are more than the context of 32"):
        Config(**TINY, rotary_dim=8, prompt_tokens=30, new_tokens=6)
