"""The plan: its memory against what torch and FSDP2 allocate, its step and its speeds by hand."""

import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import plan
from config import UserError, parse
from kernels.roofline import GPUS, NETWORK_HOP_S, NVLINK_HOP_S, START_S, Gpu, collective_s
from model import ModelConfig, Phi, parameter_count
from train import make_optimizer

ROOT = Path(__file__).parents[1]
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
    saved = [saved_for_backward(Phi(x.model).half(), x, 1) for x in (c, more)]
    a_head = 2 * 4 * c.n_head  # the largest |k| and |v|
    assert saved[1] - saved[0] == 128 * plan.saved_bytes(c.model) + a_head


def train_two_steps(c: plan.Config, model: Phi) -> None:
    optimizer = make_optimizer(model, c)
    micro_steps = c.seqs_per_step // (c.micro_batch * c.gpus)
    for _ in range(2):
        for micro_step in range(micro_steps):
            if c.gpus > 1:  # as a sharded train.py does
                last = micro_step == micro_steps - 1
                model.set_requires_gradient_sync(last)
                model.set_is_last_backward(last)
                model.set_reshard_after_backward(last or c.regather)
            model(batch(c, c.micro_batch), batch(c, c.micro_batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


TRITON = {"kernels": "triton", "seq_len": 32, "n_layer": 2, "vocab_size": 128}  # interpreted


@pytest.mark.parametrize(
    ("shape", "values", "less", "more"),
    [
        ("deep", {}, 1.0, 1.01),
        ("wide vocabulary", {}, 1.0, 1.01),
        ("heavy", {}, 1.0, 1.12),
        ("heavy", {"seqs_per_step": 4}, 1.0, 1.12),
        ("deep", {"recompute": True}, 1, 1),
        ("deep", TRITON, 1.0, 1.15),
    ],
)
def test_memory_of_one_process(shape, values, less, more):
    c = configured(shape, **values)
    with Allocated() as allocated:
        train_two_steps(c, Phi(c.model))
    told = sum(plan.memory(c, c.micro_batch).values())
    print(shape, values, told/allocated.peak, plan.memory(c, c.micro_batch))


@pytest.fixture
def fake_ranks():
    """fake_ranks(n): this process as rank 0 of n, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    yield lambda n: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("deep", {}),
        ("wide vocabulary", {}),
        ("heavy", {}),
        ("deep", {"gpus": 16}),
        ("deep", {"gpus": 16, "shard": 16}),
        ("deep", {"regather": True}),
        ("heavy", {"regather": True}),
        ("heavy", {"seqs_per_step": 24}),
        ("deep", TRITON),
    ],
)
def test_memory_and_collectives_of_fsdp(fake_ranks, shape, values):
    c = {"gpus": 8, "dtype": "float16", "micro_batch": 3, "seqs_per_step": 96}
    c = configured(shape, **c | values)
    fake_ranks(c.gpus)
    mesh = init_device_mesh("cpu", (c.gpus // c.shards, c.shards), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(torch.float16, torch.float32, cast_forward_inputs=False)
    with Allocated() as allocated:
        model = Phi(c.model)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=c.regather)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        allocated.peak = 0
        train_two_steps(c, model)
    told = sum(plan.memory(c, c.micro_batch).values())
    print(shape, values, told/allocated.peak, plan.memory(c, c.micro_batch))
    from collections import Counter
    moved=Counter()
    for k,n in allocated.collectives: moved[k]+=n
    s=plan.simulate(c, c.micro_batch, 1.0, GPUS["a100-80"])
    print({k:v/2 for k,v in moved.items()}, Counter(k for k,_ in allocated.collectives), s["gathers"],s["scatters"],s["reduces"])
