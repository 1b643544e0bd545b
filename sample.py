"""Generate text from a checkpoint.

    python sample.py --checkpoint out/demo/runs/exercises --prompt "def add(a, b):"
    cat prompt.py | python sample.py --checkpoint out/demo/runs/exercises --temperature 0.8
    python sample.py --checkpoint out/demo/runs/exercises --serve

A `Batch` steps rows, each with a prompt and options of its own, on a `Decoder`. A finished row
gives its place to the next one that waits; when none does, the last row moves there and the batch
shrinks. `Generator` completes prompts this way, and with `--serve` common/serve.py requests.

A completion depends on its prompt, options, index and seed, never on the batch: draws come from
Philox keyed by (seed, index), and a decoder computes a row as if it were alone.
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

    checkpoint: Path  # run folder (its best checkpoint is used) or checkpoint folder
    prompt: str = ""  # text to complete; without it, all of stdin
    max_new_tokens: int = 128  # tokens to add at most
    temperature: float = 0.0  # 0 takes the likeliest token each time
    top_p: float = 1.0  # sample from the likeliest tokens that hold this probability
    samples: int = 1  # completions of the prompt
    stop: tuple[str, ...] = ()  # end a completion before this text ("\n" works); may be repeated
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu or cuda
    fast: bool = False  # let the last bits of a number depend on how many rows a batch has
    batch_size: int = 64  # completions at once, each of 8 bytes x n_layer x width x tokens (4 on a
    # GPU); --serve takes that for whole contexts from the start: phi-1's are 0.8 GB each (0.4)
    serve: bool = False  # answer OpenAI's completions API on this machine in place of a prompt
    port: int = 8000  # of --serve; 0 takes any free one


@dataclass
class Row:
    """A row of a batch: the prompt it completes, how, and the completion."""

    index: int  # of the prompt
    ids: list[int]  # of the prompt
    room: int  # new tokens at most
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    owner: object = field(default=None, compare=False)  # whoever asked
    tokens: list[int] = field(default_factory=list)
    done: str = ""  # why no token follows: "stop", "length", or whatever an owner puts here
    text: str = ""  # of the tokens, up to a stop string, once done


class Generator:
    """Complete prompts with a model and its tokenizer."""

    def __init__(self, model: Phi, tokenizer: Tokenizer, fast: bool = False):
        """The model's weights must stay as they are."""
        device = model.embed.weight.device
        kernels = device.type == "cuda" and select_kernels(model.c, device)[0] == "triton"
        self.new_decoder = TritonDecoder if kernels else partial(TorchDecoder, fast=fast)
        self.model, self.tokenizer = model, tokenizer
        self.context_tokens = model.c.seq_len
        self.end_of_text = tokenizer.end_of_text
        self._decoder: Decoder | None = None  # of the last call, for the next

    @classmethod
    def load(cls, path: Path, device: str = "auto", fast: bool = False) -> "Generator":
        """Load a run or checkpoint folder; in bfloat16 on a GPU, float32 on a CPU."""
        model, tokenizer, _ = load_model(path, device)
        return cls(model.bfloat16() if model.embed.weight.is_cuda else model, tokenizer, fast)

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of the tokenizer's start and the prompt; at least one in all."""
        return [*self.tokenizer.start, *self.tokenizer.encode(prompt)] or [self.end_of_text]

    def fits(self, prompt: str) -> bool:
        """Return whether the context has room for the prompt and a token more."""
        return len(self.encode(prompt)) < self.context_tokens

    def row(self, index: int, prompt: str | list[int], max_new_tokens: int, **options) -> Row:
        """Return a row to complete `prompt`, a text or the model's tokens; `options` are Row's.

        Raises UserError for an option out of range, and if the prompt fills the context.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        row = Row(index, ids, min(max_new_tokens, self.context_tokens - len(ids)), **options)
        if not (0 <= row.temperature < float("inf") and 0 < row.top_p <= 1 and all(row.stop)):
            raise UserError("want 0 <= temperature < inf, 0 < top_p <= 1 and no empty stop")
        if not ids or not 0 <= min(ids) <= max(ids) < self.model.c.vocab_size:
            raise UserError(f"want tokens from 0 to {self.model.c.vocab_size - 1}, one or more")
        if row.room < 1:
            raise UserError(
                f"the prompt {prompt!r:.50} and the model's context of "
                f"{self.context_tokens:,} tokens leave no room to answer; shorten it"
            )
        return row

    def generate(self, prompts: list[str], max_new_tokens: int = 256, **options) -> list[str]:
        """Return the completions of `prompts`; see `stream` for the options."""
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
        """Yield (index of the prompt, its row) each time that the row has new tokens.

        Raises what `row` raises, which takes the options, before anything else.
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
        """Add new tokens to a row until it is done."""
        # A token has a byte or more.
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
        """Return the text of a row that no further token changes."""
        if row.done:
            return row.text
        held = max(map(len, row.stop), default=1) - 1  # the end may be the start of a stop string
        text = self.tokenizer.decode(row.tokens).rstrip("\ufffd")  # or a part of a character
        return text[: max(0, len(text) - held)]


class Batch:
    """Rows under way on one decoder, and those that wait for a place."""

    def __init__(self, generator: Generator, size: int, positions: int):
        """Make room for `size` rows of up to `positions` tokens, prompt and completion."""
        decoder, generator._decoder = generator._decoder, None  # ours until we are done
        if not decoder or size > len(decoder.token) or positions > decoder.last + 1:
            decoder = None  # frees its cache before there is another
            decoder = generator.new_decoder(generator.model, size, positions)
        self.generator, self.decoder, self.size = generator, decoder, size
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()

    def step(self) -> list[Row]:
        """Fill the places of rows that are done, then return all rows, each with new tokens."""
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
        """Put the next waiting row at place `at`; return whether there was one."""
        while self.waiting and self.waiting[0].done:
            self.waiting.popleft()
        if not self.waiting:
            return False
        row = self.waiting[0]  # here, or in `rows`, whatever fails
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
            raise UserError(f"--serve takes no --{min(others)}: each request brings its own")
        generator = Generator.load(config.checkpoint, config.device, config.fast)
        batch = Batch(generator, config.batch_size, generator.context_tokens)
        return serve(batch, config.checkpoint.resolve().name, config.port)
    if not config.prompt and sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
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
