"""Time a training step of ours beside torch.compile and transformers, and say where ours goes.

    python -m bench.step configs/phi1.toml               all three
    python -m bench.step configs/phi1.toml --impl=ours   one of them

A step is `micro_steps` times forward and backward, then clipping and AdamW, on random tokens, under
autocast for all three: fp32 weights and optimiser states, matrices in half precision. (train.py has
FSDP2 cast the weights, once a step rather than once a micro-batch.) The micro-batch is the
configuration's, halved until it fits. The peers' blocks are compiled, where there is a GPU; a whole
model would take minutes. MFU is over the data sheet's peak, causal FLOPs; the profile's floors are
cost.py's, at the rates of a large matmul and a large copy timed in the same run.
"""

import contextlib
import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from bench.timing import (
    CudaTimer,
    WallTimer,
    emit,
    floors_us,
    measured_roof,
    percentiles,
    profile,
    show_profile,
    synchronize,
)
from common.config import UserError, parse, run
from common.runlog import peak_flops
from model import ModelConfig, Phi, flops_per_token, mfu, parameter_count, select_kernels
from train import DTYPES, TrainConfig, make_optimizer

LARGE = 50_000_000  # parameters: a CPU takes minutes a step


@dataclass(frozen=True)
class Config(TrainConfig):
    """Time training steps: ours, torch (compiled) and transformers (sdpa, compiled)."""

    impl: str = ""  # ours, torch or transformers; all three if not given
    steps: int = 10  # timed steps, after two that are not
    micro_steps: int = 1  # micro-batches a step accumulates
    kernels_shown: int = 30  # lines of the profile
    json: bool = False  # print lines of JSON too

    def __post_init__(self):
        super().__post_init__()
        if self.impl not in ("", *MODELS):
            raise UserError(f"impl is {self.impl!r}, want one of {', '.join(MODELS)}")
        for name in ("steps", "micro_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, want at least 1")


@dataclass(frozen=True)
class Result:
    """One implementation's step."""

    impl: str
    micro_batch: int = 0
    p20_ms: float = math.nan
    p50_ms: float = math.nan
    p80_ms: float = math.nan
    tokens_per_s: float = math.nan
    mfu: float = math.nan
    peak_gib: float = math.nan  # of GPU memory
    loss: float = math.nan  # of the first step: near ln(V), and alike for all
    note: str = ""  # why there are no numbers


def phi(c: Config, kernels: str) -> Phi:
    shape = dataclasses.replace(c.model, kernels=kernels)
    kernels, _ = select_kernels(shape, device_of(c))  # or a UserError that says why not
    return Phi(shape, kernels == "triton")


class HuggingFace(torch.nn.Module):
    """transformers' Phi, called as ours is."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        try:
            from transformers import PhiConfig, PhiForCausalLM
        except ImportError:
            raise UserError("transformers is not installed: pip install transformers") from None
        config = PhiConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            max_position_embeddings=c.seq_len, partial_rotary_factor=c.rotary_dim / c.head_dim,
            rope_theta=c.rope_theta, layer_norm_eps=1e-5, hidden_act="gelu_new",
            resid_pdrop=c.dropout, attention_dropout=c.dropout, tie_word_embeddings=False,
            use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        self.net = PhiForCausalLM(config)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        targets = targets.contiguous()
        return self.net(input_ids=idx, labels=targets, shift_labels=targets).loss


MODELS: dict[str, Callable] = {
    "ours": lambda c: phi(c, "triton"),
    "torch": lambda c: compile_blocks(phi(c, "torch"), "blocks", c),
    "transformers": lambda c: compile_blocks(HuggingFace(c.model), "net.model.layers", c),
}


def device_of(c: Config) -> torch.device:
    cuda = torch.cuda.is_available()
    if c.device == "cuda" and not cuda:
        raise UserError("device is cuda, and there is no CUDA device here; try --device=cpu")
    return torch.device("cuda" if cuda and c.device != "cpu" else "cpu")


def compile_blocks(model: torch.nn.Module, blocks: str, c: Config) -> torch.nn.Module:
    """Compile the blocks in place on a GPU; on a CPU that takes longer than the steps do."""
    for block in model.get_submodule(blocks) if device_of(c).type == "cuda" else ():
        block.compile(dynamic=False)
    return model


def make_step(c: Config, impl: str, micro_batch: int) -> Callable[[], Tensor]:
    """A function that does one training step and returns its loss, without waiting for it."""
    device = device_of(c)
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[default if c.dtype == "auto" else c.dtype]
    torch.manual_seed(c.seed)
    with torch.device(device):
        model = MODELS[impl](c).train()
    optimizer = make_optimizer(model, c)
    # A scale at which no step overflows: one that does is skipped, and would look fast.
    scaler = torch.amp.GradScaler(device.type, init_scale=1024, enabled=dtype == torch.float16)
    mixed = dtype != torch.float32
    shape = (c.micro_steps, micro_batch, c.seq_len + 1)
    batches = torch.randint(c.vocab_size, shape, device=device)

    def step() -> Tensor:
        total = torch.zeros((), device=device)
        for batch in batches:
            with torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext():
                loss = model(batch[:, :-1], batch[:, 1:]) / c.micro_steps
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(c: Config, impl: str, peak: float) -> Iterator[tuple[Result, Callable | None]]:
    """Time `impl` at the largest of micro_batch, micro_batch / 2, ... that fits; also its step.

    What does not fit gives a result too, without a step.
    """
    device, micro_batch = device_of(c), c.micro_batch
    while micro_batch:
        free()
        try:
            step = make_step(c, impl, micro_batch)
            loss = step().item()
            step()
            times_ms = []
            for _ in tqdm(range(c.steps), desc=impl, leave=False, disable=None):
                synchronize(device)
                began = time.perf_counter()
                step()
                synchronize(device)
                times_ms.append((time.perf_counter() - began) * 1e3)
        except torch.OutOfMemoryError:
            step = None  # or its memory is not freed
            note = f"out of memory at micro-batch {micro_batch} ({peak_gib(device):.1f} GiB)"
            yield Result(impl, micro_batch, note=note), None
            micro_batch //= 2
            continue
        except ValueError as e:  # a UserError, or a shape that the kernels do not take
            yield Result(impl, note=str(e)), None
            return
        p20, p50, p80 = percentiles(times_ms)
        rate = c.micro_steps * micro_batch * c.seq_len / p50 * 1e3
        used = mfu(c.model, rate, peak)
        yield Result(impl, micro_batch, p20, p50, p80, rate, used, peak_gib(device), loss), step
        return


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan


def show(r: Result) -> str:
    if r.note:
        return f"{r.impl:<14}none: {r.note}"
    times = f"{r.p20_ms:>10.1f}{r.p50_ms:>10.1f}{r.p80_ms:>10.1f}"
    speed = f"{r.tokens_per_s:>12,.0f}{r.mfu:>8.1%}{r.peak_gib:>10.1f}{r.loss:>9.4f}"
    return f"{r.impl:<14}{r.micro_batch:>5}{times}{speed}"


def main() -> None:
    c = parse(Config, toml=True)
    device, parameters = device_of(c), parameter_count(c.model)
    if device.type == "cpu" and c.device == "auto" and parameters > LARGE:
        raise UserError(
            f"{parameters:,} parameters, and there is no CUDA device here; --device=cpu times them "
            "all the same, slowly"
        )
    peak, roof_name = peak_flops(device)
    out = sys.stderr if c.json else sys.stdout
    print(f"{flops_per_token(c.model) / 1e9:.3f} GFLOP a token; MFU over {roof_name}", file=out)
    columns = f"{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'tokens/s':>12}{'MFU':>8}{'GiB':>10}"
    print(f"{'':<14}{'batch':>5}{columns}{'loss':>9}", file=out)
    rows = []
    for impl in [c.impl] if c.impl else MODELS:
        for result, step in measure(c, impl, peak):
            print(show(result), file=out, flush=True)
            if c.json:
                emit(vars(result))
            if step and not rows:  # ours, or the first there is
                rows, profiled = profile(step, device), result
            del step
    free()
    if rows:
        if device.type == "cuda":
            rates = measured_roof(CudaTimer(), "cuda", torch.bfloat16)
        else:
            rates = measured_roof(WallTimer(), "cpu", torch.float32, 256, 2**20)
        floors = floors_us(c.model, profiled.micro_batch, c.micro_steps, rates)
        roof = f"{rates.gemm / 1e12:.3g} TFLOP/s, {rates.memory / 1e9:,.0f} GB/s"
        print(f"\n{profiled.impl}'s step, kernel by kernel; floors at {roof}", file=out)
        print(show_profile(rows, floors, c.kernels_shown), file=out)
        if c.json:
            shown = [(name[:60], calls, round(us)) for name, calls, us in rows[: c.kernels_shown]]
            floors = {name: round(us) for name, us in floors.items()}
            emit({"profiled": profiled.impl, "kernels_us": shown, "floors_us": floors})
    sys.exit(bool(c.impl) and not rows)


if __name__ == "__main__":
    run(main)
