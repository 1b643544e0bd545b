"""The client against a server that others wrote: `transformers serve` with a tiny model.

Skipped where `transformers[serving]` and accelerate are not installed.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from common.config import UserError
from data.annotate import Config, annotate
from data.base.documents import ShardWriter, document
from data.base.llm import Client, Options
from data.synthesize import Exercises, synthesize

MISSING = [n for n in ("fastapi", "uvicorn", "accelerate") if not importlib.util.find_spec(n)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model of the released architecture, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                                   pad_token="<|endoftext|>")  # fmt: skip
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(letters), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8192, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(model):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--host",
         "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(240):
            assert server.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_real_replies_are_paid_within_the_worst_case_and_kept(model, url, tmp_path):
    options = Options(model=model, base_url=url, budget_tokens=10_000, concurrency=2)
    with Client(options, tmp_path / "c") as client:
        asked = [[{"role": "user", "content": f"def f_{i}(x):"}] for i in range(4)]
        replies = [*client.in_order(lambda m: client.ask(m, 12), asked)]
        assert all(reply.text for reply in replies)
        spent = client.ledger.committed()
        assert 4 * 10 < spent.prompt < 4 * 100
        assert 4 <= spent.reply <= 4 * 12
    with Client(options, tmp_path / "c") as client:
        assert [*client.in_order(lambda m: client.ask(m, 12), asked)] == replies
        assert client.ledger.committed() == spent


def test_a_model_that_talks_nonsense_labels_and_writes_nothing(model, url, tmp_path):
    (tmp_path / "source").mkdir()
    with ShardWriter(tmp_path / "source") as writer:
        writer.write(document("x = 1\n", "code:a.py"))
    given = {"out": tmp_path / "out", "model": model, "base_url": url, "budget_tokens": 100_000}
    with pytest.raises(UserError, match=r"nothing was labelled.*'unparsable': 1"):
        annotate(Config(source=tmp_path / "source", labeller="llm", draws=1, **given))
    with pytest.raises(UserError, match="only 0 different ones"):
        synthesize(Exercises(count=2, writer="llm", reply_tokens=20, **given))
