"""Train a model on token shards.

    python train.py configs/demo.toml                             one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py configs/phi1_base.toml   eight GPUs
    python train.py configs/demo.toml --resume                    go on from the newest checkpoint
    python train.py configs/phi1.toml --init_from=out/phi1_base   finetune another run's weights
    python train.py --diff configs/phi1.toml configs/phi1_modern.toml    what differs, and why

Two machines, and a job that torchrun starts again after a fault, from the newest checkpoint (the
variable keeps the agents' store apart from the ranks', which dies with rank 0):

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d \\
        --rdzv_endpoint=FIRST_MACHINE:29400 train.py configs/phi1_base.toml      on each of the two

SIGTERM, SIGUSR1 or Ctrl-C, to any rank: the step is finished, a checkpoint is saved, the run ends.

"step" is an optimiser step; it sees `seqs_per_step` sequences of `seq_len` tokens, in micro-batches
whose gradients are accumulated. What a step sees depends on (seed, step) alone: data/loader.py.
Within a step nothing waits for the GPU; numbers are read from it when a log line is due.
"""

import math
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import checkpoint, distributed
from common.config import UserError, differences, parse, run
from common.files import write_json
from common.runlog import (
    RunLog,
    environment,
    open_run,
    peak_flops,
    peak_memory_gib,
    plain,
    run_identity,
)
from data.loader import Loader, Windows, arguments
from diff import show_differences
from model import ModelConfig, Phi, flops_per_token, mfu, select_kernels
from tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPIKE_LINES = 10  # log lines whose median a loss spike is measured from


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
    doc_mask: bool = False  # attention stays within documents, in rows that hold several

    eval_interval: int = 100  # steps between validation losses, each followed by a checkpoint
    eval_seqs: int = 32  # sequences of the validation split that are used
    keep: int = 2  # newest checkpoints kept, beside the best
    keep_every: int = 0  # and those of every step that this divides, 0 = none
    max_skips: int = 20  # stop after this many steps in a row whose gradients are not finite
    spike_nats: float = 1.0  # report a loss this far above the median of the last 10 log lines,
    # 0 = never
    rewinds: int = 0  # times that a spike takes the run back to the checkpoint before, from where
    # it goes on with the data after the spike
    log_interval: int = 10  # steps between lines of metrics.jsonl
    seed: int = 1337  # of the weights, the data order and dropout
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16 (with loss scaling); auto is bfloat16
    # on a GPU, float32 elsewhere
    compile: bool = False  # torch.compile the blocks, where they are torch's (see kernels)
    recompute: bool = False  # keep only the blocks' inputs, and compute the rest again in backward
    shard: int = 0  # ranks that share one copy of masters and optimiser states, 0 = a machine's
    regather: bool = False  # gather a block's weights for each use, rather than once a step: less
    # memory, more communication
    timeout_s: int = 600  # seconds until a rank that does not answer is taken for lost
    threads: int = 0  # CPU threads a rank uses, 0 = cores / ranks on this machine
    tensorboard: bool = False  # write the metrics to out/tensorboard too
    wandb: str = ""  # Weights & Biases project to send the metrics to

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_steps", "seqs_per_step", "micro_batch", "eval_interval", "eval_seqs",
                     "keep", "log_interval", "max_skips", "timeout_s"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, want at least 1")
        for name in ("keep_every", "rewinds", "shard", "spike_nats", "grad_clip", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, want at least 0")
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}, want a positive number")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype is {self.dtype!r}, want auto, {', '.join(DTYPES)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device is {self.device!r}, want auto, cpu or cuda")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


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
    decays = (decay, c.weight_decay), (no_decay, 0.0)
    groups = [{"params": params, "weight_decay": each} for params, each in decays]
    return torch.optim.AdamW(groups, c.lr, (c.beta1, c.beta2), c.adam_eps, fused=True)


@dataclass
class Progress:
    """How far a run is: saved in each checkpoint's meta.json, beside the tensors."""

    step: int = 0  # optimiser steps done
    trained_s: float = 0.0  # time in steps, up to the last log line
    data_offset: int = 0  # steps of data left out by rewinds
    rewound: int = 0  # rewinds so far


@torch.no_grad()
def evaluate(model, val: Windows, c: TrainConfig, ranks, end_of_text: int | None) -> float:
    """Mean loss over the first eval_seqs validation windows, shared among the ranks.

    Every rank makes as many forward passes, because weights are gathered in them; one that has no
    window left computes one whose loss does not count.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum of losses, sequences
    everyones = np.arange(min(c.eval_seqs, len(val)))
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


def main() -> None:
    if sys.argv[1:2] == ["--diff"]:
        return show_differences(TrainConfig, sys.argv[2:])
    c = parse(TrainConfig, toml=True)

    # Ranks, device, precision.
    cuda = c.device != "cpu" and torch.cuda.is_available()
    dtype = DTYPES[("bfloat16" if cuda else "float32") if c.dtype == "auto" else c.dtype]
    ranks = distributed.start(c.device, c.threads, c.timeout_s, in_group=dtype != torch.float32)
    rank, world_size, device = ranks.rank, ranks.world_size, ranks.device
    micro_batch = min(c.micro_batch, max(1, c.seqs_per_step // world_size))
    if c.seqs_per_step % (micro_batch * world_size):
        raise UserError(
            f"seqs_per_step {c.seqs_per_step} is not divisible by micro_batch {micro_batch} x "
            f"{world_size} ranks; change micro_batch or the number of ranks"
        )
    say = print if rank == 0 else lambda *args, **kwargs: None

    # Data and tokenizer.
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
    end_of_text = tokenizer.end_of_text if c.doc_mask else None

    # Model and optimiser. An existing run is not touched until all that can be wrong with the input
    # has been found.
    kernels, why = select_kernels(c.model, device)
    torch.manual_seed(c.seed)
    model = Phi(c.model).train()
    init_from = checkpoint.find(c.init_from) if c.init_from else None
    if init_from:
        if checkpoint.read_meta(init_from)["tokenizer"] != tokenizer.fingerprint:
            raise UserError(f"{init_from} was trained with another tokenizer than {c.data}")
        checkpoint.load_weights(model, init_from)
    parameters = sum(p.numel() for p in model.parameters())
    compiled = c.compile and kernels == "torch"
    distributed.shard_model(model, ranks, dtype, c.shard, c.regather, c.recompute, compiled)
    optimizer = make_optimizer(model, c)
    guard = distributed.Guard(device, scaled=dtype == torch.float16)
    identity = run_identity(c, tokenizer, windows, init_from)
    resume_from = ranks.from_first(lambda: open_run(c, identity, c.resume or ranks.restarts > 0))

    # Derived numbers, printed and saved.
    loader = Loader(
        windows, c.seqs_per_step, micro_batch, c.seed, rank, world_size, device, end_of_text
    )
    tokens_per_step = c.seqs_per_step * c.seq_len
    roof, roof_name = ranks.from_first(lambda: peak_flops(device))
    resolved = plain(c) | identity | {
        "world_size": world_size,
        "compute_dtype": str(dtype)[6:],
        "kernels_used": kernels,
        "parameters": parameters,
        "roof": roof_name,
    } | environment()  # fmt: skip
    if rank == 0:
        c.out.mkdir(parents=True, exist_ok=True)
        write_json(c.out / "config.json", resolved)
    log = RunLog(c.out, rank, c.max_steps, c.tensorboard, c.wandb, resolved)
    for key, value in differences(c).items():
        say(f"  {key} = {value}")
    say(
        f"{parameters:,} parameters in {str(dtype)[6:]} on {world_size} x {device.type}, "
        f"kernels: {kernels} ({why}); "
        f"{c.max_steps:,} steps x {tokens_per_step:,} tokens = "
        f"{c.max_steps * c.seqs_per_step / len(windows):.2f} epochs of {windows.tokens:,}\n"
        f"{flops_per_token(c.model) / 1e6:,.1f} MFLOP a token, causal; MFU is of {roof_name}"
    )
    saver = checkpoint.Saver(c.out, rank, distributed.cpu_group(c.timeout_s), c.keep, c.keep_every)
    signals = distributed.Signals(distributed.cpu_group(c.timeout_s))
    # On each rank, since the last log line: the losses' sum over the steps taken, and their number.
    losses = torch.zeros(2, device=device)

    def state() -> dict[str, torch.Tensor]:
        """All tensors but the weights that the next step depends on; some are this rank's own."""
        own = {"losses": losses, "rng_cpu": torch.get_rng_state()}
        if device.type == "cuda":
            own["rng_cuda"] = torch.cuda.get_rng_state(device)
        own = {f"rank{rank}.{k}": v for k, v in own.items()}
        return distributed.optimizer_state(model, optimizer) | guard.state() | own

    def save() -> None:
        meta = asdict(progress) | {k: identity[k] for k in ("data_checksum", "code")}
        meta |= {"run": str(c.out), "world_size": world_size}
        saver.save(progress.step, model, state(), tokenizer, meta)

    def restore(folder: Path) -> Progress:
        """Take the weights and all other state from a checkpoint of this run."""
        meta, saved = checkpoint.read_meta(folder), state()
        if meta["world_size"] != world_size:  # what ranks have of their own begins anew
            saved = {k: v for k, v in saved.items() if not k.startswith("rank")}
            say(f"saved by {meta['world_size']} ranks: the same batches, but new dropout masks")
        checkpoint.load_training(model, saved, folder)
        torch.set_rng_state(saved.get(f"rank{rank}.rng_cpu", torch.get_rng_state()))
        if f"rank{rank}.rng_cuda" in saved:
            torch.cuda.set_rng_state(saved[f"rank{rank}.rng_cuda"], device)
        return Progress(**{f.name: meta[f.name] for f in fields(Progress)})

    # The generators last, as anything above may draw numbers. Dropout differs between ranks.
    torch.manual_seed(c.seed + 1 + rank)
    progress = Progress()
    if resume_from:
        progress = restore(resume_from)
        say(f"resuming from step {progress.step:,} ({resume_from})")

    def begin():
        """What the loop goes on with from `progress`: batches, losses of late, the best so far."""
        log.go_on_from(progress.step)
        logged = ranks.from_first(log.read)
        late = deque([r["loss"] for r in logged if "loss" in r], maxlen=SPIKE_LINES)
        vals = [(r["val_loss"], r["step"]) for r in logged if "val_loss" in r]
        stream = loader.stream(progress.step + progress.data_offset)
        return stream, late, min(vals, default=(math.inf, 0))

    # The loop.
    saved_step, skipped_before = progress.step, int(guard.skipped)
    try:
        batches, late_losses, best = begin()
        log.event("start", progress.step, world_size=world_size, restarts=ranks.restarts,
                  commit=resolved["commit"])  # fmt: skip
        log.status("running", progress.step)
        # Of the steps since the last log line; evaluations are left out.
        timed_from, began = progress.step, time.perf_counter()
        while True:
            step = progress.step
            stop_signal = signals.heard()
            evaluate_now = step > 0 and (step % c.eval_interval == 0 or step == c.max_steps)
            if (evaluate_now or stop_signal) and step > saved_step:
                paused = time.perf_counter()
                save()
                saved_step = step
                began += time.perf_counter() - paused
            if stop_signal:
                if problem := saver.finish():
                    raise UserError(f"signal {stop_signal}, and {problem}")
                log.event("stop", step, signal=stop_signal)
                log.status("preempted, saved", step)
                say(f"signal {stop_signal}: saved at step {step:,}; --resume goes on from there")
                # torchrun would start a rank again that ends with another status than 0.
                sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + stop_signal)
            if evaluate_now:
                paused = time.perf_counter()
                val_loss = evaluate(model, val, c, ranks, end_of_text)
                log.write({"step": step, "tokens": step * tokens_per_step, "val_loss": val_loss})
                best = min(best, (val_loss, step))
                if rank == 0:
                    write_json(c.out / "best.json", {"step": best[1], "val_loss": best[0]})
                log.line(
                    f"step {step:,}/{c.max_steps:,}  val loss {val_loss:.4f}"
                    + "  (best)" * (best[1] == step),
                    keep=True,
                )
                began += time.perf_counter() - paused
            if step == c.max_steps:
                break

            lr = get_lr(step, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            step_loss = torch.zeros((), device=device)
            for micro_step in range(loader.micro_steps):
                last = micro_step == loader.micro_steps - 1
                distributed.begin_micro_step(model, last, c.regather)
                loss = model(**next(batches)) / loader.micro_steps
                guard.backward(loss)
                step_loss += loss.detach()
            grad_norm, taken = guard.finish_step(model, optimizer, c.grad_clip)
            losses += torch.where(taken > 0, torch.stack([step_loss, taken]), 0.0)
            progress.step = step = step + 1

            # Before every checkpoint too, so that a resumed run logs the same lines.
            if step % c.log_interval and step % c.eval_interval and step != c.max_steps:
                continue
            if world_size > 1:
                dist.all_reduce(losses)
            loss_sum, steps_taken = losses.tolist()
            seconds = time.perf_counter() - began
            progress.trained_s += seconds
            tokens_per_s = (step - timed_from) * tokens_per_step / seconds
            used = mfu(c.model, tokens_per_s, roof * world_size)
            skips, skips_in_a_row = int(guard.skipped), int(guard.most_in_a_row)
            record = {
                "step": step,
                "tokens": step * tokens_per_step,
                "lr": lr,
                "grad_norm": grad_norm.item(),
                "tokens_per_s": round(tokens_per_s, 1),
                "mfu": round(used, 4),
                "loader_wait_frac": round(loader.waited_s / seconds, 4),
                "memory_gib": round(peak_memory_gib(device), 3),
                "skipped": skips,
                "seconds": round(progress.trained_s, 2),
            }
            if dtype == torch.float16:
                record["loss_scale"] = guard.scale.item()
            if steps_taken:
                record["loss"] = loss_sum / steps_taken
            log.write(record)
            log.status("running", step)
            left_min = (c.max_steps - step) * tokens_per_step / tokens_per_s / 60
            log.line(
                f"step {step:,}/{c.max_steps:,}  loss {record.get('loss', math.nan):.4f}  "
                f"lr {lr:.2e}  {tokens_per_s:,.0f} tok/s  MFU {used:.1%}  {left_min:.1f} min left"
            )
            if saver.problem:
                log.warn("save failed", step, saver.finish())
            if skips > skipped_before:
                log.warn("skipped", step, f"{skips - skipped_before} steps up to {step:,} skipped: "
                         "their gradients were not finite")  # fmt: skip
            if skips_in_a_row >= c.max_skips:
                raise UserError(
                    f"the gradients of {skips_in_a_row} steps in a row, up to step {step:,}, were "
                    f"not finite; the checkpoints in {c.out} are from before: lower lr or grad_clip"
                )
            usual = statistics.median(late_losses) if len(late_losses) == SPIKE_LINES else math.inf
            spike = c.spike_nats and record.get("loss", 0) > usual + c.spike_nats
            if spike:
                log.warn("spike", step, f"the loss rose to {record['loss']:.3f} at step {step:,}, "
                         f"from about {usual:.3f}")  # fmt: skip
            if "loss" in record:
                late_losses.append(record["loss"])
            losses.zero_()
            guard.most_in_a_row.zero_()
            skipped_before = skips
            if spike and progress.rewound < c.rewinds:
                saver.wait()
                folder = ranks.from_first(lambda: checkpoint.newest_good(c.out))
                if folder:
                    rewound, data_step = progress.rewound + 1, step + progress.data_offset
                    progress = restore(folder)
                    progress.rewound, progress.data_offset = rewound, data_step - progress.step
                    saved_step = progress.step
                    batches, late_losses, best = begin()
                    log.warn("rewind", progress.step, f"back to step {progress.step:,}, and on "
                             f"without the data of {step - progress.step:,} steps")  # fmt: skip
            timed_from, loader.waited_s, began = progress.step, 0.0, time.perf_counter()

        if problem := saver.finish():
            raise UserError(f"{problem}; then --resume to write it")
        summary = {
            "steps": step,
            "tokens": step * tokens_per_step,
            "best_step": best[1],
            "best_val_loss": best[0],
            "trained_s": round(progress.trained_s, 1),
            "tokens_per_s": round(step * tokens_per_step / max(progress.trained_s, 1e-9), 1),
            "skipped": int(guard.skipped),
            "rewound": progress.rewound,
        }
        if rank == 0:
            summary["weights"] = checkpoint.checksum(checkpoint.find(c.out, newest=True))
            write_json(c.out / "summary.json", summary)
        log.event("done", step)
        log.status("done", step)
    except Exception as e:
        saver.wait()  # a save begins before the evaluation that may have failed
        lost = distributed.lost_rank(e, rank)
        log.event("failed", progress.step, error=str(lost or e))
        log.status("failed", progress.step, error=str(lost or e))
        if lost:
            raise lost from e
        raise
    say(
        f"done: best val loss {best[0]:.4f} at step {best[1]:,}, {progress.trained_s / 60:.1f} min "
        f"of training -> {c.out}"
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
