"""Train a model on token shards.

    python train.py configs/demo.toml                             one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py configs/phi1_base.toml   eight GPUs
    python train.py configs/demo.toml --resume                    go on from the newest checkpoint
    python train.py configs/phi1.toml --init_from=out/phi1_base   finetune another run's weights

"step" is an optimiser step; it sees `seqs_per_step` sequences of `seq_len` tokens, in micro-batches
whose gradients are accumulated. What a step sees depends on (seed, step) alone: data/loader.py.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from config import UserError, differences, parse, run
from data.documents import write_json
from data.loader import Loader, Windows
from model import ModelConfig, Phi, flops_per_token
from runlog import RunLog, environment, peak_flops
from tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Train a model, under plain python or torchrun."""

    out: Path = Path("out/run")  # run folder: configuration, metrics, checkpoints
    data: Path = Path("out/tokens")  # folder of token shards, from data.pack
    init_from: Path | None = None  # run or checkpoint folder whose weights to start from
    resume: bool = False  # go on from the newest checkpoint in out, if there is one
    restart: bool = False  # if out holds a run of another configuration or data, delete it first

    max_steps: int = 1000  # optimiser steps
    seqs_per_step: int = 8  # sequences in a step, over all ranks and micro-steps
    micro_batch: int = 8  # sequences a rank computes at once, at most; lower it if memory runs out
    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 50  # steps of linear warmup; then linear decay
    final_lr_frac: float = 0.0  # share of lr left at the last step
    weight_decay: float = 0.1  # on matrices only, not on biases and LayerNorms
    beta1: float = 0.9  # Adam's first moment
    beta2: float = 0.95  # Adam's second moment
    adam_eps: float = 1e-8  # Adam's epsilon
    grad_clip: float = 1.0  # largest global gradient norm, 0 = no clipping

    eval_interval: int = 100  # steps between validation losses, each followed by a checkpoint
    eval_seqs: int = 32  # sequences of the validation split that are used
    keep: int = 2  # newest checkpoints kept, beside the best
    log_interval: int = 10  # steps between lines of metrics.jsonl
    seed: int = 1337  # of the weights, the data order and dropout
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16 (with loss scaling); auto is bfloat16
    # on a GPU, float32 elsewhere
    compile: bool = False  # torch.compile the model
    threads: int = 0  # CPU threads a rank uses, 0 = cores / ranks on this machine

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "max_steps",
            "seqs_per_step",
            "micro_batch",
            "eval_interval",
            "eval_seqs",
            "keep",
            "log_interval",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, want at least 1")
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}, want a positive number")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype is {self.dtype!r}, want auto, {', '.join(DTYPES)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device is {self.device!r}, want auto, cpu or cuda")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)}
        )


def get_lr(step: int, c: TrainConfig) -> float:
    """Linear warmup to c.lr over warmup_steps, then linear decay to final_lr_frac of it."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    left = (c.max_steps - step) / max(1, c.max_steps - c.warmup_steps)
    return c.lr * (c.final_lr_frac + (1 - c.final_lr_frac) * left)


def make_optimizer(model: Phi, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices (embedding included) and leaves biases and LayerNorms alone."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decay, "weight_decay": c.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, c.lr, (c.beta1, c.beta2), c.adam_eps, fused=True)


@torch.no_grad()
def evaluate(model, val: Windows, c: TrainConfig, device, autocast, rank, world_size) -> float:
    """Mean loss over the first eval_seqs validation windows, shared among the ranks."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, sequences
    mine = np.arange(min(c.eval_seqs, len(val)))[rank::world_size]
    for i in range(0, len(mine), c.micro_batch):
        batch = torch.from_numpy(val[mine[i : i + c.micro_batch]]).to(device)
        with autocast():
            loss = model(batch[:, :-1], batch[:, 1:])
        total += torch.tensor([loss.item() * len(batch), len(batch)], dtype=torch.float64).to(
            device
        )
    if world_size > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


def open_run(c: TrainConfig, mine: dict) -> Path | None:
    """Decide what to do with a run already in c.out; the checkpoint to resume from, or None."""
    saved = c.out / "config.json"
    if not saved.exists():
        if c.out.exists() and any(c.out.iterdir()):
            raise UserError(f"out {c.out} is there and holds no run; name a new folder")
        return None
    theirs = json.loads(saved.read_text())
    changed = [k for k in mine if mine[k] != theirs.get(k)]
    if changed and c.restart:
        shutil.rmtree(c.out)
        return None
    changed = [k for k in changed if k != "code"]  # mending code is no reason not to resume
    if not c.resume:
        raise UserError(f"out {c.out} already holds a run; --resume it, or name another --out")
    if changed:
        k = changed[0]
        raise UserError(
            f"cannot resume {c.out}: {k} was {theirs.get(k)!r} and is {mine[k]!r} now "
            f"({len(changed)} changed); name another --out, or --restart"
        )
    return checkpoint.find(c.out, newest=True) if checkpoint.steps(c.out) else None


def run_identity(c: TrainConfig, tokenizer, windows: Windows, init_from: Path | None) -> dict:
    """All that shapes a run's result, as JSON values; how and where it runs is left out."""
    how = {"out", "resume", "restart", "micro_batch", "device", "threads", "keep", "log_interval"}
    here = Path(__file__).parent
    code = b"".join((here / f).read_bytes() for f in ("train.py", "model.py", "data/loader.py"))
    return {k: v for k, v in plain(c).items() if k not in how} | {
        "tokenizer": tokenizer.fingerprint,
        "data_checksum": windows.checksum,
        "init_checksum": checkpoint.checksum(init_from) if init_from else None,
        "code": f"{zlib.crc32(code):08x}",
    }


def plain(c: TrainConfig) -> dict:
    """The fields of `c` as JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(c).items()}


def main() -> None:
    c = parse(TrainConfig, toml=True)

    # Ranks, device, seed.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_cuda = c.device != "cpu" and torch.cuda.is_available()
    if c.device == "cuda" and not use_cuda:
        raise UserError("device is cuda, but torch sees no GPU; use --device=cpu")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(c.threads or max(1, (os.cpu_count() or 1) // local_ranks))
    micro_batch = min(c.micro_batch, max(1, c.seqs_per_step // world_size))
    if c.seqs_per_step % (micro_batch * world_size):
        raise UserError(
            f"seqs_per_step {c.seqs_per_step} is not divisible by micro_batch {micro_batch} x "
            f"{world_size} ranks; change micro_batch or the number of ranks"
        )
    dtype = DTYPES[("bfloat16" if use_cuda else "float32") if c.dtype == "auto" else c.dtype]

    # Data and tokenizer, run folder.
    if not c.data.is_dir():
        raise UserError(
            f"data {c.data}: no such folder; make token shards with data.pack, or name "
            "a configuration, as in `python train.py configs/demo.toml`"
        )
    tokenizer = Tokenizer(c.data)
    if tokenizer.vocab_size > c.vocab_size:
        raise UserError(
            f"the tokenizer in {c.data} has {tokenizer.vocab_size} pieces, more than the model's "
            f"vocab_size {c.vocab_size}"
        )
    shards = (c.seq_len, tokenizer.vocab_size, tokenizer.fingerprint)
    windows, val = Windows(c.data, "train", *shards), Windows(c.data, "val", *shards)
    init_from = checkpoint.find(c.init_from) if c.init_from else None
    identity = run_identity(c, tokenizer, windows, init_from)
    if world_size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    say = print if rank == 0 else lambda *args, **kwargs: None

    # Model and optimiser, new, initialised from another run, or resumed. An existing run is not
    # touched until all that can be wrong with the input has been found.
    torch.manual_seed(c.seed)
    model = Phi(c.model)
    if init_from:
        if checkpoint.read_meta(init_from)["tokenizer"] != tokenizer.fingerprint:
            raise UserError(f"{init_from} was trained with another tokenizer than {c.data}")
        checkpoint.load_weights(model, init_from)
    resume_from = [open_run(c, identity) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(resume_from)
    [resume_from] = resume_from
    if resume_from:
        checkpoint.load_weights(model, resume_from)
    model.to(device).train()
    optimizer = make_optimizer(model, c)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, trained_s = 0, 0.0
    if resume_from:
        training = checkpoint.load_training(resume_from)
        optimizer.load_state_dict(training["optimizer"])
        scaler.load_state_dict(training["scaler"])
        step, trained_s = training["step"], training["trained_s"]
        say(f"resuming from step {step:,} ({resume_from})")
    net = torch.compile(model) if c.compile else model
    if world_size > 1:
        net = DistributedDataParallel(net, device_ids=[local_rank] if use_cuda else None)
    mixed = dtype != torch.float32
    autocast = (lambda: torch.autocast(device.type, dtype)) if mixed else contextlib.nullcontext

    # Derived numbers, printed and saved.
    loader = Loader(windows, c.seqs_per_step, micro_batch, c.seed, rank, world_size, device)
    tokens_per_step = c.seqs_per_step * c.seq_len
    roof, roof_name = peak_flops(device)
    flops = flops_per_token(c.model)
    parameters = sum(p.numel() for p in model.parameters())
    if rank == 0:
        c.out.mkdir(parents=True, exist_ok=True)
        how = {
            "world_size": world_size,
            "compute_dtype": str(dtype)[6:],
            "parameters": parameters,
            "roof": roof_name,
        }
        write_json(c.out / "config.json", plain(c) | identity | how | environment())
    log = RunLog(c.out, step, rank)
    for key, value in differences(c).items():
        say(f"  {key} = {value}")
    say(
        f"{parameters:,} parameters in {str(dtype)[6:]} on {world_size} x {device.type}; "
        f"{c.max_steps:,} steps x {tokens_per_step:,} tokens = "
        f"{c.max_steps * c.seqs_per_step / len(windows):.2f} epochs of {windows.tokens:,}\n"
        f"{flops / 1e6:,.1f} MFLOP a token, causal; MFU is the share of {roof_name}"
    )

    # Generators last, as anything above may draw numbers. Dropout differs between ranks.
    torch.manual_seed(c.seed + 1 + rank)
    if resume_from and len(training["rng"]) == world_size:
        set_rng(training["rng"][rank], device)
    elif resume_from:
        say(
            f"saved by {len(training['rng'])} ranks, resumed by {world_size}: "
            "the same batches, but new dropout masks"
        )

    # The loop.
    best_loss, best_step = log.best()
    batches = loader.stream(step)
    loss_sum, logged_step = torch.zeros((), device=device), step
    began = time.perf_counter()  # of the steps since the last log line, evaluations left out
    while True:
        if step > 0 and (step % c.eval_interval == 0 or step == c.max_steps):
            paused = time.perf_counter()
            save(c, model, optimizer, scaler, tokenizer, step, trained_s, device, rank, world_size)
            val_loss = evaluate(model, val, c, device, autocast, rank, world_size)
            log.write({"step": step, "tokens": step * tokens_per_step, "val_loss": val_loss})
            if val_loss < best_loss:
                best_loss, best_step = val_loss, step
            if rank == 0:
                write_json(c.out / "best.json", {"step": best_step, "val_loss": best_loss})
                checkpoint.keep(c.out, c.keep, best_step)
            log.line(
                f"step {step:,}/{c.max_steps:,}  val loss {val_loss:.4f}"
                + "  (best)" * (best_step == step),
                keep=True,
            )
            began += time.perf_counter() - paused
        if step == c.max_steps:
            break

        lr = get_lr(step, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro_step in range(loader.micro_steps):
            batch = next(batches)  # [micro_batch, T + 1]
            if world_size > 1:  # gradients are averaged over the ranks once a step
                net.require_backward_grad_sync = micro_step == loader.micro_steps - 1
            with autocast():
                loss = net(batch[:, :-1], batch[:, 1:]) / loader.micro_steps
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # Before every checkpoint too, so that a resumed run logs the same lines.
        if step % c.log_interval == 0 or step % c.eval_interval == 0 or step == c.max_steps:
            if world_size > 1:
                dist.all_reduce(loss_sum)
            mean_loss = loss_sum.item() / world_size / (step - logged_step)
            seconds = time.perf_counter() - began
            trained_s += seconds
            tokens_per_s = (step - logged_step) * tokens_per_step / seconds
            mfu = tokens_per_s * flops / (roof * world_size)
            log.write(
                {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "loss": mean_loss,
                    "lr": lr,
                    "grad_norm": grad_norm.item(),
                    "tokens_per_s": round(tokens_per_s, 1),
                    "mfu": round(mfu, 4),
                    "loader_wait_frac": round(loader.waited_s / seconds, 4),
                    "seconds": round(trained_s, 2),
                }
            )
            left_s = (c.max_steps - step) * tokens_per_step / tokens_per_s
            log.line(
                f"step {step:,}/{c.max_steps:,}  loss {mean_loss:.4f}  lr {lr:.2e}  "
                f"{tokens_per_s:,.0f} tok/s  MFU {mfu:.1%}  {left_s / 60:.1f} min left"
            )
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss is {mean_loss} at step {step}; the checkpoints in {c.out} are from "
                    "before: lower lr or grad_clip and start again"
                )
            loss_sum.zero_()
            logged_step, loader.waited_s, began = step, 0.0, time.perf_counter()

    if rank == 0:
        summary = {
            "steps": step,
            "tokens": step * tokens_per_step,
            "best_step": best_step,
            "best_val_loss": best_loss,
            "trained_s": round(trained_s, 1),
            "tokens_per_s": round(step * tokens_per_step / max(trained_s, 1e-9), 1),
            "weights": checkpoint.checksum(checkpoint.find(c.out, newest=True)),
        }
        write_json(c.out / "summary.json", summary)
    say(
        f"done: best val loss {best_loss:.4f} at step {best_step:,}, {trained_s / 60:.1f} min of "
        f"training -> {c.out}"
    )
    if world_size > 1:
        dist.destroy_process_group()


def save(c, model, optimizer, scaler, tokenizer, step, trained_s, device, rank, world_size) -> None:
    """Write a checkpoint of this step, from rank 0; the other ranks only send their RNG states."""
    rng = [get_rng(device)]
    if world_size > 1:
        rng = [None] * world_size
        dist.all_gather_object(rng, get_rng(device))
    if rank == 0:
        training = {
            "step": step,
            "trained_s": trained_s,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": rng,
        }
        checkpoint.save(c.out, step, model, training, tokenizer, {"run": str(c.out)})
    if world_size > 1:
        dist.barrier()


def get_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators that a step draws from."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_rng(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


if __name__ == "__main__":
    run(main)
