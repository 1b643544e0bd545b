"""Plan: memory against torch's and FSDP2's allocations, step and speeds by hand."""

import dataclasses
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import plan
from bench.cost import GPUS, NETWORK_HOP_S, NVLINK_HOP_S, START_S, Gpu, collective_s
from common.config import UserError, parse
from common.memory import Allocated
from model import Phi
from train import make_optimizer

ROOT = Path(__file__).parents[2]
# Each shape has another largest kind of memory: activations, logits, weights.
SHAPES = {
    "deep": {"vocab_size": 96, "seq_len": 64, "n_layer": 5, "n_head": 2, "width": 64},
    "wide vocabulary": {"vocab_size": 4096, "seq_len": 32, "n_layer": 2, "n_head": 2, "width": 64},
    "heavy": {"seq_len": 16, "n_layer": 3, "n_head": 2, "width": 128, "mlp_width": 640},
}


def job(name: str, gpu: str = "a100-80", gpus: int = 8, **changes) -> plan.Config:
    c = parse(plan.Config, [str(ROOT / "configs" / f"{name}.toml")], toml=True)
    return dataclasses.replace(c, gpu=gpu, gpus=gpus, **changes)


def configured(shape: str = "deep", **values) -> plan.Config:
    c = {"vocab_size": 64, "mlp_width": 200, "rotary_dim": 8, "seqs_per_step": 8, "micro_batch": 4}
    c |= {"gpus": 1, "kernels": "torch", "dtype": "float32"}
    return plan.Config(**c | SHAPES[shape] | values)


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
            idx = torch.randint(c.vocab_size, (2, c.micro_batch, c.seq_len))
            model(*idx.unbind()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("shape", "values", "at_most"),
    [
        ("wide vocabulary", {}, 1.01),
        ("heavy", {}, 1.04),
        ("heavy", {"optimizer": "muon", "qk_norm": True}, 1.04),
        ("deep", {"recompute": True}, 1.1),
        ("deep", {"kernels": "triton", "n_layer": 1, "micro_batch": 1, "seqs_per_step": 1}, 1.3),
    ],
)
def test_memory_of_one_process(shape, values, at_most):
    c = configured(shape, **values)
    with Allocated() as allocated:
        train_two_steps(c, Phi(c.model, c.kernels == "triton", c.recompute))
    assert 0.995 < sum(plan.memory(c, c.micro_batch).values()) / allocated.peak < at_most


class Collectives(Allocated):
    """Memory tracker that also records collective names."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if "c10d" in str(f):
            self.called.append(str(f).split(".")[1].strip("_"))
        return super().__torch_dispatch__(f, types, args, kwargs)


@pytest.mark.parametrize(
    ("shape", "values", "at_most"),
    [
        ("wide vocabulary", {}, 1.01),
        ("heavy", {"seqs_per_step": 24}, 1.12),  # nothing to accumulate
        ("heavy", {"regather": True}, 1.08),
        ("deep", {"gpus": 16}, 1.01),
        ("heavy", {"optimizer": "muon"}, 1.08),
    ],
)
def test_memory_and_collectives_of_fsdp(request, shape, values, at_most):
    """Run as rank 0 of a fake process group: collectives return at once."""
    c = {"gpus": 8, "dtype": "bfloat16", "micro_batch": 3, "seqs_per_step": 96} | values
    c = configured(shape, **c)
    S, R, steps = c.shards, c.gpus // c.shards, 2
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=c.gpus)
    request.addfinalizer(dist.destroy_process_group)
    mesh = init_device_mesh("cpu", (R, S), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    wrap = partial(fully_shard, mesh=mesh if R > 1 else mesh["shard"], mp_policy=policy)
    with Collectives() as allocated:
        model, allocated.called = Phi(c.model), []
        for block in model.blocks:
            wrap(block, reshard_after_forward=c.regather)
        wrap(model, reshard_after_forward=False)
        allocated.peak = 0
        train_two_steps(c, model)
    assert 0.995 < sum(plan.memory(c, c.micro_batch).values()) / allocated.peak < at_most
    times = {k: n / steps for k, n in Counter(allocated.called).items()}
    micro_steps, L = c.seqs_per_step // (c.micro_batch * c.gpus), c.n_layer
    gathers = micro_steps * (2 * L + 1) if c.regather else L + 1
    assert times["allgather_base"] == gathers  # as step_time() assumes
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
    """Check the documented 18 bytes a parameter on one GPU and 29 GB of activations."""
    alone = plan.memory(job("phi1", gpus=1), 16)
    kinds = ("weights", "masters", "optimizer's states", "gradients")
    assert sum(alone[kind] for kind in kinds) == 18 * 1_418_270_720
    assert alone["activations"] == pytest.approx(29e9, rel=0.02)
    for gpu, fits in (("a100-80", 16), ("a100-40", 8)):
        assert plan.micro_batches(job("phi1", gpu))[0] == fits
    assert plan.micro_batches(job("phi1", "a100-40", recompute=True))[0] == 16


def test_collectives_by_hand():
    gpu = Gpu("a100", 0, 0, nvlink=100e9, network=10e9)
    GB = 1e9
    assert collective_s(GB, 1, 1, 1, gpu) == 0
    in_a_node = START_S + 7 * NVLINK_HOP_S + 7 / 8 / 100
    assert collective_s(GB, 8, 1, 1, gpu) == pytest.approx(in_a_node)
    # Sixteen on two nodes: eight network cards a node, 80 of NVLink's 100 GB/s.
    ring = START_S + 14 * NVLINK_HOP_S + NETWORK_HOP_S + 15 / 16 / 80
    assert collective_s(GB, 16, 2, 1, gpu) == pytest.approx(ring)
    # One GPU on each of 64 nodes: ring for large messages, tree for small.
    ring = START_S + 126 * NETWORK_HOP_S + 2 * 63 / 64 / 10
    assert collective_s(GB, 64, 64, 2, gpu) == pytest.approx(ring)
    assert collective_s(4, 64, 64, 2, gpu) == pytest.approx(START_S + 12 * NETWORK_HOP_S, rel=1e-3)


def test_the_step():
    c, gpu, replace = job("phi1_base", gpus=64), GPUS["a100-80"], dataclasses.replace
    fast = replace(gpu, nvlink=1e15, network=1e15)
    assert plan.step_time(c, 16, 0.8, fast)[1] < 2e-3  # hops of the first and last collective
    # Network so slow that only reductions count: they start during the backward.
    _, exposed_s = plan.step_time(c, 16, 0.8, replace(gpu, network=1e6))
    sent_s = 8 * 1_418_270_720 / 8 * 7 / 8 / 1e6  # an eighth of the gradients, over eight nodes
    assert exposed_s == pytest.approx(sent_s, rel=0.01)
    # On one node a step has eight micro-steps. Regathering waits for the root and a block in each;
    # recomputing blocks costs a third of their time.
    c, units = replace(c, gpus=8), plan.parameters_by_unit(c.model)
    now, regather, recompute = (
        plan.step_time(replace(c, **option), 16, 0.8, gpu)[0]
        for option in ({}, {"regather": True}, {"recompute": True})
    )
    waits_s = sum(collective_s(2 * n, 8, 1, 1, gpu) for n in units)
    waits_s = 7 * waits_s + 8 * collective_s(2 * units[0], 8, 1, 1, gpu)
    assert regather - now == pytest.approx(waits_s)
    assert 1.2 < recompute / now < 1.33


def test_speed_of_what_was_published():
    """phi-1: 770 h for 50.3B tokens; and, which is no input, 7 hours on eight GPUs to finetune."""
    for name, steps, hours, rel in (("phi1_base", 24000, 770 / 8, 0.01), ("phi1", 6000, 7, 0.2)):
        c = job(name)
        _, rate = plan.speeds(c, 16)["phi-1"]
        told = steps * c.seqs_per_step * c.seq_len / rate / 3600
        assert told == pytest.approx(hours, rel=rel)


def test_printed(in_process):
    flags = [str(ROOT / "configs/phi1_base.toml"), "--gpu=a100-80", "--gpus=8", "--price=1.8"]
    status, text, _ = in_process(plan.main, *flags)
    assert status == 0
    assert "1,418,270,720 parameters" in text
    assert re.search(r"total +42\.86\n", text)
    costs = re.findall(r"^  (?:phi-1|Flash).* ([\d.]+) +([\d,.]+) +([\d,]+)$", text, re.MULTILINE)
    assert costs == [("144.3", "1,155", "2,079"), ("121.7", "973.5", "1,752")]  # README's
    scaling = re.findall(r"^ +(\d+) +(\d+) +(\d+) .*%$", text, re.MULTILINE)
    assert [int(gpus) for gpus, *_ in scaling] == [8, 16, 32, 64, 128, 256, 512]
    assert all(int(a) * int(b) * int(c) == 1024 for a, b, c in scaling)


def test_bad_plans():
    for values, message in (
        ({"gpu": "v100"}, "gpu is 'v100', want one of a100-40, a100-80, h100, h200"),
        ({"gpus": 7}, "gpus is 7, want a divisor of 256"),
        ({"shard": 3}, "shard is 3, want a divisor of 8"),
    ):
        with pytest.raises(UserError, match=message):
            job("phi1", **values)


def write_run(folder, c, **ran):
    ran = {k: v for k, v in dataclasses.asdict(c).items() if isinstance(v, (int, float, str))} | ran
    (folder / "config.json").write_text(json.dumps(ran | {"parameters": 1}))
    line = {"step": 10, "tokens_per_s": 140e3, "mfu": 0.47, "seconds": 150, "memory_gib": 30}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_score_is_the_next_plan(tmp_path):
    """A GPU run's measured fraction predicts that run."""
    c = job("phi1_base", "a100-40")
    write_run(tmp_path, c, device="NVIDIA A100-SXM4-40GB", world_size=8, roof="")
    rows, fraction, _ = plan.score(tmp_path)
    c = dataclasses.replace(c, fraction=fraction)
    again = plan.speeds(c, plan.micro_batches(c)[0])["--fraction"]
    assert again == (fraction, pytest.approx(140e3, rel=1e-3))
    assert rows["memory, GB"][1] == pytest.approx(30 * 2**30 / 1e9)


def test_score_on_a_cpu(tmp_path):
    write_run(tmp_path, job("phi1"), device="cpu", world_size=2, roof="x, 2.5 TFLOP/s")
    rows, fraction, _ = plan.score(tmp_path)
    assert fraction == pytest.approx(140e3 * 8.481e9 / 5e12, rel=1e-3)
    assert rows["tokens/s, median"] == (pytest.approx(0.345 * 5e12 / 8.481e9, rel=1e-3), 140e3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "tok')
    with pytest.raises(UserError, match="no line with tokens_per_s"):
        plan.score(tmp_path)
    with pytest.raises(UserError, match=r"nowhere/config\.json: No such file"):
        plan.score(tmp_path / "nowhere")
