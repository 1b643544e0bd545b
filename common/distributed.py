"""Train with one process or many: ranks, sharding, and decisions shared by all ranks.

torch's FSDP2 shards the fp32 masters and optimiser states over `shard` ranks and replicates that
group over the rest. The first forward of a step gathers the weights in the compute dtype for all
its micro-steps; gradients are summed in fp32 and reduced once per step, in the last backward. A
single process in fp32 is not wrapped; a single process in half precision is a mesh of one.

Nothing here waits for the device: the fused AdamW kernel unscales, clips and skips.
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
GROWTH_STEPS = 2000  # finite steps before fp16's loss scale doubles: torch.amp.GradScaler's default


@dataclass(frozen=True)
class Ranks:
    """This process's place among the training processes, from torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int  # on this machine
    local_world_size: int
    restarts: int  # times torchrun has restarted this job
    device: torch.device

    def from_first(self, decide: Callable):
        """Call `decide()` on rank 0; return its result or raise its UserError on every rank."""
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
    """Set up rank, device and process group; return (ranks, compute dtype, reason for the dtype).

    `choose_dtype(device)` returns a dtype's name and the reason. A single process in half precision
    gets a group of its own: see shard_model.
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
    """Make glibc keep freed memory: the next step reuses it, and page faults are slow."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return the top of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: never mmap large tensors, which munmap would return


def cpu_group(timeout_s: int) -> dist.ProcessGroup | None:
    """Create a gloo group of all ranks for host messages; return None for a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def leave() -> None:
    """Leave the process group at the end of the run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_model(model, ranks: Ranks, dtype: torch.dtype, shard: int, regather: bool) -> None:
    """Shard `model`'s parameters in place, on `ranks.device`, to compute in `dtype`.

    shard      ranks that share one copy of the masters and states, 0 = all on a machine
    regather   gather a block's weights for each use and free them afterwards
    """
    if not dist.is_initialized():
        model.to(ranks.device)
        return
    shard = shard or ranks.local_world_size
    if ranks.world_size % shard:
        raise UserError(f"shard is {shard}, want a divisor of the {ranks.world_size} ranks")
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
    wrap(model, reshard_after_forward=False)  # its backward starts right after its forward


def begin_micro_step(model: nn.Module, last: bool, regather: bool) -> None:
    """Let FSDP2 reduce gradients and free gathered weights only in a step's last micro-step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last or regather)


class Guard:
    """On-device gradient clipping, skipping of non-finite steps, and fp16 loss scaling.

    The gradient norm is global: inf or NaN on one rank skips the step on all. The loss is scaled
    for fp16 only; the scale halves at each skipped step and doubles after GROWTH_STEPS without a
    skip (Micikevicius et al. 2018, arXiv 1710.03740, 3.2).
    """

    def __init__(self, device: torch.device, scaled: bool):
        self.scaled = scaled
        # loss scale; finite steps since it changed; steps skipped in total, and in a row
        self.scale = torch.tensor(2.0**16 if scaled else 1.0, device=device)
        self.since, self.skipped, self.in_a_row = (torch.zeros((), device=device) for _ in range(3))
        self.most_in_a_row = torch.zeros((), device=device)  # max since the last log line

    def state(self) -> dict[str, torch.Tensor]:
        names = ("scale", "since", "skipped", "in_a_row")
        return {f"guard.{name}": getattr(self, name) for name in names}

    def clip(self, model: nn.Module, optimizer, max_norm: float) -> torch.Tensor:
        """Clip to the global gradient norm `max_norm`, 0 = no clipping; return the unclipped norm.

        Leave the gradients unchanged: like torch.amp.GradScaler, set `grad_scale`, by which the
        fused AdamW kernel divides them, and `found_inf`, which makes it skip the step if 1.
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
        """Update counts and loss scale after optimizer.step(); return 1.0, or 0.0 if skipped."""
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
    """Return AdamW's tensors by name, sharded like the weights; zeros before the first step."""
    tensors = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:  # same initial state as AdamW's own
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors |= {f"{kind}.{name}": tensor for kind, tensor in state.items()}
    return tensors


def lost_rank(e: Exception, rank: int) -> UserError | None:
    """Return a UserError if `e` means that another rank died or hangs, else None."""
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out")
    if not isinstance(e, dist.DistError) and not any(sign in str(e) for sign in signs):
        return None
    return UserError(
        f"rank {rank} lost contact with another rank, which died or hangs: see its error, if any; "
        f"--resume continues from the newest checkpoint ({str(e).splitlines()[0]:.200})"
    )


class Signals:
    """SIGTERM, SIGUSR1 or Ctrl-C on any rank, reported to all ranks at the same step.

    Hosts exchange the message during a step and read it one step later. A second Ctrl-C ends a
    single process at once.
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
        """Return the signal number known to all ranks, or 0. Call it once per step."""
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
