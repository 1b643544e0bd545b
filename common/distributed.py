"""Train with one process or many: ranks, sharding, and what every rank must decide alike.

torch's FSDP2 shards fp32 masters and optimiser states over `shard` ranks, and replicates that group
over the rest. A forward gathers the weights in the compute dtype for all micro-steps of a step;
gradients are summed in fp32 and reduced once a step, during the last backward. One process with
fp32 weights is not wrapped; one process in half precision is a mesh of one.

Nothing here waits for the device: the fused AdamW kernel itself unscales, clips and skips.
"""

import ctypes
import datetime
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from common.config import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROWTH_STEPS = 2000  # finite steps until fp16's loss scale doubles: torch.amp.GradScaler's default


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together, from torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int  # on this machine
    local_world_size: int
    restarts: int  # of this job, by torchrun
    device: torch.device

    def from_first(self, decide: Callable):
        """Return on every rank what `decide()` gives on rank 0, or raise its UserError."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except UserError as e:
                answer[1] = str(e)
        if self.world_size > 1:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]


def start(
    device: str, threads: int, timeout_s: int, choose_dtype: Callable
) -> tuple[Ranks, torch.dtype, str]:
    """Find this process's place, device and compute dtype; join the other ranks if there are any.

    `choose_dtype(device)` returns a dtype's name, and why, both of which are returned. A single
    process in half precision joins a group of its own: see shard_model.
    """
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
                "TORCHELASTIC_RESTART_COUNT": 0}  # fmt: skip
    env = {name: int(os.environ.get(name, default)) for name, default in defaults.items()}
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not use_cuda:
        raise UserError("device is cuda, but torch sees no GPU; use --device=cpu")
    place = torch.device("cuda", env["LOCAL_RANK"]) if use_cuda else torch.device("cpu")
    ranks = Ranks(*env.values(), place)
    if use_cuda:
        torch.cuda.set_device(ranks.device)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // ranks.local_world_size))
        keep_freed_memory()
    backend, timeout = "nccl" if use_cuda else "gloo", datetime.timedelta(seconds=timeout_s)
    if ranks.world_size > 1:
        dist.init_process_group(backend, timeout=timeout)
    name, why = ranks.from_first(lambda: choose_dtype(ranks.device))
    if ranks.world_size == 1 and name != "float32":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return ranks, DTYPES[name], why


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: the next step asks for it again, and page faults take time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping, to be unmapped, for a large tensor


def cpu_group(timeout_s: int) -> dist.ProcessGroup | None:
    """Make a group of all ranks for messages between hosts; None for a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def leave() -> None:
    """Part from the other ranks, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_model(model, ranks: Ranks, dtype: torch.dtype, shard: int, regather: bool) -> None:
    """Make `model`'s parameters shards on `ranks.device` that compute in `dtype`, in place.

    shard      ranks that share one copy of the masters and states, 0 = those of a machine
    regather   gather a block's weights each time they are used, and free them after
    """
    if not dist.is_initialized():
        model.to(ranks.device)
        return
    shard = shard or ranks.local_world_size
    if ranks.world_size % shard:
        raise UserError(f"shard is {shard}, and {ranks.world_size} ranks cannot be divided by it")
    shape, names = (ranks.world_size // shard, shard), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay fp32
    )
    wrap = partial(fully_shard, mesh=mesh if shape[0] > 1 else mesh["shard"], mp_policy=policy)
    for block in model.blocks:
        wrap(block, reshard_after_forward=regather)
    wrap(model, reshard_after_forward=False)  # its backward follows its forward


def begin_micro_step(model: nn.Module, last: bool, regather: bool) -> None:
    """Reduce gradients, and free the gathered weights, in the last micro-step of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last or regather)


class Guard:
    """Decide, on the device, which steps are taken, and keep fp16's loss scale.

    A step whose gradient norm is inf or NaN anywhere is skipped everywhere: the norm is global. The
    loss is scaled for fp16 only; the scale halves with each skipped step, and doubles after
    GROWTH_STEPS without one (Micikevicius et al. 2018, arXiv 1710.03740, 3.2).
    """

    def __init__(self, device: torch.device, scaled: bool):
        self.scaled = scaled
        # scale of the loss; steps since it changed; steps skipped in all, and since the last taken
        self.scale = torch.tensor(2.0**16 if scaled else 1.0, device=device)
        self.since, self.skipped, self.in_a_row = (torch.zeros((), device=device) for _ in range(3))
        self.most_in_a_row = torch.zeros((), device=device)  # since the last log line

    def state(self) -> dict[str, torch.Tensor]:
        names = ("scale", "since", "skipped", "in_a_row")
        return {f"guard.{name}": getattr(self, name) for name in names}

    def clip(self, model: nn.Module, optimizer, max_norm: float) -> torch.Tensor:
        """Clip the gradients to the global norm `max_norm`, 0 = no clipping; return their norm.

        The gradients stay as they are: the fused AdamW kernel divides them by `grad_scale`, and
        does nothing at all where `found_inf` is 1, as torch.amp.GradScaler tells it.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if isinstance(model, FSDPModule):
            norm = norm.full_tensor()
        norm = norm / self.scale
        too_large = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else 1.0
        optimizer.grad_scale = self.scale * too_large
        optimizer.found_inf = 1 - norm.isfinite().float()
        return norm

    def update(self, optimizer) -> torch.Tensor:
        """After optimizer.step(): adjust counts and scale; return 1.0 if it was taken, or 0.0."""
        skipped = optimizer.found_inf
        taken = 1 - skipped
        self.skipped += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        if self.scaled:
            self.since = (self.since + 1) * taken
            grow = self.since >= GROWTH_STEPS
            self.scale *= torch.where(taken == 0, 0.5, torch.where(grow, 2.0, 1.0))
            self.since *= ~grow
        return taken


def optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Return AdamW's tensors by name, zero before its first step; sharded as the weights are."""
    tensors = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:  # as AdamW itself begins
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors |= {f"{kind}.{name}": tensor for kind, tensor in state.items()}
    return tensors


def lost_rank(e: Exception, rank: int) -> UserError | None:
    """Return what to tell the user if `e` says that another rank is gone or does not answer."""
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out")
    if not isinstance(e, dist.DistError) and not any(sign in str(e) for sign in signs):
        return None
    return UserError(
        f"rank {rank} lost touch with another, which died or hangs: see its own message if it has "
        f"one; --resume goes on from the newest checkpoint ({str(e).splitlines()[0]:.200})"
    )


class Signals:
    """Let all ranks hear SIGTERM, SIGUSR1 or Ctrl-C on any of them at the same step.

    The message travels between the hosts while a step runs, and is read a step later. In a single
    process, a second Ctrl-C ends it at once.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.received, self.sent = group, 0, None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        self.received = number
        if number == signal.SIGINT and not self.group:
            signal.signal(number, signal.default_int_handler)

    def heard(self) -> int:
        """Return the number of a signal that all ranks know of, or 0. Call it once a step."""
        if self.group is None:
            return self.received
        heard = 0
        if self.sent:
            work, number = self.sent
            work.wait()
            heard = int(number)
        number = torch.tensor(self.received)
        self.sent = dist.all_reduce(number, dist.ReduceOp.MAX, self.group, async_op=True), number
        return heard
