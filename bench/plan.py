"""What a run will take, before it starts; afterwards, how far off that was.

    python -m bench.plan configs/phi1.toml --gpu a100-80 --gpus 8 --price 1.8
    python -m bench.plan --score out/demo/runs/base

The run is sharded by torch's FSDP2, a copy of masters and states in each node, every block and the
rest a unit: weights are gathered in half precision once a step and stay, gradients add up in fp32
and are reduced unit by unit in the backward of the step's last micro-step.

memory  is common/memory.py's, which tests/bench/test_plan.py compares with what torch and FSDP2
        allocate; before a run on a GPU, `train.py CONFIG --check` does
speed   is cost.py's floors at the rates of published kernels, times the fraction of it that
        published runs reach, and ours on one H200. On other GPUs this code has not run:
        `--fraction` takes what `--score` prints after a run of yours
step    is compute, and what the collectives beside it leave exposed. Left out: stragglers,
        congestion, what NCCL's kernels take from compute, launches, and Muon's exchanges
"""

import dataclasses
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench import cost
from bench.cost import GPUS, NODE, Gpu, collective_s
from bench.table import Table
from common.config import UserError, parse, run
from common.memory import RESERVE_BYTES, largest, predict
from model import ModelConfig, flops_per_token, parameter_count
from train import TrainConfig

GPU_COUNTS = [NODE << i for i in range(7)]  # 8 to 512, of the scaling table
CPU_FRACTION = 0.345  # of a measured matmul, training the demo: 32 to 37% (LOG.md, 2026-11-22)


@dataclass(frozen=True)
class Config(TrainConfig):
    """Plan the run of CONFIG.toml: memory, speed, hours, cost, scaling. Or --score one you made."""

    gpu: str = "a100-80"  # a100-40, a100-80, h100 or h200
    gpus: int = 8  # how many; beyond 8 in whole nodes of 8
    fraction: float = 0.0  # of the kernels' roofline that the run reaches, 0 = as published runs
    price: float = 0.0  # of a GPU for an hour, for the cost
    score: Path | None = None  # a run folder to compare with what would have been predicted

    def __post_init__(self):
        super().__post_init__()
        cost.find_gpu(self.gpu)
        for name, n, whole in (("gpus", self.gpus, self.seqs_per_step),
                               ("shard", self.shards, self.gpus)):  # fmt: skip
            if n < 1 or whole % n or (n > NODE and n % NODE):
                raise UserError(f"{name} is {n}, want a divisor of {whole}, and whole nodes")

    @property
    def shards(self) -> int:
        return self.shard or min(self.gpus, NODE)

    @property
    def compute_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def tokens(self) -> int:
        return self.max_steps * self.seqs_per_step * self.seq_len


def parameters_by_unit(c: ModelConfig) -> tuple[int, int]:
    """Return the parameters of a block, and of all that is in no block."""
    one, two = (parameter_count(dataclasses.replace(c, n_layer=n)) for n in (1, 2))
    return two - one, 2 * one - two


def memory(c: Config, micro_batch: int) -> dict[str, int]:
    """Return the bytes on a GPU at the fullest moment of a step, by kind."""
    return predict(c, parameters_by_unit(c.model), micro_batch, c.gpus, c.shards, c.compute_bytes)


def micro_batches(c: Config) -> tuple[int, int]:
    """Return the one to plan with, the configured one if that fits; and the largest that fits."""
    share, room = c.seqs_per_step // c.gpus, GPUS[c.gpu].memory - RESERVE_BYTES
    fits = largest(share, room, lambda n: sum(memory(c, n).values()))
    return largest(share, max(1, min(c.micro_batch, fits))), fits


def step_time(c: Config, micro_batch: int, fraction: float, gpu: Gpu) -> tuple[float, float]:
    """Return the seconds of a step, and how many of them wait for communication.

    Of the blocks' collectives only the first is waited for, and what takes longer than a block's
    compute. The root, embedding and head, is fetched first and reduced last.
    """
    S, L, units = c.shards, c.n_layer, parameters_by_unit(c.model)
    R, micro_steps = c.gpus // S, c.seqs_per_step // (micro_batch * c.gpus)
    ops, fast = cost.training_ops(c.model, micro_batch, c.optimizer), gpu.reached()[1]

    def compute_s(phases: tuple[str, ...], calls: tuple[int, ...] = (1, L)) -> float:
        chosen = [op for op in ops if op.phase in phases and op.calls in calls]
        return cost.step_us(chosen, fast, 1) / fraction / 1e6

    forward_s = compute_s(("forward",), (L,)) / L  # of a block
    backward_s = compute_s(("backward",), (L,)) / L + forward_s * c.recompute
    micro_step_s = compute_s(("forward", "backward")) + L * forward_s * c.recompute

    shard, replicas = (S, max(1, S // NODE)), (R, max(1, min(R, c.gpus // NODE)))  # ranks, nodes
    gather, root_gather = (collective_s(c.compute_bytes * n, *shard, 1, gpu) for n in units)
    scatter, root_scatter = (collective_s(4 * n, *shard, 1, gpu) for n in units)
    reduce, root_reduce = (collective_s(4 * n / S, *replicas, 2, gpu) for n in units)
    fetch = root_gather + gather + (L - 1) * max(0.0, gather - forward_s)
    fetch_again = gather + (L - 1) * max(0.0, gather - backward_s)
    exposed_s = micro_steps * (fetch + fetch_again) if c.regather else fetch
    exposed_s += scatter + (L - 1) * max(0.0, max(scatter, reduce) - backward_s)
    exposed_s += max(reduce, root_scatter) + root_reduce
    exposed_s += collective_s(4, *shard, 2, gpu)  # the gradients' norm
    return micro_steps * micro_step_s + compute_s(("optimiser",)) / S + exposed_s, exposed_s


def speeds(c: Config, micro_batch: int) -> dict[str, tuple[float, float]]:
    """Return published run -> (its fraction of the roofline, our tokens/s at that)."""
    gpu, tokens = GPUS[c.gpu], c.seqs_per_step * c.seq_len
    given = {"--fraction": c.fraction} if c.fraction else cost.fractions(gpu.family)
    given = {"kernels alone": 1.0} | given
    return {k: (f, tokens / step_time(c, micro_batch, f, gpu)[0]) for k, f in given.items()}


def report(c: Config) -> None:
    """Print the plan."""
    gpu, table, P, flops = GPUS[c.gpu], Table(), parameter_count(c.model), flops_per_token(c.model)
    print(f"{P:,} parameters, {flops / 1e9:.3f} GFLOP a token (causal)")
    print(f"{c.max_steps:,} steps x {c.seqs_per_step:,} x {c.seq_len:,} = {c.tokens:,} tokens\n")

    micro_batch, fits = micro_batches(c)
    used = memory(c, micro_batch)
    used |= {"total": sum(used.values()), "there is": int(gpu.memory)}
    for kind, n_bytes in used.items():
        table(on_each_gpu=kind, GB=n_bytes / 1e9)
    print(f"{c.gpus} x {c.gpu}, micro-batch {micro_batch}, states over {c.shards}; "
          f"{RESERVE_BYTES / 1e9:.0f} GB are left for CUDA, NCCL and gaps")  # fmt: skip
    print(f"largest micro-batch that fits: {fits}" if fits else "DOES NOT FIT: shard over "
          "more GPUs, or take larger ones")  # fmt: skip

    print("\nIf this code reaches as much of its kernels' roofline as these runs did")
    reached = speeds(c, micro_batch)
    for like, (share, rate) in reached.items():
        hours = c.tokens / rate / 3600
        table(
            if_like=like, reached_frac=share, mfu_frac=rate * flops / c.gpus / gpu.peak,
            tokens_per_s=rate, each=rate / c.gpus, hours=hours, gpu_hours=hours * c.gpus,
            cost=hours * c.gpus * c.price,
        )  # fmt: skip

    kept = (4 * P + c.shards * used["optimizer's states"]) / 1e9
    print(f"\ncheckpoint {kept:.2f} GB, {c.keep + 1} kept: {(c.keep + 1) * kept:,.0f} GB")
    like = list(reached)[len(reached) // 2]
    print(f"\nThe same steps on more GPUs, like {like}; exposed: waiting for communication")
    eighth = 0.0
    for gpus in (g for g in GPU_COUNTS if c.seqs_per_step % g == 0):
        share, on = c.seqs_per_step // gpus, dataclasses.replace(c, gpus=gpus, shard=0)
        n = largest(share, micro_batch)
        step_s, exposed_s = step_time(on, n, reached[like][0], gpu)
        eighth = eighth or step_s * NODE
        table(
            gpus=gpus, micro_batch=n, micro_steps=share // n, step_ms=step_s * 1e3,
            exposed_ms=exposed_s * 1e3, tokens_per_s=c.seqs_per_step * c.seq_len / step_s,
            hours=c.max_steps * step_s / 3600, efficiency_frac=eighth / step_s / gpus,
        )  # fmt: skip


def score(folder: Path) -> tuple[dict[str, tuple[float, float]], float, str]:
    """Return {quantity: (predicted, happened)} of a run, the share of the roof it reached, which.

    On a GPU the roof is the kernels' roofline, elsewhere the matmul that the run timed as it began.
    Raises UserError for a folder that holds no run, or one that has not logged a step.
    """
    try:
        ran, lines = (folder / name for name in ("config.json", "metrics.jsonl"))
        ran, lines = json.loads(ran.read_text()), lines.read_text().splitlines()
    except OSError as e:
        raise UserError(f"cannot score {e.filename}: {e.strerror}; want a run folder") from None
    lines = [json.loads(line) for line in lines if "tokens_per_s" in line and line[-1] == "}"]
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'} has no line with tokens_per_s yet")
    fields = [f.name for f in dataclasses.fields(TrainConfig) if f.type in (int, float, str, bool)]
    values = {k: ran[k] for k in fields if k in ran and k != "device"}
    kind = [k for k in GPUS if all(part.upper() in ran["device"] for part in k.split("-"))]
    c = Config(**values, gpu=(kind or ["a100-80"])[0], gpus=ran["world_size"])
    rows, roof_name = {}, ran["roof"]
    if kind:
        micro_batch = micro_batches(c)[0]
        (_, roof), *reached = speeds(c, micro_batch).values()
        expected = reached[(len(reached) - 1) // 2][1]  # like the published run in the middle
        roof_name, peak = "the kernels' roofline", max(x.get("memory_gib", 0) for x in lines)
        rows["memory, GB"] = sum(memory(c, micro_batch).values()) / 1e9, peak * 2**30 / 1e9
    else:
        number, unit = re.search(r"([\d,.]+) ([GT])FLOP/s", ran["roof"]).groups()
        roof = float(number.replace(",", "")) * {"G": 1e9, "T": 1e12}[unit]
        roof *= c.gpus / flops_per_token(c.model)
        expected = CPU_FRACTION * roof
    tokens_per_s, last = statistics.median(x["tokens_per_s"] for x in lines), lines[-1]
    seconds = last["step"] * c.seqs_per_step * c.seq_len / expected
    rows["seconds"] = seconds, last["seconds"]
    rows["tokens/s, median"] = expected, tokens_per_s
    return rows, tokens_per_s / roof, roof_name


def main() -> None:
    c = parse(Config, toml=True, hidden=TrainConfig)
    if not c.score:
        return report(c)
    rows, fraction, roof = score(c.score)
    table = Table()
    for name, (predicted, happened) in rows.items():
        table(quantity=name, predicted=predicted, happened=happened, ratio=happened / predicted)
    print(f"reached {fraction:.1%} of {roof}")


if __name__ == "__main__":
    run(main)
