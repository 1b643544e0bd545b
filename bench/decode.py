"""Time generation beside transformers' generate, in turns; on a GPU also against its memory's roof.

    python -m bench.decode configs/demo.toml [--batch=1 --batch=32] [--compile]

Random weights, random prompts of one length, greedy, no end of text: each call gives batch x
new_tokens tokens, prefill included. The peers are PhiForCausalLM of the same weights with sdpa
attention, with its growing cache and with its static one, which it compiles on a GPU, and with
--compile on a CPU too. A ratio is between medians of rounds in which each had its turn, so that a
busy machine slows all. "same" is the share of tokens that are ours.

The roof: a decoder's step against the bytes it must read, weights and keys and values, at the rate
of a large copy measured in the same run.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from bench.step import HuggingFace, device_of
from bench.timing import CudaTimer, measured_roof, percentiles, synchronize
from common.config import UserError, parse, run
from common.runlog import environment
from model import ModelConfig, Phi
from sample import GPU_STEPS, GREEDY, Generator, TritonDecoder
from tools.hf import parts
from train import TrainConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    """Time generation: ours and transformers' (sdpa; dynamic and static cache)."""

    batch: tuple[int, ...] = (1, 16, 32)  # prompts generated for at once; may be repeated
    prompt_tokens: int = 32  # length of the prompts
    new_tokens: int = 128  # generated for each
    rounds: int = 5  # timed calls of each, after one that is not
    static: bool = True  # time transformers' static cache too; on a GPU it compiles for a minute
    json: bool = False  # print JSON instead of a table

    def __post_init__(self):
        super().__post_init__()
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, want at least 1")
        if self.prompt_tokens + self.new_tokens > self.seq_len:
            raise UserError(
                f"{self.prompt_tokens} + {self.new_tokens} tokens are more than the context of "
                f"{self.seq_len}; lower --prompt_tokens or --new_tokens"
            )


class Numbers:
    """A tokenizer whose text is its token ids."""

    end_of_text = 0
    start = (0,)

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def calls(c: Config, model: Phi, batch: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name: functions that return batch x new_tokens tokens."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    generator = Generator(model, Numbers())
    generator.end_of_text = -1  # no token is
    idx = torch.randint(1, c.vocab_size, (batch, c.prompt_tokens))
    idx[:, 0] = 0  # as Numbers.start
    prompts = [" ".join(map(str, row[1:].tolist())) for row in idx]
    with device:  # where drawing the weights takes no time
        peer = HuggingFace(c.model).net.to(dtype).eval()
    peer.load_state_dict(parts(model))
    peer.config.use_cache = True
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(idx, device=device)}
    options |= {"min_new_tokens": c.new_tokens, "max_new_tokens": c.new_tokens}
    static = {"cache_implementation": "static"}
    if c.compile:
        from transformers import CompileConfig

        static["compile_config"] = CompileConfig()
        static["compile_config"]._compile_all_devices = True  # it leaves a CPU out otherwise

    def ours() -> Tensor:
        done = dict(generator.stream(prompts, c.new_tokens, batch_size=batch))
        return torch.tensor([done[row].tokens for row in range(batch)])

    def theirs(**extra) -> Tensor:
        return peer.generate(idx.to(device), **options, **extra)[:, c.prompt_tokens :].cpu()

    with_static = {"transformers static": lambda: theirs(**static)} if c.static else {}
    return {"ours": ours, "transformers": theirs} | with_static


def step_bytes(c: ModelConfig, batch: int, positions: float, itemsize: int) -> float:
    """Bytes that one token for each of `batch` texts must read: weights, keys and values."""
    block = 4 * c.width**2 + 2 * c.width * c.mlp_width + 4 * c.width + c.mlp_width
    weights = c.n_layer * block + c.vocab_size * (c.width + 1)
    return itemsize * (weights + 2 * batch * positions * c.n_layer * c.width)


def roof_frac(c: Config, model: Phi, batch: int, copy_bytes_per_s: float) -> tuple[float, float]:
    """(bytes/s of the steps alone, that over the copy's)."""
    decoder = TritonDecoder(model, batch, c.prompt_tokens + c.new_tokens)
    for row in range(batch):
        decoder.load(row, [1] * c.prompt_tokens, torch.zeros(1))
    decoder.steps(batch, c.prompt_tokens, GREEDY)  # captures the graph
    rounds = max(1, c.new_tokens // GPU_STEPS - 1)
    synchronize(model.embed.weight.device)
    began = time.perf_counter()
    for i in range(rounds):
        decoder.steps(batch, c.prompt_tokens + GPU_STEPS * (i + 1), GREEDY)
    seconds = (time.perf_counter() - began) / rounds / GPU_STEPS
    mean = c.prompt_tokens + GPU_STEPS * (1 + rounds / 2)
    rate = step_bytes(c.model, batch, mean, model.embed.weight.itemsize) / seconds
    return rate, rate / copy_bytes_per_s


@torch.inference_mode()
def measure(c: Config) -> list[dict]:
    """A row for each batch and implementation."""
    device, rows = device_of(c), []
    torch.manual_seed(c.seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = Phi(c.model).to(dtype).eval()
    roof = measured_roof(CudaTimer(), "cuda", dtype).memory if device.type == "cuda" else None
    for batch in c.batch:
        functions = calls(c, model, batch)
        times, tokens = {name: [] for name in functions}, {}
        for turn in tqdm(range(c.rounds + 1), desc=f"batch {batch}", disable=None):
            for name, function in functions.items():
                synchronize(device)
                began = time.perf_counter()
                tokens[name] = function()
                synchronize(device)
                if turn:
                    times[name].append((time.perf_counter() - began) * 1e3)
        for name, ms in times.items():
            p20, p50, p80 = percentiles(ms)
            row = {"batch": batch, "impl": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
            row["tokens_per_s"] = batch * c.new_tokens / p50 * 1e3
            row["same_frac"] = (tokens[name] == tokens["ours"]).float().mean().item()
            row["ours_times"] = p50 / percentiles(times["ours"])[1]
            if roof and name == "ours":
                row["bytes_per_s"], row["roof_frac"] = roof_frac(c, model, batch, roof)
            rows.append(row)
    return rows


def main() -> None:
    c = parse(Config, toml=True)
    if c.threads:
        torch.set_num_threads(c.threads)
    where, rows = environment(), measure(c)
    if c.json:
        config = {f.name: str(getattr(c, f.name)) for f in dataclasses.fields(c)}
        print(json.dumps({"environment": where, "config": config, "rows": rows}))
        return
    print(f"{c.prompt_tokens} prompt tokens, {c.new_tokens} new; ms a token of each text; ", end="")
    print(f"{torch.get_num_threads()} threads; compiled: {c.compile}")
    print(f"batch {'':20}{'p20':>8}{'p50':>8}{'p80':>8}{'tokens/s':>10}{'/ ours':>8}{'same':>6}")
    for r in rows:
        ms = "".join(f"{r[p] / c.new_tokens:8.2f}" for p in ("p20_ms", "p50_ms", "p80_ms"))
        line = f"{r['batch']:5} {r['impl']:20}{ms}{r['tokens_per_s']:10,.0f}{r['ours_times']:8.2f}"
        line += f"{r['same_frac']:6.0%}"
        if "roof_frac" in r:
            line += f"  {r['bytes_per_s'] / 1e12:.2f} TB/s, {r['roof_frac']:.0%} of a copy"
        print(line)


if __name__ == "__main__":
    run(main)
