"""Fixtures for all tests: small corpora, tokenizers and runs, made once per session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED_EVAL = ROOT.parent / "shared" / "eval"  # HumanEval and MBPP, if available

WORDS = sorted({w for kind in (str, list, dict, bytes, os) for w in dir(kind) if w.isidentifier()})

if not torch.cuda.is_available():  # triton reads it when the first test imports a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # more threads are slower at these sizes


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_eval() -> Path:
    """Return the folder of benchmark files; skip the test if it is absent."""
    if not SHARED_EVAL.is_dir():
        pytest.skip(f"no benchmark files at {SHARED_EVAL.relative_to(ROOT.parent)}")
    return SHARED_EVAL


@pytest.fixture(scope="session")
def cli():
    """cli("train.py", ...) or cli("-m", "data.pack", ...): run it, return the finished process."""

    def call(*args, env=None, stdin=None, timeout=300):
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call


@pytest.fixture
def in_process(monkeypatch, capsys):
    """in_process(humaneval.main, "--json"): run it, return (exit status, stdout, stderr)."""
    from common.config import run

    def call(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        status = 0
        try:
            run(main)
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return a folder with one uncompressed document shard of 400 small functions."""
    folder = tmp_path_factory.mktemp("corpus")
    from data.base.documents import document

    with open(folder / "00000.jsonl", "w") as shard:
        for i in range(400):
            name, other = WORDS[i % len(WORDS)], WORDS[(7 * i + 3) % len(WORDS)]
            text = (
                f'def {name}_{i}({other}, y):\n    """The {name} of {other}."""\n'
                f"    if {other} > {i}:\n        return y * {other} + {i * i}\n    return y\n"
            )
            shard.write(json.dumps(document(text, f"corpus:{i}")) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokens(cli, corpus, tmp_path_factory) -> Path:
    """Return a folder of token shards of `corpus`, with a 512-piece tokenizer."""
    root = tmp_path_factory.mktemp("tokens")
    for args in (
        ["-m", "tokenizer.train", "--source", corpus, "--vocab_size", 512, "--out", root / "tok"],
        ["-m", "data.pack", "--source", corpus, "--tokenizer", root / "tok", "--out", root / "bin",
         "--val_frac", 0.1],
    ):  # fmt: skip
        done = cli(*args)
        assert done.returncode == 0, done.stderr
    return root / "bin"


@pytest.fixture(scope="module")
def generator(tokens):
    """Return a generator on an untrained model with large weights, for clear, varied choices."""
    from model import ModelConfig, Phi
    from sample import Generator
    from tokenizer import Tokenizer

    torch.manual_seed(0)
    model = Phi(ModelConfig(512, 48, 2, 2, 32, 64, 8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return Generator(model, Tokenizer(tokens))


TINY = ["--vocab_size=512", "--seq_len=32", "--n_layer=2", "--n_head=2", "--width=32",
        "--mlp_width=64", "--rotary_dim=8", "--seqs_per_step=4", "--micro_batch=2",
        "--warmup_steps=2", "--eval_seqs=4", "--device=cpu", "--dtype=float32"]  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Return train.py flags for a model that takes milliseconds per step."""
    return TINY


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def save_run(run: Path, model, tokenizer) -> Path:
    """Create a run folder with one checkpoint of `model`; return the checkpoint's folder."""
    from common import checkpoint

    saver = checkpoint.Saver(run, 0, None, keep=1)
    saver.save(1, model, {"nothing": torch.zeros(1)}, tokenizer, {"world_size": 1})
    assert saver.finish() is None
    return checkpoint.find(run)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """Return a folder with a random byte-level Hugging Face model that reads up to 64 bytes."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "vocab_size": 257}  # fmt: skip
    transformers.BertModel(transformers.BertConfig(**shape)).save_pretrained(folder)
    characters = ["[PAD]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=64
    ).save_pretrained(folder)
    return folder
