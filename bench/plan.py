"""Predict what a run takes, or score the prediction after the run.

    python -m bench.plan configs/phi1.toml --gpu a100-80 --gpus 8 --price 1.8
    python -m bench.plan --score out/demo/runs/base

FSDP2 shards the run with one copy of masters and states per node. Each block is a unit, the rest
is one more. Weights are gathered in half precision once a step and stay. Gradients accumulate in
fp32 and are reduced unit by unit in the backward of the last micro-step.

memory  from common/memory.py, which tests/bench/test_plan.py compares with torch's and FSDP2's
        allocations; `train.py CONFIG --check` does so before a run on a GPU
speed   cost.py's floors at published kernel rates, times the fraction that published runs, and
        ours on one H200, reach. This code has not run on other GPUs: pass `--fraction` the share
        that `--score` prints after your run
step    compute plus exposed collectives. Not modelled: stragglers, congestion, SM time that NCCL
        takes from compute, launches, Muon's exchanges
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

GPU_COUNTS = [NODE << i for i in range(7)]  # 8 to 512, for the scaling table
CPU_FRACTION = 0.345  # of a measured matmul; the demo: 32 to 37% (LOG.md, 2026-11-22)


@dataclass(frozen=True)
class Config(TrainConfig):
    """Plan the run of CONFIG.toml: memory, speed, hours, cost, scaling. Or --score a past run."""

    gpu: str = "a100-80"  # a100-40, a100-80, h100 or h200
    gpus: int = 8  # GPUs; above 8, whole nodes of 8
    fraction: float = 0.0  # share of the kernels' roofline reached, 0 = as published runs
    price: float = 0.0  # per GPU hour
    score: Path | None = None  # run folder to compare with its prediction

    def __post_init__(self):
        super().__post_init__()
        cost.find_gpu(self.gpu)
        for name, n, whole in (("gpus", self.gpus, self.seqs_per_step),
                               ("shard", self.shards, self.gpus)):  # fmt: skip
            if n < 1 or whole % n or (n > NODE and n % NODE):
                raise UserError(f"{name} is {n}, want a divisor of {whole} and whole nodes")

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
    """Return (parameters of a block, parameters outside the blocks)."""
    one, two = (parameter_count(dataclasses.replace(c, n_layer=n)) for n in (1, 2))
    return two - one, 2 * one - two


def memory(c: Config, micro_batch: int) -> dict[str, int]:
    """Return the bytes on a GPU at a step's peak, by kind."""
    return predict(c, parameters_by_unit(c.model), micro_batch, c.gpus, c.shards, c.compute_bytes)


def micro_batches(c: Config) -> tuple[int, int]:
    """Return (micro-batch to plan with: the configured one if it fits; largest that fits)."""
    share, room = c.seqs_per_step // c.gpus, GPUS[c.gpu].memory - RESERVE_BYTES
    fits = largest(share, room, lambda n: sum(memory(c, n).values()))
    return largest(share, max(1, min(c.micro_batch, fits))), fits


def step_time(c: Config, micro_batch: int, fraction: float, gpu: Gpu) -> tuple[float, float]:
    """Return (seconds of a step, seconds of it that wait for communication).

    Block collectives overlap compute: exposed are the first one and any excess over a block's
    compute. The root (embedding and head) is fetched first and reduced last.
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
    exposed_s += collective_s(4, *shard, 2, gpu)  # gradient norm
    return micro_steps * micro_step_s + compute_s(("optimiser",)) / S + exposed_s, exposed_s


def speeds(c: Config, micro_batch: int) -> dict[str, tuple[float, float]]:
    """Return {published run: (its fraction of the roofline, our tokens/s at that fraction)}."""
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
    used |= {"total": sum(used.values()), "available": int(gpu.memory)}
    for kind, n_bytes in used.items():
        table(per_gpu=kind, GB=n_bytes / 1e9)
    print(f"{c.gpus} x {c.gpu}, micro-batch {micro_batch}, states over {c.shards}; "
          f"{RESERVE_BYTES / 1e9:.0f} GB reserved for CUDA, NCCL and fragmentation")  # fmt: skip
    print(f"largest micro-batch that fits: {fits}" if fits else "DOES NOT FIT: shard over "
          "more GPUs or use larger ones")  # fmt: skip

    print("\nSpeed if this code reaches these runs' share of the kernels' roofline")
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
    print(f"\nSame steps on more GPUs, at {like}'s share; exposed: waiting for communication")
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
    """Return ({quantity: (predicted, actual)}, share of the roof reached, the roof's name).

    The roof is the kernels' roofline on a GPU, elsewhere the matmul timed at the start of the run.
    Raises UserError if the folder holds no run or no logged step.
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
        expected = reached[(len(reached) - 1) // 2][1]  # the median published run
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
    for name, (predicted, actual) in rows.items():
        table(quantity=name, predicted=predicted, actual=actual, ratio=actual / predicted)
    print(f"reached {fraction:.1%} of {roof}")


if __name__ == "__main__":
    run(main)
