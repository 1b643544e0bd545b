"""Train a model on token shards.

    python train.py configs/demo.toml                             one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py configs/phi1_base.toml   eight GPUs
    python train.py configs/demo.toml --resume                    continue from the last checkpoint
    python train.py configs/demo.toml --check                     does it fit? writes nothing
    python train.py configs/phi1.toml --init_from=out/phi1_base   finetune another run's weights

docs/training.md has the command for two machines. On SIGTERM, SIGUSR1 or Ctrl-C to any rank, the
run finishes the step, saves a checkpoint and exits.

A step is one optimiser step on `seqs_per_step` sequences of `seq_len` tokens, with gradients
accumulated over micro-batches. Its data depends only on (seed, step): see data/loader.py. A step
never waits for the GPU; metrics are read back only when a log line is due.
"""

import math
import os
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import checkpoint, distributed, memory, runlog
from common.config import UserError, differences, parse, require, run
from common.distributed import DTYPES
from common.muon import Muon
from data.loader import Loader, Windows, arguments, read_weights
from eval.gold import bits_per_byte, read_gold
from model import ModelConfig, Phi, flops_per_token, mfu, select_dtype, select_kernels
from tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Train a model on token shards, with plain python or torchrun."""

    out: Path = Path("out/run")  # run folder: config, metrics, checkpoints
    data: tuple[Path, ...] = (Path("out/tokens"),)  # folder of token shards from data.pack, or
    # FOLDER:WEIGHT to set its share of the training tokens; may be repeated
    init_from: Path | None = None  # run or checkpoint folder to load initial weights from
    resume: bool = False  # continue from the newest checkpoint in out, if there is one
    restart: bool = False  # delete the run in out first if its config, data or code differ
    check: bool = False  # run a few steps, report memory use and what fits; write nothing

    max_steps: int = 1000  # optimiser steps
    seqs_per_step: int = 8  # sequences per step, over all ranks and micro-steps
    micro_batch: int = 8  # max sequences per forward pass on a rank; lower it if memory runs out
    optimizer: str = "adamw"  # adamw, or muon: Muon for the blocks' matrices, AdamW for the rest
    lr: float = 1e-3  # peak learning rate
    schedule: str = "linear"  # linear, cosine, or wsd (stable, then linear decay)
    decay_frac: float = 0.2  # fraction of the steps in which wsd decays
    warmup_steps: int = 50  # steps of linear warmup
    final_lr_frac: float = 0.0  # learning rate at the last step, as a fraction of the peak
    weight_decay: float = 0.1  # for matrices only, not biases and LayerNorms
    beta1: float = 0.9  # Adam's first-moment decay
    beta2: float = 0.95  # Adam's second-moment decay
    adam_eps: float = 1e-8  # Adam's epsilon
    grad_clip: float = 1.0  # max global gradient norm, 0 = no clipping
    doc_mask: bool = False  # mask attention between documents in the same row
    best_fit: bool = False  # pack rows without cutting any document that fits; needs doc_mask

    eval_interval: int = 100  # steps between evaluations; each saves a checkpoint too
    eval_seqs: int = 32  # validation sequences per evaluation
    eval_problems: Path | None = None  # problems in HumanEval's format; each evaluation also logs
    # the bits per byte of their solutions given the prompts
    score_every: int = 0  # evaluations between greedy pass@1 scores on eval_problems, 0 = none;
    # eval.humaneval runs on rank 0 while the others wait, and is stopped after timeout_s / 2
    keep: int = 2  # number of newest checkpoints to keep, besides the best
    keep_every: int = 0  # also keep checkpoints at multiples of this step, 0 = none
    log_interval: int = 10  # steps between lines in metrics.jsonl
    seed: int = 1337  # seeds the weights, the data order and dropout
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16 (with loss scaling); auto is bfloat16
    # on a GPU, or on a CPU if a short benchmark finds it faster, else float32
    compile: bool = False  # torch.compile the blocks, unless Triton computes them (see kernels)
    matmul: str = "plain"  # plain, or fp8: 8-bit matmuls in the blocks' projections, on a GPU of
    # sm_90 or later (a CPU emulates it slowly)
    recompute: bool = False  # save only each block's input and recompute the rest in backward
    shard: int = 0  # ranks sharing one copy of masters and optimiser states, 0 = all on a machine
    regather: bool = False  # gather a block's weights for each use instead of once per step: less
    # memory, more communication
    timeout_s: int = 600  # seconds before an unresponsive rank counts as lost
    threads: int = 0  # CPU threads per rank, 0 = cores / ranks on this machine
    wandb: str = ""  # Weights & Biases project to log metrics to

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_steps", "seqs_per_step", "micro_batch", "eval_interval", "eval_seqs",
                     "keep", "log_interval", "timeout_s"):  # fmt: skip
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("keep_every", "shard", "grad_clip", "threads", "score_every"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "lr", self.lr > 0, "a positive number")
        require(self, "dtype", self.dtype in ("auto", *DTYPES), f"auto, {', '.join(DTYPES)}")
        require(self, "optimizer", self.optimizer in ("adamw", "muon"), "adamw or muon")
        known = self.schedule in ("linear", "cosine", "wsd")
        require(self, "schedule", known, "linear, cosine or wsd")
        require(self, "decay_frac", 0 < self.decay_frac <= 1, "more than 0, at most 1")
        require(self, "matmul", self.matmul in ("plain", "fp8"), "plain or fp8")
        require(self, "compile", self.matmul == "plain" or not self.compile, "false with fp8")
        require(self, "best_fit", self.doc_mask or not self.best_fit, "--doc_mask as well")
        asks = self.eval_problems or not self.score_every
        require(self, "score_every", asks, "--eval_problems as well")
        require(self, "device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


def get_lr(step: int, c: TrainConfig) -> float:
    """Warm up linearly to c.lr over warmup_steps, then decay to final_lr_frac * c.lr."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    decay_steps = c.max_steps - c.warmup_steps
    if c.schedule == "wsd":
        decay_steps = min(decay_steps, round(c.decay_frac * c.max_steps))
    left = min(1.0, (c.max_steps - step) / max(1, decay_steps))
    if c.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return c.lr * (c.final_lr_frac + (1 - c.final_lr_frac) * left)


def make_optimizer(model: Phi, c: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimiser; decay matrices (the embedding too), but not biases and LayerNorms."""
    muon = c.optimizer == "muon"
    rest = [p for n, p in model.named_parameters() if not (muon and n.endswith(("w_in", "w_out")))]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    adamw = torch.optim.AdamW(groups, c.lr, (c.beta1, c.beta2), c.adam_eps, fused=True)
    return Muon(model.blocks, adamw, c.lr, c.weight_decay) if muon else adamw


def train_step(c: TrainConfig, model, optimizer, guard, batches, micro_steps: int):
    """Accumulate gradients, clip, update; return on-device loss, gradient norm, 1.0 if taken."""
    step_loss = torch.zeros_like(guard.scale)
    for micro_step in range(micro_steps):
        distributed.begin_micro_step(model, micro_step == micro_steps - 1, c.regather)
        loss = model(**next(batches)) / micro_steps
        (loss * guard.scale).backward()
        step_loss += loss.detach()
    grad_norm = guard.clip(model, optimizer, c.grad_clip)
    optimizer.step()  # its kernel applies the clip scale, and skips a non-finite step
    optimizer.zero_grad(set_to_none=True)
    return step_loss, grad_norm, guard.update(optimizer)


@torch.no_grad()
def evaluate(model, val: Windows, c: TrainConfig, ranks, end_of_text: int | None) -> float:
    """Return the mean loss over eval_seqs validation windows, split across the ranks.

    Use the first windows of a single folder, evenly spaced windows of several. Every rank runs the
    same number of forward passes, because they gather weights; spare ones count with weight 0.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum of losses, sequences
    n = min(c.eval_seqs, len(val))
    everyones = np.arange(n) * (len(val) // n if len(c.data) > 1 else 1)
    mine = everyones[ranks.rank :: ranks.world_size]
    for i in range(0, len(everyones[:: ranks.world_size]), c.micro_batch):
        rows = mine[i : i + c.micro_batch]
        batch = torch.from_numpy(val[rows if len(rows) else everyones[:1]].astype(np.int64))
        loss = model(**arguments(batch.to(ranks.device), end_of_text))
        total += torch.stack([loss.double() * len(rows), torch.full_like(loss, len(rows)).double()])
    if ranks.world_size > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


def open_data(c: TrainConfig) -> tuple[Tokenizer, Windows, Windows]:
    """Return the tokenizer and both splits of c.data. Raise UserError if they do not fit c."""
    folders, weights = read_weights(c.data)
    tokenizer = Tokenizer(folders[0])
    if tokenizer.vocab_size > c.vocab_size:
        raise UserError(
            f"the tokenizer in {folders[0]} has {tokenizer.vocab_size} pieces, more than the "
            f"model's vocab_size {c.vocab_size}; raise --vocab_size"
        )
    train, val = (Windows(folders, s, c.seq_len, tokenizer, c.seed, weights, c.best_fit)
                  for s in ("train", "val"))  # fmt: skip
    return tokenizer, train, val


def load_init(model: Phi, c: TrainConfig, tokenizer: Tokenizer) -> Path | None:
    """Load the weights from c.init_from, if set; return the checkpoint folder."""
    if not c.init_from:
        return None
    folder = checkpoint.find(c.init_from)
    meta = checkpoint.read_meta(folder)
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was trained with another tokenizer than the one in {c.data[0]}; pack the "
            "data with the checkpoint's tokenizer"
        )
    for name in ("n_head", "rotary_dim", "qk_norm"):  # not visible in any weight's shape
        if (was := meta["model"].get(name, getattr(ModelConfig, name))) != getattr(c, name):
            raise UserError(f"{folder} has {name} = {was}; train with --{name}={was}")
    checkpoint.load_weights(model, folder)
    return folder


def banner(c: TrainConfig, resolved: dict, where: str, windows: Windows) -> str:
    """Return the run's summary: non-default options, model size, hardware, amount of work."""
    r, tokens_per_step = resolved, c.seqs_per_step * c.seq_len
    shown = {key: r[key] for key in differences(c)}
    packed = f", {windows.padding_frac:.2%} padding" if c.best_fit else ""
    return "".join(f"  {key} = {value}\n" for key, value in shown.items()) + (
        f"{r['parameters']:,} parameters on {r['world_size']} x {where}; "
        f"{c.max_steps:,} steps x {tokens_per_step:,} tokens = "
        f"{c.max_steps * c.seqs_per_step / len(windows):.2f} epochs of {windows.tokens:,}{packed}\n"
        f"{flops_per_token(c.model) / 1e6:,.1f} MFLOP/token, causal; MFU is relative to {r['roof']}"
    )


def main() -> None:
    c = parse(TrainConfig, toml=True)
    before = runlog.dtype_before(c.out) if c.dtype == "auto" else None

    def choose_dtype(device: torch.device) -> tuple[str, str]:
        if before:
            return before, "as before"
        read_weights(c.data)  # fails on a missing folder before the benchmark runs
        return select_dtype(c.model, c.dtype, device, c.micro_batch)

    ranks, dtype, why = distributed.start(c.device, c.threads, c.timeout_s, choose_dtype)
    device = ranks.device

    tokenizer, windows, val = open_data(c)
    gold = read_gold(c.eval_problems, tokenizer) if c.eval_problems else None
    end_of_text = tokenizer.end_of_text if c.doc_mask else None
    loader = Loader(windows, c.seqs_per_step, c.micro_batch, ranks.rank, ranks.world_size, device,
                    end_of_text)  # fmt: skip
    tokens_per_step = c.seqs_per_step * c.seq_len

    kernels, why_kernels = select_kernels(c.model, device, c.matmul)
    torch.manual_seed(c.seed)
    model = Phi(c.model, kernels == "triton", c.recompute, c.matmul == "fp8")
    init_from = load_init(model, c, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    if c.compile and kernels == "torch":
        for block in model.blocks:
            block.compile()
    distributed.shard_model(model, ranks, dtype, c.shard, c.regather)
    optimizer = make_optimizer(model, c)
    guard = distributed.Guard(device, scaled=dtype == torch.float16)
    take_step = partial(train_step, c, model, optimizer, guard)

    # All input is validated above, before anything is written.
    identity = runlog.run_identity(c, tokenizer, windows, init_from)
    roof, roof_name = ranks.from_first(lambda: runlog.peak_flops(device))
    resolved = runlog.plain(c) | identity | {
        "world_size": ranks.world_size, "compute_dtype": str(dtype)[6:], "kernels_used": kernels,
        "parameters": parameters, "roof": roof_name} | runlog.environment()  # fmt: skip
    computed = f"{resolved['compute_dtype']} ({why}), kernels: {kernels} ({why_kernels})"
    told = banner(c, resolved, f"{device.type} in {computed}", windows)
    if c.check:
        if ranks.rank == 0:
            print(told)
        memory.check(c, ranks, dtype, model, optimizer, loader, take_step)
        return distributed.leave()
    resume = c.resume or ranks.restarts > 0
    resume_from = ranks.from_first(lambda: runlog.open_run(c, identity, resume))
    log = runlog.RunLog(c, ranks, resolved)
    log.say(told)
    saving, talking = (distributed.cpu_group(c.timeout_s) for _ in range(2))
    saver = checkpoint.Saver(c.out, ranks.rank, saving, c.keep, c.keep_every)
    signals = distributed.Signals(talking)
    facts = {k: identity[k] for k in ("data_checksum", "code")} | {"run": str(c.out)}
    state = checkpoint.RunState(model, optimizer, guard, ranks, tokenizer, saver, facts)
    # Seed last: the code above may draw numbers. Each rank has its own dropout.
    torch.manual_seed(c.seed + 1 + ranks.rank)
    if resume_from:
        log.say(state.restore(resume_from))

    with log.failures(state):
        log.begin(state)
        batches = loader.stream(state.step)
        while True:
            step, stop_signal = state.step, signals.heard()
            evaluate_now = step > 0 and (step % c.eval_interval == 0 or step == c.max_steps)
            with log.paused():
                if evaluate_now or stop_signal:
                    state.save()
                if stop_signal:
                    if problem := saver.finish():
                        raise UserError(f"signal {stop_signal}, and {problem}")
                    log.stopped(step, stop_signal)
                    # torchrun restarts a rank that exits with a non-zero status.
                    sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + stop_signal)
                if evaluate_now:
                    found = {"val_loss": evaluate(model, val, c, ranks, end_of_text)}
                    if gold:
                        measured = gold.measure(model, mutants=False)
                        found["gold_bits_per_byte"] = bits_per_byte(measured)
                    found |= log.score(step, saver)
                    log.validation(step, step * tokens_per_step, found)
            if step == c.max_steps:
                break

            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, c)
            step_loss, grad_norm, taken = take_step(batches, loader.micro_steps)
            state.losses += torch.where(taken > 0, torch.stack([step_loss, taken]), 0.0)
            state.step = step = step + 1
            if not log.due(step):
                continue
            # The only sync of a step: read the metrics since the last log line from the device.
            if ranks.world_size > 1:
                dist.all_reduce(state.losses)
            loss_sum, steps_taken = state.losses.tolist()
            state.losses.zero_()
            seconds, steps = log.since_last(step)
            state.trained_s += seconds
            tokens_per_s = steps * tokens_per_step / seconds
            record = {
                "step": step,
                "tokens": step * tokens_per_step,
                "lr": get_lr(step - 1, c),
                "grad_norm": grad_norm.item(),
                "tokens_per_s": round(tokens_per_s, 1),
                "mfu": round(mfu(c.model, tokens_per_s, roof * ranks.world_size), 4),
                "loader_wait_frac": round(loader.waited_s / seconds, 4),
                "memory_gib": round(runlog.peak_memory_gib(device), 3),
                "skipped": int(guard.skipped),
                "seconds": round(state.trained_s, 2),
            }
            if guard.scaled:
                record["loss_scale"] = guard.scale.item()
            if steps_taken:
                record["loss"] = loss_sum / steps_taken
            if saver.problem:
                log.warn("save failed", step, saver.finish())
            log.training(record, int(guard.most_in_a_row))
            guard.most_in_a_row.zero_()
            loader.waited_s = 0.0

        if problem := saver.finish():
            raise UserError(f"{problem}; then --resume to write it")
        log.finish(state, tokens_per_step)
    distributed.leave()


if __name__ == "__main__":
    run(main)
