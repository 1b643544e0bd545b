"""Generate text from a checkpoint.

    python sample.py --checkpoint out/demo/runs/demo --prompt "def add(a, b):"
    cat prompt.py | python sample.py --checkpoint out/demo/runs/demo --temperature 0.8 --samples 3

`Generator` is what the evaluators use too: batches of prompts of unequal length over one KV cache.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from config import UserError, parse, run
from model import KVCache, Phi
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Complete a prompt with a trained model."""

    checkpoint: Path  # run folder (its best checkpoint is used) or checkpoint folder
    prompt: str = ""  # text to complete; without it, all of stdin
    max_new_tokens: int = 128  # tokens to add at most
    temperature: float = 0.0  # 0 takes the likeliest token each time
    top_p: float = 1.0  # sample from the likeliest tokens that hold this probability
    samples: int = 1  # completions of the prompt
    stop: tuple[str, ...] = ()  # end a completion before this text ("\n" works); may be repeated
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu or cuda


class Generator:
    """A model and its tokenizer, ready to complete prompts."""

    def __init__(self, model: Phi, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.context_tokens = model.c.seq_len

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> "Generator":
        """From a run or checkpoint folder; bfloat16 on a GPU, float32 on a CPU."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer, _ = checkpoint.load_model(path, torch.device(device))
        return cls(model.bfloat16() if device == "cuda" else model, tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """A prompt's tokens, after those that its tokenizer starts with; at least one in all."""
        ids = [*self.tokenizer.start, *self.tokenizer.encode(prompt)]
        return ids or [self.tokenizer.end_of_text]

    def fits(self, prompt: str, new_tokens: int = 1) -> bool:
        """Whether the context has room for the prompt and `new_tokens` more."""
        return len(self.encode(prompt)) + new_tokens <= self.context_tokens

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: tuple[str, ...] = (),
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[str]:
        """Completions without prompts, up to a stop string, <|endoftext|> or the context's end.

        What a prompt is completed with depends on `seed` and its place in `prompts`, not on the
        batch it falls in (up to rounding). Raises UserError if a prompt fills the context.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        for prompt, tokens in zip(prompts, ids):
            if len(tokens) >= self.context_tokens:
                raise UserError(
                    f"the prompt {prompt!r:.50} has {len(tokens):,} tokens, and the model's "
                    f"context of {self.context_tokens:,} leaves no room to answer; shorten it"
                )
        draws = torch.rand(
            len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed)
        )
        completions = [""] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
        with tqdm(total=len(prompts), unit="prompt", desc="generate", disable=None) as bar:
            for i in range(0, len(prompts), batch_size):
                rows = by_length[i : i + batch_size]
                done = self._complete([ids[r] for r in rows], draws[rows], temperature, top_p, stop)
                for row, text in zip(rows, done):
                    completions[row] = text
                bar.update(len(rows))
        return completions

    @torch.inference_mode()
    def _complete(self, ids, draws, temperature, top_p, stop) -> list[str]:
        """Complete one batch: `ids` are B token lists, `draws` uniform [B, max_new_tokens]."""
        parameter = self.model.embed.weight
        lengths = torch.tensor([len(row) for row in ids], device=parameter.device)  # [B]
        B, longest, limit = len(ids), max(map(len, ids)), self.context_tokens
        cache = KVCache(
            self.model.c, B, min(limit, longest + draws.shape[1]), parameter.device, parameter.dtype
        )
        # Prompts stand at the left, and what is behind a shorter one is never attended to: a token
        # sees positions up to its own, and each new token overwrites the next of them.
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        positions = torch.arange(longest).expand(B, -1)
        logits = self.model(padded.to(lengths), cache=cache, positions=positions.to(lengths))
        logits = logits[torch.arange(B), lengths - 1]  # [B, V]
        new: list[list[int]] = [[] for _ in ids]
        text: list[str | None] = [None] * B  # filled in when a row is finished
        rows = list(range(B))  # that are still in the batch
        for i in range(draws.shape[1]):
            token = sample(logits, draws[:, i].to(logits.device), temperature, top_p)  # [rows]
            for row, t in zip(rows, token.tolist()):
                if text[row] is None:
                    if t != self.tokenizer.end_of_text:
                        new[row].append(t)
                    full = len(ids[row]) + len(new[row]) == limit
                    if t == self.tokenizer.end_of_text or full or self._stopped(new[row], stop):
                        text[row] = self._text(new[row], stop)
            going = [j for j, row in enumerate(rows) if text[row] is None]
            if not going or i + 1 == draws.shape[1]:
                break
            if len(going) <= len(rows) // 2:  # finished rows leave, half of the batch at a time
                rows = [rows[j] for j in going]
                draws, lengths, token = draws[going], lengths[going], token[going]
                cache.k, cache.v = cache.k[:, going], cache.v[:, going]
            where = (lengths + i).clamp(max=cache.k.shape[3] - 1)[:, None]  # [rows, 1]
            logits = self.model(token[:, None], cache=cache, positions=where)[:, -1]
        return [self._text(new[row], stop) if t is None else t for row, t in enumerate(text)]

    def _stopped(self, new: list[int], stop: tuple[str, ...]) -> bool:
        """Whether a stop string ends in the newest token (a token is at least one byte)."""
        reach = max((len(s.encode()) for s in stop), default=0) + 1
        tail = self.tokenizer.decode(new[-reach:]) if stop else ""
        return any(s in tail for s in stop)

    def _text(self, new: list[int], stop: tuple[str, ...]) -> str:
        text = self.tokenizer.decode(new)
        return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]


def sample(logits, draws, temperature: float, top_p: float) -> torch.Tensor:
    """A token [B] for each row of logits [B, V], by inverting its distribution at draws [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    total = p.cumsum(-1)  # [B, V]
    keep = total - p < top_p  # the token that crosses top_p is in
    mass = torch.where(keep, total, 0.0).amax(-1, keepdim=True)
    choice = torch.searchsorted(total, draws[:, None] * mass, right=True)
    choice = choice.minimum(keep.sum(-1, keepdim=True) - 1)  # rounding may step past the last
    return order.gather(-1, choice)[:, 0]


def main() -> None:
    config = parse(Config)
    if config.temperature < 0 or not 0 < config.top_p <= 1:
        raise UserError("want temperature >= 0 and 0 < top_p <= 1")
    if config.samples < 1 or config.max_new_tokens < 1:
        raise UserError("want samples and max_new_tokens of at least 1")
    if not config.prompt and sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    prompt = config.prompt or sys.stdin.read()
    generator = Generator.load(config.checkpoint, config.device)
    stop = tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in config.stop)
    completions = generator.generate(
        [prompt] * config.samples,
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        stop,
        config.seed,
    )
    print(("\n" + "-" * 40 + "\n").join(prompt + completion for completion in completions))


if __name__ == "__main__":
    run(main)
