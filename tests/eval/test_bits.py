import json
import math

import numpy as np
import pytest
import torch
from conftest import save_run

from data.base.readers import read_documents
from eval.bits import starts, token_nats
from model import ModelConfig, Phi
from tokenizer import Tokenizer


@pytest.fixture
def model() -> Phi:
    torch.manual_seed(0)
    model = Phi(ModelConfig(512, 16, 2, 2, 32, 64, 8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model


def test_each_token_once_as_the_model_predicts_it(model):
    rng, T, end = np.random.default_rng(0), model.c.seq_len, 3
    texts = [rng.integers(4, 512, n).tolist() for n in (40, 1, 15, 16, 17, 0)]
    for ids, nats in zip(texts, token_nats(model, end, texts), strict=True):
        assert nats.shape == (len(ids),)
        sequence = [end, *ids]
        for i in range(len(ids)):  # from the document's start, or from the window's
            at = max([a for a in starts(len(sequence), T) if a == 0 or a + T // 2 <= i])
            with torch.no_grad():
                logits = model(torch.tensor([sequence[at : i + 1]]))[0, -1]
            want = -logits.log_softmax(0)[ids[i]].item()
            assert nats[i] == pytest.approx(want, rel=1e-4)


def test_a_model_that_knows_nothing_needs_log2_of_its_pieces(cli, model, tokens, corpus, tmp_path):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    tokenizer = Tokenizer(tokens)
    save_run(tmp_path / "run", model, tokenizer)
    texts = [d["text"] for d in read_documents([corpus])][:80]
    source, out = tmp_path / "code.jsonl", tmp_path / "bits.json"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    done = cli(
        "-m", "eval.bits", "--checkpoint", tmp_path / "run", "--source", source, "--out", out
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result
    assert (result["documents"], result["bytes"]) == (80, sum(len(t.encode()) for t in texts))
    pieces = sum(len(tokenizer.encode(t)) for t in texts)
    assert result["bits_per_byte"] == pytest.approx(pieces * math.log2(512) / result["bytes"])
    low, high = result["ci95"]
    assert low < result["bits_per_byte"] < high
