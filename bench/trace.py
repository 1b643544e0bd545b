"""Where a training step's microseconds go: its kernels in groups, each beside its floor."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from bench.work import Rates, training_ops
from model import ModelConfig

# (group, names of its kernels, names of its ops in work.py); the first match takes a kernel.
GROUPS = [
    ("attention fwd", r"_fwd_kernel|_rotate_k_kernel|.*flash_fwd.*", ["attention_fwd"]),
    ("attention bwd", r"_(bwd|delta|dq)_kernel|.*flash_bwd.*", ["attention_bwd"]),
    ("gemm", r"_(in|out)_proj_fwd_kernel|(?i:.*(gemm|nvjet|cutlass|splitk).*)|aten::(add)?mm", []),
    ("layernorm", r"_layernorm_.*", ["layernorm_fwd", "ln_f_fwd", "layernorm_bwd", "ln_f_bwd"]),
    ("cross entropy", r"_cross_entropy_kernel|_rescale_kernel", ["cross_entropy"]),
    ("elementwise", r"_(gelu|residual)_.*", ["residual_bwd", "attention_db", "head_db"]),
    ("embedding", r"(?i:.*(embedding|index).*)", ["embedding_fwd", "embedding_bwd"]),
    ("optimiser", r"(?i:.*(multi_tensor|adam|foreach).*)", ["gradient_norm", "adamw"]),
    ("other", r".*", []),
]  # fmt: skip


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step: Callable[[], Tensor], device: torch.device) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds) of one step, the longest first; on a CPU, torch's ops."""
    cuda, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda) as trace:
        step()
        synchronize(device)
    rows = [
        (e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total)
        for e in trace.key_averages()
        if (e.device_type.name == "CUDA") == cuda and not getattr(e, "is_user_annotation", False)
    ]
    return sorted((r for r in rows if r[2] > 0), key=lambda r: -r[2])


def group(kernel: str) -> str:
    return next(name for name, pattern, _ in GROUPS if re.fullmatch(pattern, kernel))


def floors_us(c: ModelConfig, micro_batch: int, micro_steps: int, rates: Rates) -> dict[str, float]:
    """The floor of each group, for one step."""
    total = dict.fromkeys((name for name, _, _ in GROUPS), 0.0)
    for op in training_ops(c, micro_batch):
        name = next((g for g, _, ops in GROUPS if op.name in ops), "gemm")
        times = op.calls * (1 if op.phase == "optimiser" else micro_steps)
        total[name] += rates.floor_us(op)[0] * times
    return total


def show_profile(rows: list[tuple[str, int, float]], floors: dict[str, float], n: int) -> str:
    total = sum(us for *_, us in rows)
    lines = [f"{'group':<16}{'us':>12}{'share':>8}{'floor us':>12}{'floor/us':>10}"]
    for name, floor in floors.items():
        us = sum(r[2] for r in rows if group(r[0]) == name)
        part = f"{floor / us:>10.1%}" if us else f"{'-':>10}"
        lines.append(f"{name:<16}{us:>12,.0f}{us / total:>8.1%}{floor:>12,.0f}{part}")
    lines.append(f"\n{'us':>12}{'calls':>7}  {'group':<16}kernel")
    for kernel, calls, us in rows[:n]:
        lines.append(f"{us:>12,.0f}{calls:>7}  {group(kernel):<16}{kernel[:90]}")
    return "\n".join(lines)
