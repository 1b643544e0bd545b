"""What a run will take, before it starts; afterwards, how far off that was.

    python -m bench.plan configs/phi1.toml --gpu a100-80 --gpus 8 --price 1.8
    python -m bench.plan --score out/demo/runs/base

The run is sharded by torch's FSDP2, a copy of masters and states in each node, every block and the
rest a unit: weights are gathered in half precision once a step and stay, gradients add up in fp32
and are reduced unit by unit in the backward of the step's last micro-step.

memory  is counted; tests/bench/test_plan.py compares it with what torch and FSDP2 allocate
speed   is cost.py's floors at the rates of published kernels, times the fraction of it that
        published runs reach. With this code nothing of it was measured on a GPU: `--fraction` takes
        what `--score` prints after a run of yours
step    is simulated: compute, and the collectives of each kind, are streams that run side by side.
        Left out: stragglers, congestion, what NCCL's kernels take from compute, and launches
"""

import dataclasses
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.cost import (
    BANDWIDTH,
    GPUS,
    MEASURED,
    NODE,
    Gpu,
    collective_s,
    fractions,
    step_us,
    training_ops,
)
from common import checkpoint
from common.config import UserError, parse, run
from common.runlog import PEAK_FLOPS
from data.shards import read_header
from model import CHUNK_ROWS, ModelConfig, flops_per_token, parameter_count
from train import TrainConfig

NL = "\n"  # Python 3.11 takes no backslash inside an f-string's braces
SLOW_NETWORK = 100e9 / 8 / NODE  # bytes/s a GPU: one 100 Gb/s card a node
RESERVE_BYTES = 4e9  # CUDA's context, NCCL's and cuBLAS's buffers, fragmentation: an assumption
CPU_FRACTION = 0.345  # of a measured matmul, training the demo: 32 to 37% (LOG.md, 2026-11-22)


@dataclass(frozen=True)
class Config(TrainConfig):
    """Plan a run: memory, speed, hours, cost, scaling. Or --score one that was made."""

    gpu: str = "a100-80"  # a100-40, a100-80, h100 or h200
    gpus: int = 8  # how many; beyond 8 in whole nodes of 8
    fraction: float = 0.0  # of the kernels' roofline that the run reaches, 0 = as published runs
    price: float = 0.0  # of a GPU for an hour, for the cost
    score: Path | None = None  # a run folder to compare with what would have been predicted
    json: bool = False  # print JSON instead of tables

    def __post_init__(self):
        super().__post_init__()
        if self.gpu not in GPUS:
            raise UserError(f"gpu is {self.gpu!r}, want one of {', '.join(GPUS)}")
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


def saved_bytes(c: ModelConfig, n_bytes: int = 2) -> int:
    """Bytes a token that a block keeps for its backward, in elements of `n_bytes`.

    triton  x, q|k|v|up, attention's output (kernels/block.py); and statistics, fp32
    torch   beside these LayerNorm's output, rotated q and k, GELU's output, attention's output in
            another layout; dropout's masks, a byte each
    """
    C, M, statistics_bytes = c.width, c.mlp_width, 4 * c.n_head + 8
    if c.kernels == "torch":
        return n_bytes * (9 * C + 2 * M) + (2 * C if c.dropout else 0) + statistics_bytes
    return n_bytes * (5 * C + M) + statistics_bytes + C // 16  # peaks of 128 rows: 2 fp32 a dim


def parameters_by_unit(c: ModelConfig) -> tuple[int, int]:
    """Parameters of a block, and of all that is in no block."""
    one, two = (parameter_count(dataclasses.replace(c, n_layer=n)) for n in (1, 2))
    return two - one, 2 * one - two


def memory(c: Config, micro_batch: int) -> dict[str, int]:
    """Bytes on a GPU at the fullest moment of a step, by kind."""
    N, C, M, V = micro_batch * c.seq_len, c.width, c.mlp_width, c.vocab_size
    P, (block, root), b = parameter_count(c.model), parameters_by_unit(c.model), c.compute_bytes
    saved = N * saved_bytes(c.model, b)
    activations = (c.n_layer * (N * b * C if c.recompute else saved)) + N * (b * 2 * C + 8)
    if c.kernels == "torch":  # fp32 log-probabilities, and two gradients of them
        logits, head_bwd, block_bwd = 12 * N * V, 0, b * (block + N * (C + M))
    else:  # a chunk, with dx and dw made at once; dqkv|du, a, da, dy, out's and two dropped ones
        logits, head_bwd = b * min(N, CHUNK_ROWS) * V, 4 * V * C + b * N * C
        block_bwd = 4 * block + b * N * (7 * C + 3 * M)
    buffers = max(head_bwd, block_bwd + saved * c.recompute - logits)  # in the logits' place, too
    on_their_way = (4 + b) * (block + root) * (c.gpus > 1)  # two units, gathered or reduced
    whole = c.gpus == 1 or c.seqs_per_step > micro_batch * c.gpus  # gradients that add up
    return {
        "weights": b * (2 * block + root if c.regather else P) * (b == 2),  # fp32: the masters
        "masters": 4 * P // c.shards,
        "Adam's states": 8 * P // c.shards,
        "gradients": 4 * P // (1 if whole else c.shards),
        "activations": activations,
        "logits": logits,
        "backward's buffers": buffers,
        "communication": max(0, on_their_way - activations - logits - buffers),  # as those go
    }


def micro_batches(c: Config) -> tuple[int, int]:
    """The one to plan with, the configured one if that fits; and the largest that fits, or 0."""
    share, room = c.seqs_per_step // c.gpus, GPUS[c.gpu].memory - RESERVE_BYTES
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    largest = max((n for n in divisors if sum(memory(c, n).values()) <= room), default=0)
    return max(n for n in divisors if n <= max(1, min(c.micro_batch, largest))), largest


def simulate(c: Config, micro_batch: int, fraction: float, gpu: Gpu) -> dict:
    """One step: its seconds, those of them that wait for communication, and what is moved."""
    S, R, L, (block, root) = c.shards, c.gpus // c.shards, c.n_layer, parameters_by_unit(c.model)
    micro_steps = c.seqs_per_step // (micro_batch * c.gpus)
    fast = MEASURED[gpu.family][1]
    rates = dataclasses.replace(fast, memory=fast.memory * gpu.bandwidth / BANDWIDTH[gpu.family])
    ops, ends = training_ops(c.model, micro_batch), ("embedding", "ln_f", "head", "cross_entropy")

    def compute_s(phase: str, at_ends: bool) -> float:
        chosen = [op for op in ops if op.phase == phase and op.name.startswith(ends) == at_ends]
        return step_us(chosen, rates, 1) / fraction / 1e6

    forward_s, backward_s = compute_s("forward", False) / L, compute_s("backward", False) / L
    backward_s += forward_s * c.recompute
    ends_s = compute_s("forward", True) + compute_s("backward", True)
    optimiser_s = compute_s("optimiser", False) / S
    busy_s = micro_steps * (ends_s + L * (forward_s + backward_s)) + optimiser_s

    shard, replicas = (S, max(1, S // NODE)), (R, max(1, min(R, c.gpus // NODE)))  # ranks, nodes
    gather, root_gather = (collective_s(c.compute_bytes * n, *shard, 1, gpu) for n in (block, root))
    scatter, root_scatter = (collective_s(4 * n, *shard, 1, gpu) for n in (block, root))
    reduce, root_reduce = (collective_s(4 * n / S, *replicas, 2, gpu) for n in (block, root))

    now = scattered = reduced = 0.0  # when each stream is free
    for micro_step in range(micro_steps):
        fetch = c.regather or micro_step == 0
        gathered = now = now + root_gather * fetch
        for _ in range(L):
            gathered += gather * fetch
            now = max(now, gathered) + forward_s
        gathered = now
        now += ends_s
        for _ in range(L):
            gathered += gather * c.regather
            now = max(now, gathered) + backward_s
            if micro_step == micro_steps - 1:
                scattered = max(scattered, now) + scatter
                reduced = max(reduced, scattered) + reduce
    # The root holds embedding and head, so that it is through last; then the gradients' norm.
    reduced = max(reduced, max(scattered, now) + root_scatter) + root_reduce
    step_s = reduced + collective_s(4, *shard, 2, gpu) + optimiser_s
    blocks, roots = (2 * L * micro_steps, micro_steps) if c.regather else (L, 1)  # gathered
    gathered_bytes = c.compute_bytes * (blocks * block + roots * root)
    P, gathers_s = L * block + root, blocks * gather + roots * root_gather
    return {
        "micro_batch": micro_batch,
        "micro_steps": micro_steps,
        "step_s": step_s,
        "exposed_s": max(0.0, step_s - busy_s),
        "tokens_per_s": c.seqs_per_step * c.seq_len / step_s,
        "gathers": {"bytes": gathered_bytes * (S - 1) / S, "s": gathers_s},
        "scatters": {"bytes": 4 * P * (S - 1) / S, "s": L * scatter + root_scatter},
        "reduces": {"bytes": 8 * P / S * (R - 1) / R, "s": L * reduce + root_reduce},
    }


def scaling(c: Config, micro_batch: int, fraction: float) -> list[dict]:
    """The same steps on 8 to 512 GPUs, with states in a node, on a slow network, over all GPUs."""
    rows, gpu = [], GPUS[c.gpu]
    slow = dataclasses.replace(gpu, network=SLOW_NETWORK)
    for gpus in (NODE << i for i in range(7)):
        if c.seqs_per_step % gpus:
            break
        share, on = c.seqs_per_step // gpus, dataclasses.replace(c, gpus=gpus, shard=0)
        n = max(n for n in range(1, min(share, micro_batch) + 1) if share % n == 0)
        rows.append(simulate(on, n, fraction, gpu) | {"gpus": gpus})
        others = {"node": rows[-1], "slow": simulate(on, n, fraction, slow)}
        others["all"] = simulate(dataclasses.replace(on, shard=gpus), n, fraction, gpu)
        eighth = rows[0]["tokens_per_s"] / NODE * gpus
        rows[-1]["efficiency"] = {k: v["tokens_per_s"] / eighth for k, v in others.items()}
    return rows


def report(c: Config) -> dict:
    """The plan, as `main` prints it."""
    gpu, P, flops = GPUS[c.gpu], parameter_count(c.model), flops_per_token(c.model)
    shards = [int(read_header(f)[2]) for f in sorted(c.data.glob("train_*.bin"))]
    windows = sum((n - 1) // c.seq_len for n in shards)
    micro_batch, largest = micro_batches(c)
    speeds, peak = [], c.gpus * PEAK_FLOPS[gpu.family.upper()]
    given = {"--fraction": c.fraction} if c.fraction else fractions(gpu.family)
    for like, fraction in given.items():
        rate = simulate(c, micro_batch, fraction, gpu)["tokens_per_s"]
        hours = c.max_steps * c.seqs_per_step * c.seq_len / rate / 3600
        speed = {"like": like, "fraction": fraction, "mfu": rate * flops / peak, "hours": hours}
        speed |= {"gpu_hours": hours * c.gpus, "cost": hours * c.gpus * c.price}
        speeds.append(speed | {"tokens_per_s": rate})
    middle = speeds[len(speeds) // 2]
    return {
        "parameters": P,
        "flops_per_token": flops,
        "tokens": c.max_steps * c.seqs_per_step * c.seq_len,
        "tokens_at_hand": sum(shards),
        "epochs": c.max_steps * c.seqs_per_step / windows if windows else None,
        "micro_batch": micro_batch,
        "largest_micro_batch": largest,
        "memory_bytes": memory(c, micro_batch),
        "roofline_tokens_per_s": simulate(c, micro_batch, 1.0, gpu)["tokens_per_s"],
        "speeds": speeds,
        "expected": middle,
        "step": simulate(c, micro_batch, middle["fraction"], gpu),
        "checkpoint_bytes": 12 * P,  # weights and two moments, fp32
        "scaling": scaling(c, micro_batch, middle["fraction"]),
    }


def show(c: Config, r: dict) -> str:
    """The plan as text, at most 100 columns wide."""
    step, memory_bytes, kept = r["step"], r["memory_bytes"], c.keep + 1
    data = f"{r['epochs']:.2f} epochs of the {r['tokens_at_hand']:,}" if r["epochs"] else "none"
    fits = f"largest micro-batch that fits: {r['largest_micro_batch']}"
    if not r["largest_micro_batch"]:
        fits = "DOES NOT FIT: shard over more GPUs, or take larger ones"
    elif r["micro_batch"] < min(c.micro_batch, c.seqs_per_step // c.gpus):
        fits += f", not the configured {c.micro_batch}: --micro_batch={r['micro_batch']}"
    kinds = [f"  {kind:<20}{n / 1e9:>8.2f}" for kind, n in memory_bytes.items() if n]
    speeds = [
        f"  {s['like']:<24}{s['fraction']:>8.0%}{s['mfu']:>8.1%}"
        f"{s['tokens_per_s'] / c.gpus:>11,.0f}{s['tokens_per_s']:>11,.0f}"
        f"{s['hours']:>8,.1f}{s['gpu_hours']:>11,.0f}" + (f"{s['cost']:>9,.0f}" if c.price else "")
        for s in r["speeds"]
    ]
    moved = [step[name] for name in ("gathers", "scatters", "reduces")]
    moved = [f"{m['bytes'] / 1e9:>8.2f} GB {m['s'] * 1e3:>8.1f} ms" for m in moved]
    more = [
        f"  {s['gpus']:>5}{s['micro_batch']:>6} x{s['micro_steps']:>2}{s['step_s'] * 1e3:>9,.0f}"
        f"{s['exposed_s'] * 1e3:>9.1f}{s['tokens_per_s']:>12,.0f}"
        f"{c.max_steps * s['step_s'] / 3600:>8,.1f}{s['efficiency']['node']:>8.0%}"
        f"{s['efficiency']['all']:>7.0%}{s['efficiency']['slow']:>7.0%}"
        for s in r["scaling"]
    ]
    for name in ("node", "all", "slow") if r["scaling"] else ():
        low = [s["gpus"] for s in r["scaling"] if s["efficiency"][name] < 0.9]
        more.append(f"  {name}: " + (f"below 90% from {low[0]} GPUs on" if low else "90% or more"))
    if len(r["scaling"]) < 7:
        more.append(f"  {NODE << len(r['scaling'])} GPUs: too few sequences in a step")
    return f"""\
{r["parameters"]:,} parameters, {r["flops_per_token"] / 1e9:.3f} GFLOP a token (causal)
{c.max_steps:,} steps x {c.seqs_per_step:,} x {c.seq_len:,} = {r["tokens"]:,} tokens
data at hand in {c.data}: {data}

GB on each of {c.gpus} x {c.gpu}, micro-batch {r["micro_batch"]}, states over {c.shards}
{NL.join(kinds)}
  {"total":<20}{sum(memory_bytes.values()) / 1e9:>8.2f}  of {GPUS[c.gpu].memory / 1e9:.1f}, \
{RESERVE_BYTES / 1e9:.0f} of them left for CUDA, NCCL and gaps
  {fits}

Kernels alone: {r["roofline_tokens_per_s"] / c.gpus:,.0f} tokens/s a GPU. How much of it a run \
reaches was not measured with this code
  if like                  of that     MFU  tok/s/GPU   tokens/s   hours  GPU-hours\
{"     cost" if c.price else ""}
{NL.join(speeds)}

Communication of a GPU in a step of {step["step_s"] * 1e3:,.0f} ms (like {r["expected"]["like"]})
  weights gathered    {moved[0]}
  gradients summed    {moved[1]}
  and over replicas   {moved[2]}
  not hidden          {step["exposed_s"] * 1e3:>20.1f} ms, {step["exposed_s"] / step["step_s"]:.2%}

Checkpoint {12 * r["parameters"] / 1e9:.2f} GB (a third weights), {kept} kept: \
{kept * 12 * r["parameters"] / 1e9:,.0f} GB; weights in half precision {r["parameters"] / 5e8:.2f}

The same steps on more GPUs; efficiency of each against 8, states sharded in a node, over all
GPUs, and in a node with one 100 Gb/s card
   GPUs    batch  step ms  exposed    tokens/s   hours    node    all   slow
{NL.join(more)}"""


def score(folder: Path) -> dict:
    """{quantity: [predicted, happened]} of a run folder, and the fraction of the roof it reached.

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
    c = TrainConfig(**{k: ran[k] for k in fields if k in ran and k != "device"})
    P, gpus = parameter_count(c.model), ran["world_size"]
    kind = [k for k in GPUS if all(part.upper() in ran["device"] for part in k.split("-"))]
    if kind:
        plan = report(Config(**dataclasses.asdict(c), gpu=kind[0], gpus=gpus))
        roof, expected = plan["roofline_tokens_per_s"], plan["expected"]["tokens_per_s"]
    else:
        number, unit = re.search(r"([\d,.]+) ([GT])FLOP/s", ran["roof"]).groups()
        roof = float(number.replace(",", "")) * {"G": 1e9, "T": 1e12}[unit]
        roof *= gpus / flops_per_token(c.model)
        expected = CPU_FRACTION * roof
    tokens_per_s, mfu = (statistics.median(r[k] for r in lines) for k in ("tokens_per_s", "mfu"))
    done = lines[-1]["step"]
    rows = {
        "parameters": [P, ran["parameters"]],
        "steps": [c.max_steps, done],
        "seconds": [done * c.seqs_per_step * c.seq_len / expected, lines[-1]["seconds"]],
        "tokens/s, median": [expected, tokens_per_s],
        "MFU, median": [mfu * expected / tokens_per_s, mfu],
    }
    if kind and "memory_gib" in lines[-1]:
        peak_bytes = max(line["memory_gib"] for line in lines) * 2**30
        rows["memory, GB"] = [sum(plan["memory_bytes"].values()) / 1e9, peak_bytes / 1e9]
    if checkpoint.steps(folder):
        files = checkpoint.find(folder, newest=True).rglob("*")
        rows["checkpoint, MB"] = [12 * P / 1e6, sum(f.stat().st_size for f in files) / 1e6]
    of = "the kernels' roofline" if kind else ran["roof"]
    return {"rows": rows, "fraction": tokens_per_s / roof, "roof": of}


def show_score(r: dict) -> str:
    lines = [f"  {'':<20}{'predicted':>16}{'happened':>16}{'ratio':>9}"]
    for name, pair in r["rows"].items():
        told, was = (f"{x:,.3f}" if x < 10 else f"{x:,.0f}" for x in pair)
        lines.append(f"  {name:<20}{told:>16}{was:>16}{pair[1] / pair[0]:>9.3f}")
    return NL.join([*lines, f"  reached {r['fraction']:.1%} of {r['roof']}"])


def main() -> None:
    c = parse(Config, toml=True)
    result = score(c.score) if c.score else report(c)
    text = show_score(result) if c.score else show(c, result)
    print(json.dumps(result, indent=1) if c.json else text)


if __name__ == "__main__":
    run(main)
