"""train.py --check: measured against predicted memory, and which micro-batches fit."""

import itertools
import re

import pytest
import torch
from ranks import Run

import model
import train
from common import memory

SHAPE = ["--check", "--width=128", "--mlp_width=512", "--seqs_per_step=8", "--threads=1"]


def assert_as_predicted(said: str, *kinds: str) -> None:
    rows = re.findall(r"^(\w[a-z',_ ]+?)  +([\d.]+) +([\d.]+) +[\d.]+$", said, re.MULTILINE)
    rows = {kind: float(measured) / float(predicted) for kind, predicted, measured in rows}
    for kind in ("masters", "optimizer's states", "gradients", *kinds):
        assert rows[kind] == pytest.approx(1, abs=0.02), kind
    assert 0.88 < rows["total"] < 1.02  # the bounds are tests/bench/test_plan.py's


@pytest.fixture
def check(tiny, tokens, tmp_path, in_process):
    """check(flag, ...): return status, stdout and stderr; assert that no run folder is created."""

    def call(*flags):
        run = tmp_path / "run"
        told = in_process(train.main, *tiny, *SHAPE, f"--data={tokens}", f"--out={run}", *flags)
        assert not run.exists()
        return told

    return call


@pytest.mark.parametrize("flag", ["--optimizer=adamw", "--optimizer=muon", "--recompute"])
def test_one_process(check, flag):
    status, said, error = check(flag)
    assert (status, error) == (0, "")
    assert_as_predicted(said)
    assert "largest micro-batch that fits: 8 of 8 (estimated from micro-batches 1 and 2)" in said
    assert re.search(r"^128 tokens in .* loss 6\.\d+$", said, re.MULTILINE)  # two micro-steps


@pytest.mark.parametrize("flags", [["--dtype=float32"], ["--dtype=float32", "--shard=1"],
                                   ["--dtype=bfloat16", "--micro_batch=1"]])  # fmt: skip
def test_two_ranks(tiny, tokens, tmp_path, flags):
    """FSDP2; an existing run in the folder stays untouched."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    said = Run(run, [*tiny, *SHAPE, f"--data={tokens}", "--restart", *flags], 2).finish()
    assert_as_predicted(said, "weights")
    assert said.count("largest micro-batch that fits: 4 of 4") == 1
    assert [(p.name, p.read_text()) for p in run.iterdir()] == [("config.json", "{}")]


def test_what_fits_by_hand():
    def predicted(n):
        return {"gradients": 100 if n < 8 else 20, "activations": 7 * n}

    assert memory.expected(4, {}, predicted) == 128
    assert memory.expected(4, {1: 200}, predicted) == 200 + 3 * 7
    line = {1: 200, 3: 220}  # 10 bytes per sequence
    assert [memory.expected(n, line, predicted) for n in (1, 2, 4, 8)] == [200, 210, 230, 190]
    assert memory.largest(6, 231, lambda n: memory.expected(n, line, predicted)) == 3
    assert [memory.largest(12, n) for n in (0, 1, 5, 12, 99)] == [0, 1, 4, 12, 12]


@pytest.mark.parametrize(("free", "flags", "message"), [
    (7e6, [], "micro_batch 1 does not fit: needs about 0.009911 GB of 0.009111; try --recompute"),
    (7e6, ["--recompute"], "try a smaller model"),
    (11e6, [], "; 1 took 0.009679 GB; try --micro_batch=4 or --recompute"),
    (9e6, ["--recompute"], "; try --micro_batch=4 or a smaller model"),
])  # fmt: skip
def test_what_does_not_fit(check, monkeypatch, free, flags, message):
    monkeypatch.setattr(memory, "there_is", lambda _: int(free))
    status, said, error = check("--micro_batch=8", *flags)
    assert (status, "largest" in said, message in error) == (2, False, True), error


def test_a_gpu_that_runs_out_of_memory(check, monkeypatch):
    step = train.train_step

    def small(c, model, optimizer, guard, batches, micro_steps):
        batches = list(itertools.islice(batches, micro_steps))
        if len(batches[0]["idx"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(c, model, optimizer, guard, iter(batches), micro_steps)

    monkeypatch.setattr(train, "train_step", small)
    status, _, error = check()
    assert (status, "GB; try --micro_batch=1 or --recompute\n" in error) == (2, True), error


def test_a_loss_that_is_not_finite(check, monkeypatch):
    monkeypatch.setattr(model, "INIT_STD", 1e30)
    status, _, error = check()
    assert (status, "the loss is nan" in error) == (2, True), error
