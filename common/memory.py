"""Predict and measure the device memory of a training step.

`predict` counts it by kind, also for bench.plan. `check` (train.py --check) compares it with real
steps. A GPU's allocator reports the peak; on a CPU `Allocated` sums the tensors that torch's
operators return. It misses scratch memory inside an operator (matmuls, attention), gloo's buffers,
and allocations by other threads (the loader's batches).
"""

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.config import UserError

CHUNK_ROWS = 8192  # rows of logits the fused loss holds at once
RESERVE_BYTES = 4e9  # assumed, for the CUDA context, NCCL and cuBLAS buffers, fragmentation


def saved_bytes(c, n_bytes: int = 2) -> int:
    """Return the bytes per token a block saves for backward, at `n_bytes` per element."""
    C, M, statistics_bytes = c.width, c.mlp_width, 4 * c.n_head + 8
    if c.kernels == "torch":  # also the outputs of LayerNorm, GELU and rotary, and dropout masks
        norms = (2 * n_bytes * C + 16 * c.n_head) * c.qk_norm
        return n_bytes * (9 * C + 2 * M) + norms + (2 * C if c.dropout else 0) + statistics_bytes
    return n_bytes * (5 * C + M) + statistics_bytes + C // 16  # see kernels/block.py


def predict(
    c, units: tuple[int, int], micro_batch: int, ranks: int, shards: int, b: int
) -> dict[str, int]:
    """Predict a rank's peak device memory in a step: return bytes by kind.

    c        a train.TrainConfig
    units    parameters in one block, and outside all blocks
    shards   ranks that share one copy of masters and states
    b        bytes per element in the compute dtype
    """
    N, C, M, V = micro_batch * c.seq_len, c.width, c.mlp_width, c.vocab_size
    (block, root), P = units, c.n_layer * units[0] + units[1]
    saved = N * saved_bytes(c, b)
    matrices = 2 * C * (2 * C + M) if c.optimizer == "muon" else 0  # elements per block
    activations = (c.n_layer * (N * b * C if c.recompute else saved)) + N * (b * 2 * C + 8)
    if c.kernels == "torch":  # fp32 log-probabilities and two gradients of that size
        logits, head_bwd, block_bwd = 12 * N * V, 0, b * (block + N * (C + M))
    else:  # one chunk plus dx and dw; dqkv|du, a, da, dy, out's gradient and two dropped ones
        logits, head_bwd = b * min(N, CHUNK_ROWS) * V, 4 * V * C + b * N * C
        block_bwd = 4 * block + b * N * (7 * C + 3 * M)
    if c.matmul == "fp8":  # dqkvu and w_in, in both layouts
        block_bwd += 2 * (N + C) * (3 * C + M)
    buffers = max(head_bwd, block_bwd + saved * c.recompute - logits)  # reuses the logits' space
    # Momenta and updates of a few blocks, and Gram matrices, once the rest is freed.
    muon = b * (6 * matrices + 2 * C * C) if matrices else 0
    weights = b * (2 * block + root if c.regather else P)
    weights *= b == 2 or ranks > 1  # a single fp32 process computes with the masters
    buffers = max(buffers, muon - activations - logits - weights)
    on_their_way = (4 + b) * (block + root) * (ranks > 1)  # two units being gathered or reduced
    whole = ranks == 1 or c.seqs_per_step > micro_batch * ranks  # gradients accumulate unsharded
    return {
        "weights": weights,
        "masters": 4 * P // shards,
        "optimizer's states": (8 * P - 4 * c.n_layer * matrices) // shards,
        "gradients": 4 * P // (1 if whole else shards),
        "activations": activations,
        "logits": logits,
        "buffers": buffers,
        "communication": max(0, on_their_way - activations - logits - buffers),  # as those free up
    }


def largest(share: int, room: float, needed: Callable[[int], float] = lambda n: n) -> int:
    """Return the largest divisor n of `share` with needed(n) <= room, or 0 if there is none."""
    fits = (n for n in range(share, 0, -1) if share % n == 0 and needed(n) <= room)
    return next(fits, 0)


class Allocated(TorchDispatchMode):
    """Dispatch mode that tracks live bytes (`now()`, `peak`) of `tensors` and all new tensors."""

    def __init__(self, tensors=()):
        super().__init__()
        self.alive = WeakSet(_local(t).untyped_storage() for t in tensors)
        self.peak = self.now()

    def now(self) -> int:
        return sum(s.nbytes() for s in self.alive)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        made = [_local(t) for t in tree_leaves(out) if torch.is_tensor(t)]
        self.alive.update(t.untyped_storage() for t in made)
        self.peak = max(self.peak, self.now())
        return out


def _local(t: torch.Tensor) -> torch.Tensor:
    return getattr(t, "_local_tensor", t)


def _bytes(tensors) -> int:
    return sum(_local(t).nbytes for t in tensors)


def there_is(ranks) -> int:
    """Return the bytes of this rank's GPU, or its share of this machine's free memory."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[1]
    free_kib = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]
    return int(free_kib) * 1024 // ranks.local_world_size


def measure(step: Callable[[], object], model, optimizer, ranks) -> dict[str, int]:
    """Take a step; return bytes by kind, and "peak", each the maximum over the ranks.

    Count gathered weights at the end of a forward, when `regather` has freed the blocks'. Measure
    accumulated gradients as what a micro-step leaves behind: FSDP2 stores them in no parameter.
    """
    parameters, gpu = list(model.parameters()), ranks.device.type == "cuda"
    states = [t for state in optimizer.state.values() for t in state.values()]
    counted = Allocated([*parameters, *model.buffers(), *states])
    now = torch.cuda.memory_allocated if gpu else counted.now
    found = {"weights": 0, "masters": _bytes(parameters), "optimizer's states": _bytes(states),
             "gradients": 0}  # fmt: skip
    sharded, before = isinstance(parameters[0], DTensor), now()

    def note(kind: str, n_bytes: int) -> None:
        found[kind] = max(found[kind], n_bytes)

    def gathered() -> int:
        return sharded * _bytes(p for p in model.parameters() if not isinstance(p, DTensor))

    def between(*_) -> None:  # between micro-steps, before FSDP2 gathers
        note("gradients", now() - before - gathered())

    hooks = [
        model.register_forward_pre_hook(between, prepend=True),
        model.register_forward_hook(lambda *_: note("weights", gathered())),
        optimizer.register_step_pre_hook(
            lambda *_: note("gradients", _bytes(p.grad for p in parameters))
        ),
    ]
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.nullcontext() if gpu else counted:
        step()
    for hook in hooks:
        hook.remove()
    found["peak"] = torch.cuda.max_memory_allocated() if gpu else counted.peak
    most = torch.tensor(list(found.values()), device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(found, most.tolist()))


def expected(n: int, peaks: dict[int, int], predicted: Callable[[int], dict[str, int]]) -> float:
    """Estimate the bytes of a step with micro-batches of n, from the peaks of up to two others.

    Fit a line through two, without gradients: those are unsharded only while they accumulate.
    """
    if len(peaks) < 2:
        off = sum(peak - sum(predicted(m).values()) for m, peak in peaks.items())
        return sum(predicted(n).values()) + off
    low, high = sorted(peaks)
    at_low, at_high = (peaks[m] - predicted(m)["gradients"] for m in (low, high))
    per_sequence = (at_high - at_low) / (high - low)
    return at_high + (n - high) * per_sequence + predicted(n)["gradients"]


def check(c, ranks, dtype: torch.dtype, model, optimizer, loader, take_step: Callable) -> None:
    """Take steps; print measured and predicted memory, and the largest micro-batch that fits.

    take_step(batches, micro_steps) is the training step, run at lr 0 so that weights do not change.
    Raise UserError if it does not fit, or if the loss or gradients are not finite.
    """
    gpu, N = ranks.device.type == "cuda", loader.micro_batch
    share, shards = N * loader.micro_steps, c.shard or ranks.local_world_size
    block, P = (sum(p.numel() for p in m.parameters()) for m in (model.blocks[0], model))
    units, c = (block, P - c.n_layer * block), replace(c, kernels=("torch", "triton")[model.triton])
    taken = 0 if gpu else _bytes(model.parameters())  # already allocated, so not in MemAvailable
    stream, peaks, room = loader.stream(0), {}, ranks.from_first(lambda: there_is(ranks) + taken)
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    predicted = partial(predict, c, units, ranks=ranks.world_size, shards=shards, b=dtype.itemsize)
    needed = partial(expected, peaks=peaks, predicted=predicted)

    def fits(most: int = share) -> int:
        left = room - RESERVE_BYTES * gpu
        return largest(share, left, lambda n: needed(n) if n <= most else math.inf)

    def too_large(n: int) -> UserError:
        ways = [f"--micro_batch={fits(n - 1)}"] * (fits(n - 1) > 0)
        ways += ["--recompute"] * (not c.recompute) or ["a smaller model"]
        took = "".join(f"; {m} took {peak / 1e9:,.4g} GB" for m, peak in peaks.items())
        return UserError(f"micro_batch {n} does not fit: needs about {needed(n) / 1e9:,.4g} GB of "
                         f"{room / 1e9:,.4g}{took}; try {' or '.join(ways)}")  # fmt: skip

    def step(n: int) -> tuple[float, int]:
        """Take a step of at most two micro-batches of n; return its loss and tokens."""
        micro_steps = min(2, share // n)
        batches = ({k: x[:n] for k, x in batch.items()} for batch in stream)
        loss, norm = (x.item() for x in take_step(batches, micro_steps)[:2])
        if not math.isfinite(loss) or not (math.isfinite(norm) or dtype == torch.float16):
            raise UserError(f"the loss is {loss}, the gradient norm {norm}; try --dtype=float32")
        return loss, micro_steps * n * ranks.world_size * c.seq_len

    for n in sorted({1, N}):
        if not gpu and needed(n) > room:  # on a CPU, running out of memory kills the process
            raise too_large(n)
        try:
            step(n)  # the first step allocates the optimiser states
            found = measure(lambda: step(n), model, optimizer, ranks)  # noqa: B023
            began = time.perf_counter()
            loss, tokens = step(n)
        except torch.OutOfMemoryError:
            raise too_large(n) from None
        seconds = time.perf_counter() - began
        peaks[n] = found.pop("peak")
        if peaks[n] > room:
            raise too_large(n)
    if ranks.rank:
        return
    # Unless gradients accumulate, they grow as activations shrink: subtracting both from the peak
    # then understates the rest.
    guess, peak = predicted(N), peaks[N]
    rest = [kind for kind in guess if kind not in found]
    rows = {kind: (guess[kind], n_bytes) for kind, n_bytes in found.items() if n_bytes}
    rows[", ".join(rest)] = sum(guess[kind] for kind in rest), peak - sum(found.values())
    rows["total"] = sum(guess.values()), peak
    print(f"\n{'GB on the fullest rank':<46}predicted  measured  ratio")
    for kind, (p, m) in rows.items():
        print(f"{kind:<46}{p / 1e9:9.4f}{m / 1e9:10.4f}{m / p:7.2f}")
    if gpu:
        print(f"{'reserved by the allocator':<55}{torch.cuda.max_memory_reserved() / 1e9:10.4f}")
    print(f"{'available':<55}{room / 1e9:10.4f}")
    how = f"micro-batches 1 and {N}" if N > 1 else "micro-batch 1 and the prediction"
    print(f"largest micro-batch that fits: {max(N, fits())} of {share} (estimated from {how})")
    print(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s (one step, not "
          f"a benchmark), loss {loss:.4f}")  # fmt: skip
