"""Time generation against transformers' generate and against the memory roof.

    python -m bench.decode configs/demo.toml [--batch=1 --batch=32]

Random weights, random prompts of equal length, greedy, no end of text: each call generates batch x
new_tokens tokens, prefill included. The peer is PhiForCausalLM with the same weights and sdpa
attention; calls alternate. same_frac is the share of tokens equal to ours. roof_frac is the bytes a
token must read (weights, keys, values), over its time and the bandwidth of a large copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from bench.step import HuggingFace
from bench.table import Table
from bench.timing import device_of, make_timer, measured_roof, percentiles, wall_ms
from common.config import UserError, parse, run
from model import Phi
from sample import Generator
from tools.hf import parts
from train import TrainConfig

PROMPT_TOKENS, ROUNDS = 32, 3  # timed calls each, after one warm-up


@dataclass(frozen=True)
class Config(TrainConfig):
    """Time generation of CONFIG.toml's model: ours and transformers'."""

    batch: tuple[int, ...] = (1, 16, 32)  # prompts per call; may be repeated
    new_tokens: int = 128  # tokens generated per prompt
    json: bool = False  # also print JSON lines


class Numbers:
    """Tokenizer whose text is the token ids, space separated."""

    end_of_text, start = 0, ()

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@torch.inference_mode()
def measure(c: TrainConfig, batch: int, new_tokens: int) -> Iterator[dict]:
    """Time every implementation at one batch size; yield a row each."""
    if PROMPT_TOKENS + new_tokens > c.seq_len:
        raise UserError(f"{PROMPT_TOKENS} + {new_tokens} tokens exceed seq_len {c.seq_len}")
    device = device_of(c.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(c.seed)
    with device:
        model, peer = Phi(c.model).to(dtype).eval(), HuggingFace(c.model).net.to(dtype).eval()
    peer.load_state_dict(parts(model))
    peer.config.use_cache = True
    generator, fast = Generator(model, Numbers()), Generator(model, Numbers(), fast=True)
    generator.end_of_text = fast.end_of_text = -1  # never stop early
    idx = torch.randint(1, c.vocab_size, (batch, PROMPT_TOKENS))
    prompts = [" ".join(map(str, row)) for row in idx.tolist()]
    on_device = {"input_ids": idx.to(device), "attention_mask": torch.ones_like(idx, device=device)}
    options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}

    def ours(generator: Generator = generator) -> torch.Tensor:
        done = dict(generator.stream(prompts, new_tokens, batch_size=batch))
        return torch.tensor([done[row].tokens for row in range(batch)])

    def theirs() -> torch.Tensor:
        out = peer.generate(**on_device, **options, use_cache=True, pad_token_id=0)
        return out[:, PROMPT_TOKENS:].cpu()

    roof = measured_roof(make_timer(device.type), device.type, dtype).memory
    read = sum(p.nbytes for n, p in model.named_parameters() if "ln" not in n and "embed" not in n)
    cached = batch * (PROMPT_TOKENS + new_tokens / 2)  # positions, on average
    read += 2 * cached * c.n_layer * c.width * dtype.itemsize
    calls = {"ours": ours, "ours, fast": partial(ours, fast), "transformers": theirs}
    times, tokens = {}, {}
    for turn in tqdm(range(ROUNDS + 1), desc=f"batch {batch}", disable=None):
        for name, call in calls.items():
            ms, tokens[name] = wall_ms(call, device)
            times[name] = times.get(name, []) + [ms] * (turn > 0)
    ours_ms = percentiles(times["ours"])["p50_ms"]
    for name, its in times.items():
        ms = percentiles(its)
        yield {
            "batch": batch, "impl": name, **ms,
            "tokens_per_s": batch * new_tokens / ms["p50_ms"] * 1e3,
            "ours_times": ms["p50_ms"] / ours_ms,
            "same_frac": (tokens[name] == tokens["ours"]).float().mean().item(),
            "roof_frac": read * new_tokens / ms["p50_ms"] * 1e3 / roof,
        }  # fmt: skip


def main() -> None:
    c = parse(Config, toml=True, hidden=TrainConfig)
    table = Table(c.json)
    if c.threads:
        torch.set_num_threads(c.threads)
    table.say(f"{PROMPT_TOKENS} prompt tokens, {c.new_tokens} new")
    for batch in c.batch:
        for row in measure(c, batch, c.new_tokens):
            table(summary=True, **row)


if __name__ == "__main__":
    run(main)
