"""Time our training step against torch.compile and transformers, and profile it.

    python -m bench.step configs/phi1.toml               all three, plus ours in fp8
    python -m bench.step configs/phi1.toml --impl=ours   one of them

A step is forward, backward, clipping and AdamW on random tokens, under autocast for all: fp32
weights and optimiser states, half-precision matmuls. The micro-batch is the configuration's, halved
until it fits. On a GPU the peers' blocks are compiled. MFU counts causal FLOPs over the data
sheet's bf16 peak, for fp8 too. The profile is of ours, or of the first that ran.
"""

import contextlib
import dataclasses
import gc
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from bench.table import Table
from bench.timing import device_of, percentiles, profile, wall_ms
from common.config import UserError, parse, run
from common.runlog import peak_flops
from model import ModelConfig, Phi, flops_per_token, mfu, select_kernels
from train import DTYPES, TrainConfig, make_optimizer

SHOWN = 30  # longest kernels shown in the profile


@dataclass(frozen=True)
class Config(TrainConfig):
    """Time training steps of CONFIG.toml: ours, and compiled torch and transformers (sdpa)."""

    impl: str = ""  # ours, ours fp8, torch or transformers; empty = all
    steps: int = 10  # timed steps, after two warm-up steps
    json: bool = False  # also print JSON lines

    def __post_init__(self):
        super().__post_init__()
        if self.impl not in ("", *MODELS):
            raise UserError(f"impl is {self.impl!r}, want one of {', '.join(MODELS)}")


def phi(c: TrainConfig, kernels: str) -> Phi:
    shape = dataclasses.replace(c.model, kernels=kernels)
    select_kernels(shape, device_of(c.device), c.matmul)  # UserError if unsupported
    return Phi(shape, kernels == "triton", fp8=c.matmul == "fp8")


class HuggingFace(torch.nn.Module):
    """transformers' Phi with our call signature."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        from transformers import PhiConfig, PhiForCausalLM

        config = PhiConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            max_position_embeddings=c.seq_len, partial_rotary_factor=c.rotary_dim / c.head_dim,
            rope_theta=c.rope_theta, layer_norm_eps=1e-5, hidden_act="gelu_new",
            resid_pdrop=c.dropout, attention_dropout=c.dropout, tie_word_embeddings=False,
            use_cache=False, attn_implementation="sdpa", qk_layernorm=c.qk_norm,
        )  # fmt: skip
        self.net = PhiForCausalLM(config)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        targets = targets.contiguous()
        return self.net(input_ids=idx, labels=targets, shift_labels=targets).loss


def compile_blocks(model: torch.nn.Module, blocks: str, c: TrainConfig) -> torch.nn.Module:
    """Compile the blocks in place on a GPU; on a CPU compiling takes longer than the steps."""
    for block in model.get_submodule(blocks) if device_of(c.device).type == "cuda" else ():
        block.compile(dynamic=False)
    return model


MODELS: dict[str, Callable] = {
    "ours": lambda c: phi(c, "triton"),
    "ours fp8": lambda c: phi(dataclasses.replace(c, matmul="fp8"), "triton"),
    "torch": lambda c: compile_blocks(phi(c, "torch"), "blocks", c),
    "transformers": lambda c: compile_blocks(HuggingFace(c.model), "net.model.layers", c),
}


def make_step(c: TrainConfig, impl: str, micro_batch: int) -> Callable[[], Tensor]:
    """Return a function that runs a training step and returns its loss, without syncing."""
    device = device_of(c.device)
    if impl == "transformers":
        c = dataclasses.replace(c, optimizer="adamw")  # Muon needs our blocks
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[default if c.dtype == "auto" else c.dtype]
    torch.manual_seed(c.seed)
    with torch.device(device):
        model = MODELS[impl](c).train()
        batch = torch.randint(c.vocab_size, (micro_batch, c.seq_len + 1))
    optimizer, mixed = make_optimizer(model, c), dtype != torch.float32

    def step() -> Tensor:
        with torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext():
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(
    c: TrainConfig, impl: str, steps: int, peak: float
) -> Iterator[tuple[dict, Callable | None]]:
    """Yield (row, step) of `impl` at the largest micro_batch / 2^k that fits; OOM rows first."""
    device, micro_batch = device_of(c.device), 2 * c.micro_batch
    while micro_batch := micro_batch // 2:
        free()
        try:
            step = make_step(c, impl, micro_batch)
            loss = step().item()  # near ln(V) for every impl
            step()
            turns = tqdm(range(steps), desc=impl, leave=False, disable=None)
            times = percentiles([wall_ms(step, device)[0] for _ in turns])
        except torch.OutOfMemoryError:
            step = None  # free its memory
            note = f"out of memory at micro-batch {micro_batch}"
            yield {"impl": impl, "micro_batch": micro_batch, "note": note}, None
            continue
        except (ValueError, ImportError) as e:  # transformers missing or shape unsupported
            yield {"impl": impl, "note": str(e)}, None
            return
        rate = micro_batch * c.seq_len / times["p50_ms"] * 1e3
        row = {"impl": impl, "micro_batch": micro_batch, "tokens_per_s": rate, "loss": loss}
        peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else math.nan
        row |= {"mfu_frac": mfu(c.model, rate, peak), "peak_gib": peak_bytes / 2**30}
        yield row | times, step
        return


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    c = parse(Config, toml=True, hidden=TrainConfig)
    device, table = device_of(c.device), Table(c.json)
    if device.type == "cpu" and c.device == "auto":
        raise UserError("no CUDA device here; --device=cpu times a small model, slowly")
    peak, roof_name = peak_flops(device)
    table.say(f"{flops_per_token(c.model) / 1e9:.3f} GFLOP a token; MFU over {roof_name}")
    profiled, kernels = "", []
    for impl in [c.impl] if c.impl else MODELS:
        for row, step in measure(c, impl, c.steps, peak):
            table(summary=True, **row)
            if step and not profiled:  # ours, or the first that ran
                profiled, kernels = impl, profile(step, device)
            del step
    total = sum(us for *_, us in kernels)
    for name, calls, us in kernels[:SHOWN]:
        table(profiled=profiled, us=us, share_frac=us / total, calls=calls, kernel=name[:90])
    sys.exit(bool(c.impl) and not profiled)


if __name__ == "__main__":
    run(main)
