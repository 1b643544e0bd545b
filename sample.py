"""Generate text from a checkpoint.

    python sample.py --checkpoint out/demo/runs/demo --prompt "def add(a, b):"
    cat prompt.py | python sample.py --checkpoint out/demo/runs/demo --temperature 0.8 --samples 3

`Generator` is what the evaluators use too. It keeps a batch of rows, each somewhere in a prompt of
its own. A row that has finished is refilled with the next prompt; when none is left, the last row
takes its place and the batch shrinks. What a prompt is completed with depends on the prompt, its
index and the seed, not on the batch: see decoder.py, and draw i of prompt p comes from Philox keyed
by (seed, p), at count i.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.config import UserError, parse, run
from decoder import GREEDY, Decoder, Sampling
from model import Phi, load_model, select_kernels
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
    logprobs: bool = False  # print, instead of text, a JSON line a sample: its tokens too, their
    # log-probabilities, and why it ended
    device: str = "auto"  # auto, cpu or cuda


@dataclass
class Completion:
    """What a prompt was completed with."""

    text: str  # without prompt, cut before a stop string
    tokens: list[int]  # whole ones: the last may hold the start of the stop string too
    logprobs: list[float]  # of `tokens`, natural logarithm; empty unless asked for
    finish: str  # stop (a stop string), end (<|endoftext|>), length (max_new_tokens), context


@dataclass
class _Row:
    """A row of the batch: which prompt it completes, and how far it has come."""

    index: int  # of the prompt
    prompt_tokens: int
    room: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sent: int = 0  # characters given to on_text


class Generator:
    """A model and its tokenizer, ready to complete prompts."""

    def __init__(self, model: Phi, tokenizer: Tokenizer, kernels: bool | None = None):
        """`kernels` of kernels/decode.py, or torch; by default, on a GPU, as model.py chooses."""
        self.model, self.tokenizer = model, tokenizer
        self.context_tokens = model.c.seq_len
        self.end_of_text = tokenizer.end_of_text
        device = model.embed.weight.device
        if kernels is None:
            kernels = device.type == "cuda" and select_kernels(model.c, device)[0] == "triton"
        self.kernels = kernels
        self._decoder: Decoder | None = None  # of the last call, for the next

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> "Generator":
        """From a run or checkpoint folder; bfloat16 on a GPU, float32 on a CPU."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer, _ = load_model(path, torch.device(device))
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
        """The texts that `stream` gives, in the order of `prompts`."""
        sampling = Sampling(temperature, top_p)
        done = self.stream(prompts, max_new_tokens, sampling, stop, seed, batch_size)
        texts = [""] * len(prompts)
        for index, completion in tqdm(
            done, total=len(prompts), unit="prompt", desc="generate", disable=None
        ):
            texts[index] = completion.text
        return texts

    def stream(
        self,
        prompts: list[str],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: tuple[str, ...] = (),
        seed: int = 0,
        batch_size: int = 64,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """(index of the prompt, its completion), each when it is finished.

        `on_text(index, text)` is told of text as soon as no later token can change it or turn it
        into a stop string. Raises UserError if a prompt fills the context.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        for prompt, tokens in zip(prompts, ids):
            if len(tokens) >= self.context_tokens:
                raise UserError(
                    f"the prompt {prompt!r:.50} has {len(tokens):,} tokens, and the model's "
                    f"context of {self.context_tokens:,} leaves no room to answer; shorten it"
                )
        longest = max((len(tokens) for tokens in ids), default=0)
        need = (
            min(batch_size, len(ids)),
            min(self.context_tokens, longest + max_new_tokens),
            max_new_tokens,
        )
        decoder, self._decoder = self._decoder, None  # ours until we are done
        if prompts and not (decoder and decoder.fits(*need)):
            decoder = None  # frees its cache before there is another
            decoder = Decoder(self.model, *need, self.kernels)
        waiting, rows = deque(range(len(ids))), []

        def admit(at: int) -> _Row:
            index = waiting.popleft()
            twin = next((i for i, r in enumerate(rows) if ids[r.index] == ids[index]), None)
            room = min(max_new_tokens, self.context_tokens - len(ids[index]))
            key = np.array([seed % 2**64, index], dtype=np.uint64)
            draws = np.random.Generator(np.random.Philox(key=key)).random(room)
            decoder.load(at, ids[index], torch.from_numpy(draws), twin)
            return _Row(index, len(ids[index]), room)

        while waiting or rows:
            while waiting and len(rows) < batch_size:
                rows.append(admit(len(rows)))
            longest = max(row.prompt_tokens + len(row.tokens) for row in rows)
            tokens, logprobs = decoder.steps(len(rows), longest, sampling)
            for i in reversed(range(len(rows))):
                row = rows[i]
                finish = self._extend(row, tokens[i], logprobs[i], stop)
                if finish or on_text:
                    text = self._text(row, stop, finish)
                if on_text and len(text) > row.sent:
                    on_text(row.index, text[row.sent :])
                    row.sent = len(text)
                if finish:
                    yield row.index, self._completion(row, text, finish)
                    if waiting:
                        rows[i] = admit(i)
                    else:
                        last = rows.pop()
                        if i < len(rows):
                            decoder.move(len(rows), i)
                            rows[i] = last
        self._decoder = decoder

    def _extend(self, row: _Row, tokens: list[int], logprobs: list[float], stop) -> str:
        """Add new tokens to a row until it is finished; why it is, or "" if it is not."""
        reach = max((len(s.encode()) for s in stop), default=0) + 1  # a token has a byte or more
        for i, token in enumerate(tokens):
            if token == self.end_of_text:
                return "end"
            row.tokens.append(token)
            row.logprobs += logprobs[i : i + 1]  # none if they were not asked for
            if stop:
                tail = self.tokenizer.decode(row.tokens[-reach:])
                if any(s in tail for s in stop):
                    return "stop"
            if len(row.tokens) == row.room:
                full = row.prompt_tokens + row.room == self.context_tokens
                return "context" if full else "length"
        return ""

    def _text(self, row: _Row, stop: tuple[str, ...], finish: str) -> str:
        """The text of a row up to a stop string; if it is not finished, what of it will stay."""
        text = self.tokenizer.decode(row.tokens)
        if finish:
            return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]
        text = text.rstrip("\ufffd")  # a character of which bytes are missing
        for held in range(max(map(len, stop), default=1) - 1, 0, -1):
            if any(s.startswith(text[-held:]) for s in stop):
                return text[:-held]
        return text

    def _completion(self, row: _Row, text: str, finish: str) -> Completion:
        tokens = row.tokens  # without those that lie behind the end of the text
        while finish == "stop" and tokens and self.tokenizer.decode(tokens[:-1]).startswith(text):
            tokens = tokens[:-1]
        return Completion(text, tokens, row.logprobs[: len(tokens)], finish)


def main() -> None:
    config = parse(Config)
    sampling = Sampling(config.temperature, config.top_p, config.logprobs)
    if config.samples < 1 or config.max_new_tokens < 1:
        raise UserError("want samples and max_new_tokens of at least 1")
    if not config.prompt and sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    prompt = config.prompt or sys.stdin.read()
    generator = Generator.load(config.checkpoint, config.device)
    stop = tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in config.stop)
    options = (config.max_new_tokens, sampling, stop, config.seed)
    prompts = [prompt] * config.samples
    if config.logprobs:
        for index, completion in generator.stream(prompts, *options):
            pieces = [generator.tokenizer.decode([token]) for token in completion.tokens]
            print(json.dumps({"sample": index, **asdict(completion), "pieces": pieces}))
        return

    # The first sample is printed as it grows, what the others have so far when their turn comes.
    shown, held, finished = 0, [""] * config.samples, set()

    def on_text(index: int, text: str) -> None:
        if index == shown:
            print(text, end="", flush=True)
        else:
            held[index] += text

    print(prompt, end="", flush=True)
    for index, _ in generator.stream(prompts, *options, on_text=on_text):
        finished.add(index)
        while shown in finished:
            shown += 1
            rule = "-" * 40 + f"\n{prompt}{held[shown]}" if shown < config.samples else ""
            print(f"\n{rule}", end="", flush=True)


if __name__ == "__main__":
    run(main)
