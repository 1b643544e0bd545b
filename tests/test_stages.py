"""One small pass through every stage: raw code, exercises, tokens, model, scores, report page."""

import json

from conftest import ROOT, TINY

import sample
from data import collect, exercises, filter, pack
from data.shards import open_shard
from eval import humaneval
from experiments import pairs
from tokenizer import Tokenizer
from tokenizer import train as tokenizer_train
from tools import report

FEW = {name: exercises.FAMILIES[name] for name in ("count", "clamp", "cut_text", "combine")}


def test_raw_code_to_an_evaluated_model_and_its_page(in_process, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(exercises, "FAMILIES", FEW)  # all families take 20 seconds
    out = {name: tmp_path / name for name in ("raw", "filtered", "pairs", "exercises", "tokenizer")}
    tokens, run = tmp_path / "tokens/exercises", tmp_path / "runs/exercises"
    scores = tmp_path / "eval/exercises"
    heldout = out["exercises"] / "heldout.jsonl"

    def do(main, *arguments):
        status, said, errors = in_process(main, *arguments)
        assert status == 0, errors
        return said

    do(collect.main, "--source", ROOT / "data", "--out", out["raw"])
    do(filter.main, "--source", out["raw"], "--out", out["filtered"])
    do(pairs.main, "--source", out["raw"], "--out", out["pairs"])
    do(exercises.main, "--out", out["exercises"], "--count", 100, "--heldout", 2)
    do(tokenizer_train.main, "--source", out["filtered"], "--source", out["exercises"] / "train",
       "--vocab_size", 512, "--out", out["tokenizer"])  # fmt: skip
    do(pack.main, "--source", out["exercises"] / "train", "--tokenizer", out["tokenizer"],
       "--val_frac", 0.1, "--out", tokens)  # fmt: skip
    done = cli("train.py", *TINY, "--seq_len=256", "--data", tokens, "--out", run, "--max_steps=2",
               "--eval_interval=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    prompt = "def f(x):"
    assert do(sample.main, "--checkpoint", run, "--prompt", prompt, "--max_new_tokens", 4,
              "--device=cpu").startswith(prompt)  # fmt: skip
    do(humaneval.main, "--checkpoint", run, "--problems", heldout, "--max_new_tokens", 4,
       "--out", scores)  # fmt: skip

    tokenizer = Tokenizer(out["tokenizer"])
    ids = open_shard(next(tokens.glob("val_*.bin")), tokenizer.vocab_size, tokenizer.fingerprint)
    assert "def " in tokenizer.decode(ids.tolist())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == 2 * 4 * 256
    result = json.loads((scores / "results.json").read_text())
    assert (result["problems"], result["pass@1"]) == (2, 0)
    page = tmp_path / "curves.html"
    do(report.main, run, "--out", page)
    assert "<svg" in page.read_text()
