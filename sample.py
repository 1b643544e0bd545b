"""Generate text from a checkpoint.

    python sample.py --checkpoint out/demo/runs/exercises --prompt "def add(a, b):"
    cat prompt.py | python sample.py --checkpoint out/demo/runs/exercises --temperature 0.8
    python sample.py --checkpoint out/demo/runs/exercises --serve

A `Batch` steps rows on a `Decoder`; each row has its own prompt and options. A finished row's slot
goes to the next waiting row. If none waits, the last row moves there and the batch shrinks.
`Generator` feeds the batch with prompts, common/serve.py (`--serve`) with API requests.

A completion depends on its prompt, options, index and seed, never on the batch (unless --fast):
draws come from Philox keyed by (seed, index), and a decoder computes rows independently.
"""

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.config import UserError, differences, parse, printable, require, run
from common.serve import serve
from decoder import Decoder, TorchDecoder, TritonDecoder
from model import Phi, load_model, select_kernels
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Complete a prompt with a trained model."""

    checkpoint: Path  # run folder (uses its best checkpoint) or checkpoint folder
    prompt: str = ""  # text to complete; without it, read all of stdin
    max_new_tokens: int = 128  # max tokens to generate
    temperature: float = 0.0  # sampling temperature, 0 = greedy
    top_p: float = 1.0  # sample from the likeliest tokens with this total probability
    samples: int = 1  # number of completions
    stop: tuple[str, ...] = ()  # end a completion before this text ("\n" works); may be repeated
    seed: int = 0  # sampling seed
    device: str = "auto"  # auto, cpu or cuda
    fast: bool = False  # decode faster in torch; results may depend on the batch in the last bits
    batch_size: int = 64  # completions at once; each takes 8 bytes x n_layer x width x tokens (4 on
    # a GPU); --serve allocates full contexts up front, for phi-1 0.8 GB each (0.4 on a GPU)
    serve: bool = False  # serve OpenAI's completions API on this machine instead
    port: int = 8000  # port for --serve; 0 picks a free one


@dataclass
class Row:
    """One row of a batch: prompt, options and completion."""

    index: int  # prompt index
    ids: list[int]  # prompt tokens
    room: int  # max new tokens
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    owner: object = field(default=None, compare=False)  # for the caller's use
    tokens: list[int] = field(default_factory=list)
    done: str = ""  # why it ended: "stop", "length", or a reason the owner sets; "" while running
    text: str = ""  # decoded tokens up to a stop string, set once done


class Generator:
    """Complete prompts with a model and its tokenizer."""

    def __init__(self, model: Phi, tokenizer: Tokenizer, fast: bool = False):
        """Wrap a model; its weights must not change afterwards."""
        device = model.embed.weight.device
        kernels = device.type == "cuda" and select_kernels(model.c, device)[0] == "triton"
        self.new_decoder = TritonDecoder if kernels else partial(TorchDecoder, fast=fast)
        self.model, self.tokenizer = model, tokenizer
        self.context_tokens = model.c.seq_len
        self.end_of_text = tokenizer.end_of_text
        self._decoder: Decoder | None = None  # reused by the next call

    @classmethod
    def load(cls, path: Path, device: str = "auto", fast: bool = False) -> "Generator":
        """Load a run or checkpoint folder, in bfloat16 on a GPU and float32 on a CPU."""
        model, tokenizer, _ = load_model(path, device)
        return cls(model.bfloat16() if model.embed.weight.is_cuda else model, tokenizer, fast)

    def encode(self, prompt: str) -> list[int]:
        """Return the tokenizer's start tokens plus the prompt's tokens, at least one in total."""
        return [*self.tokenizer.start, *self.tokenizer.encode(prompt)] or [self.end_of_text]

    def fits(self, prompt: str) -> bool:
        """Return whether the context has room for the prompt and one new token."""
        return len(self.encode(prompt)) < self.context_tokens

    def row(self, index: int, prompt: str | list[int], max_new_tokens: int, **options) -> Row:
        """Return a row that completes `prompt`, a text or token ids; `options` are Row fields.

        Raise UserError if an option is out of range or no room is left for a new token.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        row = Row(index, ids, min(max_new_tokens, self.context_tokens - len(ids)), **options)
        if not (0 <= row.temperature < float("inf") and 0 < row.top_p <= 1 and all(row.stop)):
            raise UserError("want 0 <= temperature < inf, 0 < top_p <= 1 and no empty stop")
        if not ids or not 0 <= min(ids) <= max(ids) < self.model.c.vocab_size:
            raise UserError(f"want tokens from 0 to {self.model.c.vocab_size - 1}, one or more")
        if row.room < 1:
            raise UserError(
                f"the prompt {prompt!r:.50} fills the model's context of "
                f"{self.context_tokens:,} tokens; shorten it"
            )
        return row

    def generate(self, prompts: list[str], max_new_tokens: int = 256, **options) -> list[str]:
        """Return the completions of `prompts`; `stream` takes the same options."""
        texts = [""] * len(prompts)
        with tqdm(total=len(prompts), unit="prompt", desc="generate", disable=None) as bar:
            for index, row in self.stream(prompts, max_new_tokens, **options):
                if row.done:
                    texts[index] = row.text
                    bar.update()
        return texts

    def stream(
        self, prompts: list[str], max_new_tokens: int, batch_size: int = 64, **options
    ) -> Iterator[tuple[int, Row]]:
        """Yield (prompt index, row) whenever the row has new tokens; `options` are Row fields.

        Raise UserError as `row` does, before generating anything.
        """
        rows = [self.row(i, p, max_new_tokens, **options) for i, p in enumerate(prompts)]
        if not rows:
            return
        batch = Batch(self, min(batch_size, len(rows)), max(len(r.ids) + r.room for r in rows))
        batch.waiting.extend(rows)
        while batch.rows or batch.waiting:
            for row in batch.step():
                yield row.index, row
        self._decoder = batch.decoder

    def extend(self, row: Row, tokens: list[int]) -> None:
        """Append new tokens to a row until it is done."""
        # A token is at least one byte, so these last tokens cover any stop string.
        reach = max((len(s.encode(errors="replace")) for s in row.stop), default=0) + 1
        for token in tokens:
            if token == self.end_of_text:
                row.done = "stop"
            else:
                row.tokens.append(token)
                tail = self.tokenizer.decode(row.tokens[-reach:]) if row.stop else ""
                if any(s in tail for s in row.stop):
                    row.done = "stop"
                elif len(row.tokens) == row.room:
                    row.done = "length"
            if row.done:
                text = self.tokenizer.decode(row.tokens)
                ends = [i for s in row.stop if (i := text.find(s)) >= 0]
                row.text = text[: min(ends, default=len(text))]
                return

    def settled(self, row: Row) -> str:
        """Return the part of a row's text that later tokens cannot change."""
        if row.done:
            return row.text
        held = max(map(len, row.stop), default=1) - 1  # the tail may begin a stop string
        text = self.tokenizer.decode(row.tokens).rstrip("\ufffd")  # or be half a character
        return text[: max(0, len(text) - held)]


class Batch:
    """Rows running on one decoder, and rows waiting for a slot."""

    def __init__(self, generator: Generator, size: int, positions: int):
        """Allocate `size` rows of up to `positions` tokens, prompt plus completion."""
        decoder, generator._decoder = generator._decoder, None  # `stream` gives it back
        if not decoder or size > len(decoder.token) or positions > decoder.last + 1:
            decoder = None  # free the old cache before allocating a new one
            decoder = generator.new_decoder(generator.model, size, positions)
        self.generator, self.decoder, self.size = generator, decoder, size
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()

    def step(self) -> list[Row]:
        """Refill finished rows' slots, step all rows, and return them."""
        for at in reversed(range(len(self.rows))):
            if self.rows[at].done and not self._admit(at):
                if (last := len(self.rows) - 1) != at:
                    self.decoder.move(last, at)
                self.rows[at] = self.rows[last]
                self.rows.pop()
        while len(self.rows) < self.size and self._admit(len(self.rows)):
            pass
        if self.rows:
            longest = max(len(row.ids) + len(row.tokens) for row in self.rows)
            for row, tokens in zip(self.rows, self.decoder.steps(len(self.rows), longest)):
                self.generator.extend(row, tokens)
        return list(self.rows)

    def _admit(self, at: int) -> bool:
        """Put the next waiting row into slot `at`; return False if none waits."""
        while self.waiting and self.waiting[0].done:
            self.waiting.popleft()
        if not self.waiting:
            return False
        row = self.waiting[0]  # stays queued if `load` fails
        key = np.array([row.seed % 2**64, row.index], dtype=np.uint64)
        draws = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(row.room))
        self.decoder.load(at, row.ids, draws, row.temperature, row.top_p)
        self.rows[at : at + 1] = [self.waiting.popleft()]
        return True


def main() -> None:
    config = parse(Config)
    for name in ("max_new_tokens", "samples", "batch_size"):
        require(config, name, getattr(config, name) >= 1, "1 or more")
    require(config, "port", 0 <= config.port < 2**16, "0 to 65535")
    if config.serve:
        own = {"checkpoint", "device", "fast", "batch_size", "serve", "port"}
        if others := differences(config).keys() - own:
            raise UserError(f"--serve takes no --{min(others)}: set it in each request")
        generator = Generator.load(config.checkpoint, config.device, config.fast)
        batch = Batch(generator, config.batch_size, generator.context_tokens)
        return serve(batch, config.checkpoint.resolve().name, config.port)
    if not config.prompt and sys.stdin.isatty():
        print("reading the prompt from the terminal; finish with Ctrl-D", file=sys.stderr)
    prompt = config.prompt or TextIOWrapper(sys.stdin.buffer, "utf-8", "surrogateescape").read()
    show = printable if sys.stdout.isatty() else str
    generator = Generator.load(config.checkpoint, config.device, config.fast)
    stop = tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in config.stop)
    options = {"temperature": config.temperature, "top_p": config.top_p, "stop": stop,
               "seed": config.seed, "batch_size": config.batch_size}  # fmt: skip
    if config.samples > 1:
        texts = generator.generate([prompt] * config.samples, config.max_new_tokens, **options)
        return print(("\n" + "-" * 40 + "\n").join(show(prompt + text) for text in texts))
    sent = 0
    for _, row in generator.stream([prompt], config.max_new_tokens, **options):
        text = prompt + generator.settled(row)
        print(show(text[sent:]), end="", flush=True)
        sent = len(text)
    print()


if __name__ == "__main__":
    run(main)
