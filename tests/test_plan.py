"""The plan: its memory against what torch and FSDP2 allocate, its step and its speeds by hand."""

import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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
    "deep": dict(vocab_size=96, seq_len=64, n_layer=5, n_head=4, width=64, mlp_width=200),
    "wide vocabulary": dict(vocab_size=4096, seq_len=32, n_layer=2, n_head=2, width=48),
    "heavy": dict(vocab_size=64, seq_len=16, n_layer=3, n_head=2, width=128, mlp_width=640),
}


def configured(shape: str = "deep", **values) -> plan.Config:
    c = {"mlp_width": 192, "rotary_dim": 8, "gpus": 1, "kernels": "torch", "dtype": "float32"}
    return plan.Config(**{**c, **SHAPES[shape], "seqs_per_step": 8, "micro_batch": 4, **values})


class Allocated(TorchDispatchMode):
    """Bytes of all storages that torch made while it was on and that are alive; and the most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.collectives = weakref.WeakSet(), 0, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.alive.update(t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t))
        self.peak = max(self.peak, sum(s.nbytes() for s in self.alive))
        if "c10d" in str(f):
            sizes = [t.nbytes for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            self.collectives.append((str(f).split(".")[1].strip("_"), max(sizes)))
        return out


def batch(c: plan.Config, n: int) -> torch.Tensor:
    return torch.randint(0, c.vocab_size, (n, c.seq_len))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_torch_saves_for_backward(shape, dtype):
    c, model = configured(shape), Phi(configured(shape).model).to(dtype)
    model.cos, model.sin = model.cos.float(), model.sin.float()
    idx, targets = batch(c, 3), batch(c, 3)
    ours = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), idx, targets]}
    saved = {}

    def keep(t):
        saved[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(idx, targets)
    found = sum(s.nbytes() for at, s in saved.items() if at not in ours)
    N, n_bytes = idx.numel(), dtype.itemsize
    block, head = plan.saved_bytes(c.model, "torch", n_bytes)
    told = N * (c.n_layer * block + head + 2 * n_bytes * c.width + 8)
    # On a CPU, LayerNorm's statistics are of the model's dtype; a loss has a scalar to divide by.
    assert told - found == N * 2 * (4 - n_bytes) * (c.n_layer + 1) - 4
