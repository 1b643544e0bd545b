"""Train a model on token shards.

    python train.py configs/demo.toml                             one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py configs/phi1_base.toml   eight GPUs
    python train.py configs/demo.toml --resume                    go on from the newest checkpoint
    python train.py configs/demo.toml --check                     will it fit? writes nothing
    python train.py configs/phi1.toml --init_from=out/phi1_base   finetune another run's weights

README.md has the command for two machines. SIGTERM, SIGUSR1 or Ctrl-C, to any rank, finish the
step, save a checkpoint and end the run.

A step is an optimiser step: `seqs_per_step` sequences of `seq_len` tokens, in micro-batches whose
gradients are accumulated. What it sees depends on (seed, step) alone: data/loader.py. Nothing in a
step waits for the GPU; numbers are read from it when a log line is due.
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
    """Train a model, under plain python or torchrun."""

    out: Path = Path("out/run")  # run folder: configuration, metrics, checkpoints
    data: tuple[Path, ...] = (Path("out/tokens"),)  # folders of token shards, from data.pack, each
    # alone or as FOLDER:WEIGHT, its share of the training tokens; may be given several times
    init_from: Path | None = None  # run or checkpoint folder whose weights to start from
    resume: bool = False  # go on from the newest checkpoint in out, if there is one
    restart: bool = False  # if out holds a run of another configuration or data, delete it first
    check: bool = False  # write nothing: take a few steps, say what they need and what fits

    max_steps: int = 1000  # optimiser steps
    seqs_per_step: int = 8  # sequences in a step, over all ranks and micro-steps
    micro_batch: int = 8  # sequences a rank computes at once, at most; lower it if memory runs out
    optimizer: str = "adamw"  # adamw, or muon for the blocks' matrices and adamw for the rest
    lr: float = 1e-3  # peak learning rate
    schedule: str = "linear"  # linear, cosine, or wsd: stable, then a linear decay
    decay_frac: float = 0.2  # share of the steps that wsd decays in
    warmup_steps: int = 50  # steps of linear warmup
    final_lr_frac: float = 0.0  # share of the peak left at the last step
    weight_decay: float = 0.1  # on matrices only, not on biases and LayerNorms
    beta1: float = 0.9  # Adam's first moment
    beta2: float = 0.95  # Adam's second moment
    adam_eps: float = 1e-8  # Adam's epsilon
    grad_clip: float = 1.0  # largest global gradient norm, 0 = no clipping
    doc_mask: bool = False  # attention stays within documents, in rows that hold several
    best_fit: bool = False  # cut no document that fits into a row; wants doc_mask

    eval_interval: int = 100  # steps between validation losses, each followed by a checkpoint
    eval_seqs: int = 32  # sequences of the validation split that are used
    eval_problems: Path | None = None  # file in HumanEval's format: the bits per byte of its
    # solutions, given their prompts, are logged as well
    score_every: int = 0  # evaluations from one pass@1 on eval_problems to the next, 0 = none:
    # greedy, by eval.humaneval on rank 0; the others wait, so let it take less than timeout_s
    keep: int = 2  # newest checkpoints kept, beside the best
    keep_every: int = 0  # and those of every step that this divides, 0 = none
    log_interval: int = 10  # steps between lines of metrics.jsonl
    seed: int = 1337  # of the weights, the data order and dropout
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16 (with loss scaling); auto is bfloat16
    # on a GPU, and on a CPU where a short measurement finds it faster; float32 elsewhere
    compile: bool = False  # torch.compile the blocks, where they are torch's (see kernels)
    matmul: str = "plain"  # plain, or fp8: train with 8-bit products in the blocks' projections, on
    # a GPU of sm_90 or later; a CPU emulates that, slowly
    recompute: bool = False  # keep only the blocks' inputs, and compute the rest again in backward
    shard: int = 0  # ranks that share one copy of masters and optimiser states, 0 = a machine's
    regather: bool = False  # gather a block's weights for each use, rather than once a step: less
    # memory, more communication
    timeout_s: int = 600  # seconds until a rank that does not answer is taken for lost
    threads: int = 0  # CPU threads a rank uses, 0 = cores / ranks on this machine
    wandb: str = ""  # Weights & Biases project to send the metrics to

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
        require(self, "best_fit", self.doc_mask or not self.best_fit, "doc_mask with it")
        asks = self.eval_problems or not self.score_every
        require(self, "score_every", asks, "eval_problems with it")
        require(self, "device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


def get_lr(step: int, c: TrainConfig) -> float:
    """Warm up linearly to c.lr over warmup_steps, then decay to final_lr_frac of it."""
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
    """Make the optimiser. Matrices decay (embedding too), biases and LayerNorms do not."""
    muon = c.optimizer == "muon"
    rest = [p for n, p in model.named_parameters() if not (muon and n.endswith(("w_in", "w_out")))]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    adamw = torch.optim.AdamW(groups, c.lr, (c.beta1, c.beta2), c.adam_eps, fused=True)
    return Muon(model.blocks, adamw, c.lr, c.weight_decay) if muon else adamw


def train_step(c: TrainConfig, model, optimizer, guard, batches, micro_steps: int):
    """Micro-batches forward and backward, clip, update; return loss, gradient norm, 1.0 if taken.

    All three are scalars on the device.
    """
    step_loss = torch.zeros_like(guard.scale)
    for micro_step in range(micro_steps):
        distributed.begin_micro_step(model, micro_step == micro_steps - 1, c.regather)
        loss = model(**next(batches)) / micro_steps
        (loss * guard.scale).backward()
        step_loss += loss.detach()
    grad_norm = guard.clip(model, optimizer, c.grad_clip)
    optimizer.step()  # its kernel scales as clip said, and skips what is not finite
    optimizer.zero_grad(set_to_none=True)
    return step_loss, grad_norm, guard.update(optimizer)


@torch.no_grad()
def evaluate(model, val: Windows, c: TrainConfig, ranks, end_of_text: int | None) -> float:
    """Return the mean loss over eval_seqs validation windows, shared among the ranks.

    Take the first windows of one folder, evenly spaced ones of several.
    Every rank makes as many forward passes, as weights are gathered in them; one that has no window
    left computes one that does not count.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum of losses, sequences
    n = min(c.eval_seqs, len(val))
    everyones = np.arange(n) * (len(val) // n if len(c.data) > 1 else 1)  # of all folders
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
    """Return the tokenizer and both splits of c.data. Raises UserError if they do not fit c."""
    folders, weights = read_weights(c.data)
    tokenizer = Tokenizer(folders[0])
    if tokenizer.vocab_size > c.vocab_size:
        raise UserError(
            f"the tokenizer in {folders[0]} has {tokenizer.vocab_size} pieces, more than the "
            f"model's vocab_size {c.vocab_size}"
        )
    train, val = (Windows(folders, s, c.seq_len, tokenizer, c.seed, weights, c.best_fit)
                  for s in ("train", "val"))  # fmt: skip
    return tokenizer, train, val


def load_init(model: Phi, c: TrainConfig, tokenizer: Tokenizer) -> Path | None:
    """Load the weights that c.init_from names, if it does; return their folder."""
    if not c.init_from:
        return None
    folder = checkpoint.find(c.init_from)
    meta = checkpoint.read_meta(folder)
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"{folder} was trained with another tokenizer than {c.data[0]}")
    for name in ("n_head", "rotary_dim", "qk_norm"):  # of which no weight's shape tells
        if (was := meta["model"].get(name, getattr(ModelConfig, name))) != getattr(c, name):
            raise UserError(f"{folder} has {name} = {was}; train with --{name}={was}")
    checkpoint.load_weights(model, folder)
    return folder


def banner(c: TrainConfig, resolved: dict, where: str, windows: Windows) -> str:
    """Say what will be trained: the options that are not defaults, size, place, work."""
    r, tokens_per_step = resolved, c.seqs_per_step * c.seq_len
    shown = {key: r[key] for key in differences(c)}
    packed = f", {windows.padding_frac:.2%} padding" if c.best_fit else ""
    return "".join(f"  {key} = {value}\n" for key, value in shown.items()) + (
        f"{r['parameters']:,} parameters on {r['world_size']} x {where}; "
        f"{c.max_steps:,} steps x {tokens_per_step:,} tokens = "
        f"{c.max_steps * c.seqs_per_step / len(windows):.2f} epochs of {windows.tokens:,}{packed}\n"
        f"{flops_per_token(c.model) / 1e6:,.1f} MFLOP a token, causal; MFU is of {r['roof']}"
    )


def main() -> None:
    c = parse(TrainConfig, toml=True)
    before = runlog.dtype_before(c.out) if c.dtype == "auto" else None

    def choose_dtype(device: torch.device) -> tuple[str, str]:
        if before:
            return before, "as before"
        return select_dtype(c.model, c.dtype, device, c.micro_batch)

    ranks, dtype, why = distributed.start(c.device, c.threads, c.timeout_s, choose_dtype)
    device = ranks.device

    tokenizer, windows, val = open_data(c)
    gold = read_gold(c.eval_problems, tokenizer) if c.eval_problems else None
    end_of_text = tokenizer.end_of_text if c.doc_mask else None
    loader = Loader(windows, c.seqs_per_step, c.micro_batch, ranks.rank, ranks.world_size, device,
                    end_of_text)  # fmt: skip
    tokens_per_step = c.seqs_per_step * c.seq_len

    # Model and optimizer.
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

    # The run's folder, which is not touched before all that can be wrong with the input was found.
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
    # The generators last, as anything above may draw numbers. Dropout differs between ranks.
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
                    # torchrun would start a rank again that ends with another status than 0.
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
            # The numbers of the steps since the last log line, read from the device here only.
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
