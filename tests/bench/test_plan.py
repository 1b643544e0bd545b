"""The plan: its memory against what torch and FSDP2 allocate, its step and its speeds by hand."""

import dataclasses
import json
import shutil
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import plan
from bench.cost import GPUS, NETWORK_HOP_S, NVLINK_HOP_S, START_S, Gpu, collective_s
from common.config import UserError, parse
from model import Phi, parameter_count
from train import make_optimizer

ROOT = Path(__file__).parents[2]
PHI1, BASE = (str(ROOT / "configs" / f"{name}.toml") for name in ("phi1", "phi1_base"))
# Each where another kind of memory is the largest: activations, logits, weights.
SHAPES = {
    "deep": {"vocab_size": 96, "seq_len": 64, "n_layer": 5, "n_head": 2, "width": 64},
    "wide vocabulary": {"vocab_size": 4096, "seq_len": 32, "n_layer": 2, "n_head": 2, "width": 64},
    "heavy": {"seq_len": 16, "n_layer": 3, "n_head": 2, "width": 128, "mlp_width": 640},
}


def configured(shape: str = "deep", **values) -> plan.Config:
    c = {"vocab_size": 64, "mlp_width": 200, "rotary_dim": 8, "seqs_per_step": 8, "micro_batch": 4}
    c |= {"gpus": 1, "kernels": "torch", "dtype": "float32"}
    return plan.Config(**c | SHAPES[shape] | values)


class Allocated(TorchDispatchMode):
    """Bytes of all storages that torch made while it was on and that are alive; and the most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.collectives = weakref.WeakSet(), 0, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        made = [getattr(t, "_local_tensor", t) for t in tree_leaves(out) if torch.is_tensor(t)]
        self.alive.update(t.untyped_storage() for t in made)
        self.peak = max(self.peak, sum(s.nbytes() for s in self.alive))
        if "c10d" in str(f):
            sizes = [t.nbytes for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            self.collectives.append((str(f).split(".")[1].strip("_"), max(sizes)))
        return out


def batch(c: plan.Config, n: int) -> torch.Tensor:
    return torch.randint(0, c.vocab_size, (n, c.seq_len))


def saved_for_backward(model: Phi, c: plan.Config, n: int) -> int:
    """Bytes of the storages that a forward pass keeps, beyond the model's own and the batch."""
    idx, targets, saved = batch(c, n), batch(c, n), {}
    ours = [*model.parameters(), *model.buffers(), idx, targets]

    def keep(t):
        saved[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(idx, targets)
    for t in ours:
        saved.pop(t.untyped_storage()._cdata, None)
    return sum(s.nbytes() for s in saved.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_torch_saves(shape, dtype):
    c, N, b = configured(shape), 3 * SHAPES[shape]["seq_len"], dtype.itemsize
    told = N * (c.n_layer * plan.saved_bytes(c.model, b) + 4 * c.vocab_size + 2 * b * c.width + 8)
    # On a CPU, LayerNorm's statistics are of the model's dtype. A loss keeps its divisor.
    told -= N * 2 * (4 - b) * (c.n_layer + 1) - 4
    assert saved_for_backward(Phi(c.model).to(dtype), c, 3) == told


def test_activations_are_what_the_kernels_save():
    c, more = (configured(seq_len=128, kernels="triton", n_layer=n) for n in (1, 2))
    saved = [saved_for_backward(Phi(x.model, triton=True).half(), x, 1) for x in (c, more)]
    assert saved[1] - saved[0] == 128 * plan.saved_bytes(c.model)


def train_two_steps(c: plan.Config, model: Phi) -> None:
    optimizer = make_optimizer(model, c)
    micro_steps = c.seqs_per_step // (c.micro_batch * c.gpus)
    for _ in range(2):
        for micro_step in range(micro_steps):
            if c.gpus > 1:
                last = micro_step == micro_steps - 1
                model.set_requires_gradient_sync(last)
                model.set_is_last_backward(last)
                model.set_reshard_after_backward(last or c.regather)
            model(batch(c, c.micro_batch), batch(c, c.micro_batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("shape", "values", "at_most"),
    [
        ("deep", {}, 1.02),
        ("wide vocabulary", {}, 1.01),
        ("heavy", {}, 1.04),
        ("deep", {"recompute": True}, 1.1),
        ("deep", {"kernels": "triton", "seq_len": 128, "n_layer": 1, "micro_batch": 1,
                  "seqs_per_step": 1}, 1.25),  # interpreted, and slow; counts gradients of before
    ],
)  # fmt: skip
def test_memory_of_one_process(shape, values, at_most):
    c = configured(shape, **values)
    with Allocated() as allocated:
        train_two_steps(c, Phi(c.model, c.kernels == "triton", c.recompute))
    assert 0.995 < sum(plan.memory(c, c.micro_batch).values()) / allocated.peak < at_most


@pytest.fixture
def fake_ranks():
    """fake_ranks(n): this process as rank 0 of n, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    yield lambda n: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "values", "at_most"),
    [
        ("deep", {}, 1.01),
        ("wide vocabulary", {}, 1.01),
        ("heavy", {}, 1.07),
        ("heavy", {"seqs_per_step": 24}, 1.12),  # nothing to accumulate
        ("heavy", {"regather": True}, 1.08),
        ("deep", {"gpus": 16}, 1.01),
        ("deep", {"gpus": 16, "shard": 16}, 1.01),
    ],
)
def test_memory_and_collectives_of_fsdp(fake_ranks, shape, values, at_most):
    c = {"gpus": 8, "dtype": "bfloat16", "micro_batch": 3, "seqs_per_step": 96} | values
    c = configured(shape, **c)
    S, R, steps = c.shards, c.gpus // c.shards, 2
    fake_ranks(c.gpus)
    mesh = init_device_mesh("cpu", (R, S), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    wrap = partial(fully_shard, mesh=mesh if R > 1 else mesh["shard"], mp_policy=policy)
    with Allocated() as allocated:
        model = Phi(c.model)
        for block in model.blocks:
            wrap(block, reshard_after_forward=c.regather)
        wrap(model, reshard_after_forward=False)
        allocated.peak = 0
        train_two_steps(c, model)
    assert 0.995 < sum(plan.memory(c, c.micro_batch).values()) / allocated.peak < at_most
    told, moved, times = plan.simulate(c, c.micro_batch, 1.0, GPUS["a100-80"]), Counter(), Counter()
    for name, n_bytes in allocated.collectives:
        moved[name] += n_bytes / steps
        times[name] += 1 / steps
    a_rank = (S - 1) / S  # it has its own part; a reduction over replicas sends twice
    near = partial(pytest.approx, rel=0.02)  # a dimension that S does not divide is padded
    assert told["gathers"]["bytes"] == near(moved["allgather_base"] * a_rank)
    assert told["scatters"]["bytes"] == near(moved["reduce_scatter_base"] * a_rank)
    assert told["reduces"]["bytes"] == near(2 * moved["allreduce"] * (R - 1) / R)
    micro_steps, L = told["micro_steps"], c.n_layer
    gathers = micro_steps * (2 * L + 1) if c.regather else L + 1
    assert times["allgather_base"] == gathers
    assert times["reduce_scatter_base"] == L + 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_memory_on_a_gpu(kernels):
    values = {"vocab_size": 8192, "seq_len": 512, "width": 512, "mlp_width": 2048, "n_head": 8}
    c = configured(**values, n_layer=6, dtype="float32", kernels=kernels)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        train_two_steps(c, Phi(c.model, kernels == "triton"))
    peak = torch.cuda.max_memory_allocated() - before
    assert sum(plan.memory(c, c.micro_batch).values()) == pytest.approx(peak, rel=0.15)


def test_memory_of_phi1():
    """Against docs of the project's own: 18 bytes a parameter alone, 29 GB of activations."""
    alone = plan.memory(parse(plan.Config, [PHI1, "--gpus=1"], toml=True), 16)
    kinds = ("weights", "masters", "Adam's states", "gradients")
    assert sum(alone[kind] for kind in kinds) == 18 * 1_418_270_720
    assert alone["activations"] == pytest.approx(29e9, rel=0.02)
    for gpu, fits in (("a100-80", 16), ("a100-40", 8)):
        c = parse(plan.Config, [PHI1, f"--gpu={gpu}"], toml=True)
        assert plan.micro_batches(c)[0] == fits
        assert sum(plan.memory(c, fits).values()) < GPUS[gpu].memory
        assert sum(plan.memory(c, 64).values()) > GPUS[gpu].memory
    assert plan.micro_batches(dataclasses.replace(c, recompute=True))[0] == 16


def test_collectives_by_hand():
    gpu = Gpu("a100", 0, 0, nvlink=100e9, network=10e9)
    GB = 1e9
    assert collective_s(GB, 1, 1, 1, gpu) == 0
    in_a_node = START_S + 7 * NVLINK_HOP_S + 7 / 8 / 100
    assert collective_s(GB, 8, 1, 1, gpu) == pytest.approx(in_a_node)
    # Sixteen on two nodes: each node sends over eight cards, 80 of NVLink's 100 GB/s.
    ring = START_S + 14 * NVLINK_HOP_S + NETWORK_HOP_S + 15 / 16 / 80
    assert collective_s(GB, 16, 2, 1, gpu) == pytest.approx(ring)
    # One GPU of each of 64 nodes: a ring for much, a tree for little.
    ring = START_S + 126 * NETWORK_HOP_S + 2 * 63 / 64 / 10
    assert collective_s(GB, 64, 64, 2, gpu) == pytest.approx(ring)
    assert collective_s(4, 64, 64, 2, gpu) == pytest.approx(START_S + 12 * NETWORK_HOP_S, rel=1e-3)


def test_the_step():
    c = parse(plan.Config, [BASE, "--gpus=64"], toml=True)
    gpu = GPUS["a100-80"]
    now = plan.simulate(c, 16, 0.8, gpu)
    fast = dataclasses.replace(gpu, nvlink=1e15, network=1e15)
    assert plan.simulate(c, 16, 0.8, fast)["exposed_s"] < 2e-3  # the hops of the first and last
    # Between nodes so slow that nothing else counts: the backward has begun when reductions do.
    slow = plan.simulate(c, 16, 0.8, dataclasses.replace(gpu, network=1e6))
    sent_s = slow["reduces"]["bytes"] / 1e6
    assert slow["exposed_s"] == pytest.approx(sent_s, rel=0.01)
    assert slow["reduces"]["s"] == pytest.approx(sent_s, rel=0.01)
    # All that is communicated could at worst wait, and the root's share cannot be hidden.
    worst = sum(now[name]["s"] for name in ("gathers", "scatters", "reduces"))
    assert 0 < now["exposed_s"] < worst / 2
    # Copies in one node are reduced over NVLink.
    one_node = dataclasses.replace(c, gpus=8, shard=1)
    units, L = plan.parameters_by_unit(c.model), c.n_layer
    reduces_s = [n * collective_s(4 * p, 8, 1, 2, gpu) for n, p in zip((L, 1), units)]
    assert plan.simulate(one_node, 16, 0.8, gpu)["reduces"]["s"] == pytest.approx(sum(reduces_s))
    assert plan.scaling(one_node, 16, 0.8) == plan.scaling(c, 16, 0.8)  # always sharded in a node
    # On one node a step has eight micro-steps. Gathering for each use waits for the root and a
    # block in each; computing blocks again costs a third of their time.
    c = dataclasses.replace(c, gpus=8)
    now, regather, recompute = (
        plan.simulate(dataclasses.replace(c, **option), 16, 0.8, gpu)
        for option in ({}, {"regather": True}, {"recompute": True})
    )
    waits_s = sum(collective_s(2 * n, 8, 1, 1, gpu) for n in units)
    assert regather["step_s"] - now["step_s"] == pytest.approx(7 * waits_s)
    assert 1.2 < recompute["step_s"] / now["step_s"] < 1.33


def test_speed_of_what_was_published():
    """phi-1: 770 h for 50.3B tokens; and, which is no input, 7 hours on eight GPUs to finetune."""
    speeds = plan.report(parse(plan.Config, [BASE, "--max_steps=24000"], toml=True))["speeds"]
    assert speeds[0]["gpu_hours"] == pytest.approx(770, rel=0.01)
    assert [s["hours"] for s in speeds] == sorted((s["hours"] for s in speeds), reverse=True)
    finetune = plan.report(parse(plan.Config, [PHI1], toml=True))
    assert finetune["speeds"][0]["hours"] == pytest.approx(7, rel=0.2)


@pytest.mark.parametrize("name", ["phi1", "phi1_base", "phi1_small", "phi1_small_base"])
def test_printed(name, capsys, monkeypatch, tokens):
    argv = ["plan", f"configs/{name}.toml", "--gpu=h100", "--price=2.5", f"--data={tokens}"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", argv)
    plan.main()
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if str(tokens) not in line]
    assert max(map(len, lines)) <= 100
    assert f"{parameter_count(parse(plan.Config, argv[1:], toml=True).model):,} parameters" in text
    monkeypatch.setattr("sys.argv", [*argv, "--json"])
    plan.main()
    r = json.loads(capsys.readouterr().out)
    assert r["tokens_at_hand"] > 0
    assert r["epochs"] > r["tokens"] / r["tokens_at_hand"]  # the ends of shards are left out
    assert r["expected"]["cost"] == pytest.approx(2.5 * r["expected"]["gpu_hours"])
    assert f"{r['expected']['cost']:,.0f}" in text
    gpus = [s["gpus"] for s in r["scaling"]]
    assert gpus == [8, 16, 32, 64, 128, 256, 512][: len(gpus)]
    assert all(
        s["gpus"] * s["micro_batch"] * s["micro_steps"] == c_seqs(name) for s in r["scaling"]
    )


def c_seqs(name: str) -> int:
    return 1024 if name.endswith("base") else 256


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu=v100", "gpu is 'v100', want one of a100-40, a100-80, h100, h200"),
        ("--gpus=7", "gpus is 7, want a divisor of 256"),
        ("--shard=3", "shard is 3, want a divisor of 8"),
        ("--seqs_per_step=24 --gpus=12", "gpus is 12"),
    ],
)
def test_bad_plans(flags, message):
    with pytest.raises(UserError, match=message):
        parse(plan.Config, [PHI1, *flags.split()], toml=True)


def test_what_does_not_fit(capsys, monkeypatch):
    flags = ["--n_layer=200", "--gpus=1", "--gpu=a100-40"]
    monkeypatch.setattr("sys.argv", ["plan", PHI1, *flags])
    plan.main()
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_score_of_a_run(cli, tiny, tokens, tmp_path):
    run = tmp_path / "run"
    flags = [f"--data={tokens}", f"--out={run}", "--max_steps=8", "--eval_interval=8"]
    done = cli("train.py", *tiny, *flags, "--log_interval=2", "--threads=1", "--keep=1")
    assert done.returncode == 0, done.stderr
    r = plan.score(run)
    told, happened = zip(*(r["rows"][name] for name in ("parameters", "steps")))
    assert told == happened
    weights, files = r["rows"]["checkpoint, MB"]
    assert files == pytest.approx(weights, rel=0.5)  # of a tiny model, beside its tokenizer
    assert r["fraction"] == pytest.approx(r["rows"]["MFU, median"][1], rel=0.05)  # one process
    assert "reached" in plan.show_score(r)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text('{"step": 2, "tok')
    with pytest.raises(UserError, match="no line with tokens_per_s"):
        plan.score(run)
    with pytest.raises(UserError, match=r"nowhere/config\.json: No such file"):
        plan.score(tmp_path / "nowhere")


def test_a_score_is_the_next_plan(tmp_path):
    """The fraction that a run on GPUs reached predicts that run."""
    c = parse(plan.Config, [BASE, "--gpu=a100-40"], toml=True)
    ran = {k: v for k, v in dataclasses.asdict(c).items() if isinstance(v, (int, float, str))}
    ran |= {"device": "NVIDIA A100-SXM4-40GB", "world_size": 8, "parameters": 1, "roof": ""}
    (tmp_path / "config.json").write_text(json.dumps(ran))
    line = {"step": 10, "tokens_per_s": 140e3, "mfu": 0.47, "seconds": 150, "memory_gib": 30}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    r = plan.score(tmp_path)
    again = plan.report(dataclasses.replace(c, fraction=r["fraction"]))
    assert again["expected"]["tokens_per_s"] == pytest.approx(140e3, rel=1e-3)
    assert r["rows"]["memory, GB"][1] == pytest.approx(30 * 2**30 / 1e9)
