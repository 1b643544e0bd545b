"""Faults during training: each must end in a resumed run or one clear error."""

import functools
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from ranks import Run, back_to, curve, events, status
from safetensors.torch import load_file

from common import checkpoint
from model import Phi

STEPS = 12


@pytest.fixture(scope="module")
def flags(tiny, tokens):
    """Return flags for 12 steps with dropout, a checkpoint every 4 and a log line every 2."""
    return [*tiny, f"--data={tokens}", f"--max_steps={STEPS}", "--eval_interval=4",
            "--log_interval=2", "--dropout=0.1", "--keep=9", "--timeout_s=60"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """whole(ranks): return the folder of an undisturbed run on that many ranks."""

    @functools.cache
    def run(ranks):
        out = tmp_path_factory.mktemp("whole") / "run"
        Run(out, flags, ranks).finish()
        return out

    return run


def weights(run):
    return checkpoint.checksum(checkpoint.find(run, newest=True))


def assert_same(run, other):
    assert curve(run) == curve(other)
    assert weights(run) == weights(other)
    assert status(run)["status"] == "done"


def test_killed_at_any_moment(flags, whole, tmp_path):
    """SIGKILL one rank at a random moment after two steps."""
    run, draw = Run(tmp_path / "run", flags, 2), random.Random(2)
    run.wait_for(2)
    time.sleep(draw.random() * 0.01)
    draw.choice(run.processes).kill()
    for process in run.processes:
        process.join()
    assert sorted(p.exitcode for p in run.processes) == [-signal.SIGKILL, 2]
    assert "lost contact with another rank" in run.said()
    assert "Traceback" not in run.said()
    Run(tmp_path / "run", [*flags, "--resume"], 2).finish()
    assert_same(tmp_path / "run", whole(2))


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(flags, whole, tmp_path):
    short = [f for f in flags if "timeout" not in f] + ["--timeout_s=8"]
    run = Run(tmp_path / "run", short, 2)
    run.wait_for(4)
    os.kill(run.processes[1].pid, signal.SIGSTOP)
    run.processes[0].join(60)
    run.processes[1].kill()
    run.finish(2, -signal.SIGKILL)
    assert "rank 0 lost contact with another rank, which died or hangs" in run.said()
    assert status(tmp_path / "run")["status"] == "failed"
    Run(tmp_path / "run", [*flags, "--resume"], 2).finish()
    assert_same(tmp_path / "run", whole(2))


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_to_a_rank_saves_and_stops(flags, whole, tmp_path, ranks, number):
    run = Run(tmp_path / "run", flags, ranks)
    run.wait_for(2)
    os.kill(run.processes[-1].pid, number)
    said = run.finish(*[128 + number] * ranks)
    stopped = status(tmp_path / "run")
    assert stopped["status"] == "preempted, saved"
    assert checkpoint.steps(tmp_path / "run")[-1] == stopped["step"] < STEPS
    assert f"saved at step {stopped['step']}" in said
    Run(tmp_path / "run", [*flags, "--resume"], ranks).finish()
    assert_same(tmp_path / "run", whole(ranks))
    assert events(tmp_path / "run") == ["start", "stop", "start", "done"]


def plant_nan(rank):
    """Make the gradients NaN on rank 1 in its fifth step."""
    forward, calls = Phi.forward, []

    def planted(self, *args, **kwargs):
        calls.extend("x" * self.training)
        bad = rank == 1 and len(calls) == 5
        return forward(self, *args, **kwargs) * (math.nan if bad else 1)

    Phi.forward = planted


def test_nan_on_one_rank_skips_the_step_on_all(flags, tmp_path):
    shape = [*flags, "--log_interval=1", "--seqs_per_step=4", "--micro_batch=2",
             "--optimizer=muon"]  # fmt: skip
    assert "1 steps up to 5 skipped" in Run(tmp_path / "run", shape, 2, plant_nan).finish()
    records = [r for r in curve(tmp_path / "run") if "lr" in r]
    assert [r["skipped"] for r in records] == [0] * 4 + [1] * 8
    assert [r["step"] for r in records if "loss" not in r] == [5]
    assert all(math.isfinite(r["grad_norm"]) for r in records if r["step"] != 5)
    # AdamW did not count the step: it left no trace in the optimiser states.
    folder = checkpoint.find(tmp_path / "run", newest=True) / "training"
    saved = {k: v for f in folder.iterdir() for k, v in load_file(f).items()}
    assert saved["step.embed.weight"].item() == STEPS - 1
    assert all(v.isfinite().all() for k, v in saved.items() if k.startswith(("exp", "momentum")))


def plant_full_disk(rank):
    """Fill the disk on rank 1 during the second save."""
    write = checkpoint.Saver._write

    def planted(self, step, *args):
        if step == 8 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        write(self, step, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    checkpoint.Saver._write = planted


def test_a_full_disk_costs_one_checkpoint(flags, whole, tmp_path):
    out = tmp_path / "run"
    said = Run(out, flags, 2, plant_full_disk).finish()
    assert f"checkpoint {out}/checkpoints/step-00000008 was not written: File too large" in said
    assert "free space there, or lower `keep`" in said
    assert checkpoint.steps(out) == [4, 12]
    assert not list((out / "checkpoints").glob("tmp-*"))
    assert_same(out, whole(2))


def test_a_shard_damaged_while_it_is_read(flags, whole, tokens, tmp_path):
    shutil.copytree(tokens, tmp_path / "tokens")
    flags = [f for f in flags if "--data" not in f] + [f"--data={tmp_path / 'tokens'}"]
    run = Run(tmp_path / "run", flags)
    run.wait_for(4)
    shard = tmp_path / "tokens/train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:2000])
    said = run.finish(2)
    assert f"error: {shard} was damaged while it was in use" in said
    assert "Traceback" not in said
    said = Run(tmp_path / "run", [*flags, "--resume"]).finish(2)
    assert "is damaged: its header says" in said
    shutil.copy(tokens / shard.name, shard)
    Run(tmp_path / "run", [*flags, "--resume"]).finish()
    assert_same(tmp_path / "run", whole(1))


def test_a_damaged_checkpoint_is_passed_over(flags, whole, tmp_path):
    out = back_to(whole(2), 8, tmp_path / "run")
    shard = sorted((out / "checkpoints/step-00000008/training").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    said = Run(out, [*flags, "--resume"], 2).finish()
    assert f"step-00000008 is damaged: training/{shard.name} was changed" in said
    assert "resuming from step 4" in said
    assert_same(out, whole(2))
    assert (out / "checkpoints/damaged-step-00000008").exists()


def test_resumed_by_another_number_of_ranks(flags, tmp_path):
    flags = [*flags, "--dropout=0", "--grad_clip=0", "--micro_batch=1", "--optimizer=muon"]
    Run(tmp_path / "of1", flags, 1).finish()
    for ranks, shard in ((2, 1), (4, 2)):
        out = back_to(tmp_path / "of1", 4, tmp_path / f"of{ranks}")
        said = Run(out, [*flags, "--resume", f"--shard={shard}"], ranks).finish()
        assert "resuming from step 4" in said
        for a, b in zip(curve(out), curve(tmp_path / "of1"), strict=True):
            assert a == pytest.approx(b, rel=2e-5)


@pytest.mark.slow
def test_two_torchrun_agents_and_a_restart(flags, tmp_path):
    """Kill a rank of two "machines" on loopback; both agents restart their ranks and continue."""
    out, flags = tmp_path / "run", [*flags, "--max_steps=80"]
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
             "--max-restarts=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
             "--rdzv_id=test", "train.py", f"--out={out}", "--threads=1", *flags]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(agent, cwd=ROOT, env=env, **pipes) for _ in range(2)]
    while not checkpoint.steps(out):
        assert all(a.poll() is None for a in agents), [a.communicate()[0] for a in agents]
        time.sleep(0.002)
    os.kill(status(out)["pid"], signal.SIGKILL)
    said = [a.communicate(timeout=240)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], said
    assert "resuming from step" in "".join(said)
    assert events(out) == ["start", "start", "done"]
    Run(tmp_path / "whole", [*flags, "--shard=1"], 2).finish()
    assert_same(out, tmp_path / "whole")
