"""Generate text from a checkpoint.

    python sample.py --checkpoint out/demo/runs/exercises --prompt "def add(a, b):"
    cat prompt.py | python sample.py --checkpoint out/demo/runs/exercises --temperature 0.8

`Generator` turns prompts into completions, for the evaluators too. It keeps a batch of rows, each
with a prompt of its own. A finished row takes the next prompt; when none is left, the last row
moves into its place and the batch shrinks. A `Decoder` picks the next token of every row, over a
static KV cache: in plain torch, or on a GPU with the kernels of kernels/decode.py as a CUDA graph.

A completion depends on its prompt, the prompt's index and the seed, never on the batch:

    draws       draw i for prompt p comes from Philox keyed by (seed, p), at count i
    choices     are integer arithmetic on exp(logit), exact in whatever order it is summed
    attention   is by row, and by prompt in the prefill
    products    torch: of as many rows as agree bit by bit (`same_rows`), in the prefill too, which
                takes several prompts at once; kernels: of tiles of 16 rows with K in one order,
                and the prefill takes one prompt at a time
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.config import UserError, parse, run
from model import KVCache, Phi, load_model, select_kernels
from tokenizer import Tokenizer

GPU_STEPS = 8  # tokens between two looks at what a GPU has generated


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


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 0.0  # 0 takes the likeliest token each time
    top_p: float = 1.0  # sample from the likeliest tokens that hold this probability
    logprobs: bool = False  # also give each token's log-probability, at temperature 1

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("want temperature >= 0 and 0 < top_p <= 1")


GREEDY = Sampling()


@dataclass
class Completion:
    """What a prompt was completed with."""

    text: str  # without the prompt, cut before a stop string
    tokens: list[int]  # whole ones: the last may hold the start of the stop string too
    logprobs: list[float]  # of `tokens`, natural logarithm; empty unless asked for
    finish: str  # stop (a stop string), end (<|endoftext|>), length (max_new_tokens), context


@dataclass
class Row:
    """A row of the batch: the prompt it completes, and what it has generated so far."""

    index: int  # of the prompt
    prompt_tokens: int
    room: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sent: int = 0  # characters given to on_text


class Generator:
    """Complete prompts with a model and its tokenizer."""

    def __init__(self, model: Phi, tokenizer: Tokenizer, kernels: bool | None = None):
        """Decode with kernels/decode.py if `kernels`; by default, on a GPU, as model.py chooses.

        The model's weights must stay as they are.
        """
        device = model.embed.weight.device
        if kernels is None:
            kernels = device.type == "cuda" and select_kernels(model.c, device)[0] == "triton"
        self.new_decoder = TritonDecoder if kernels else TorchDecoder
        self.model, self.tokenizer = model, tokenizer
        self.context_tokens = model.c.seq_len
        self.end_of_text = tokenizer.end_of_text
        self._decoder: Decoder | None = None  # of the last call, for the next

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> "Generator":
        """Load a run or checkpoint folder; in bfloat16 on a GPU, float32 on a CPU."""
        model, tokenizer, _ = load_model(path, device)
        return cls(model.bfloat16() if model.embed.weight.is_cuda else model, tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Return the prompt's tokens, after the tokenizer's start; at least one in all."""
        ids = [*self.tokenizer.start, *self.tokenizer.encode(prompt)]
        return ids or [self.tokenizer.end_of_text]

    def fits(self, prompt: str, new_tokens: int = 1) -> bool:
        """Return whether the context has room for the prompt and `new_tokens` more."""
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
        """Return the texts that `stream` gives, in the order of `prompts`."""
        sampling = Sampling(temperature, top_p)
        done = self.stream(prompts, max_new_tokens, sampling, stop, seed, batch_size)
        done = dict(tqdm(done, total=len(prompts), unit="prompt", desc="generate", disable=None))
        return [done[index].text for index in range(len(prompts))]

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
        """Yield (index of the prompt, its completion), each when it is finished.

        Calls `on_text(index, text)` with new text as soon as no later token can change it or turn
        it into a stop string. Raises UserError if a prompt fills the context.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        for prompt, tokens in zip(prompts, ids):
            if len(tokens) >= self.context_tokens:
                raise UserError(
                    f"the prompt {prompt!r:.50} has {len(tokens):,} tokens, and the model's "
                    f"context of {self.context_tokens:,} leaves no room to answer; shorten it"
                )
        if not prompts:
            return
        batch_size = min(batch_size, len(ids))
        positions = min(self.context_tokens, max(map(len, ids)) + max_new_tokens)
        need = (batch_size, positions, max_new_tokens)
        decoder, self._decoder = self._decoder, None  # ours until we are done
        if not (decoder and decoder.fits(*need)):
            decoder = None  # frees its cache before there is another
            decoder = self.new_decoder(self.model, *need)
        waiting = deque(range(len(ids)))

        def admit(at: int) -> Row:
            index = waiting.popleft()
            room = min(max_new_tokens, self.context_tokens - len(ids[index]))
            key = np.array([seed % 2**64, index], dtype=np.uint64)
            draws = np.random.Generator(np.random.Philox(key=key)).random(room)
            decoder.load(at, ids[index], torch.from_numpy(draws))
            return Row(index, len(ids[index]), room)

        rows = [admit(at) for at in range(batch_size)]
        while rows:
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
                if not finish:
                    continue
                yield row.index, self._completion(row, text, finish)
                if waiting:
                    rows[i] = admit(i)
                    continue
                last = rows.pop()
                if i < len(rows):
                    decoder.move(len(rows), i)
                    rows[i] = last
        self._decoder = decoder

    def _extend(self, row: Row, tokens: list[int], logprobs: list[float], stop) -> str:
        """Add new tokens to a row until it is finished; return why it is, or "" if it is not."""
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

    def _text(self, row: Row, stop: tuple[str, ...], finish: str) -> str:
        """Return a row's text up to a stop string; if it is not finished, only what is sure."""
        text = self.tokenizer.decode(row.tokens)
        if finish:
            return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]
        text = text.rstrip("\ufffd")  # a character with bytes still missing
        for held in range(max(map(len, stop), default=1) - 1, 0, -1):
            if any(s.startswith(text[-held:]) for s in stop):
                return text[:-held]
        return text

    def _completion(self, row: Row, text: str, finish: str) -> Completion:
        tokens = row.tokens  # without those that lie behind the end of the text
        while finish == "stop" and tokens and self.tokenizer.decode(tokens[:-1]).startswith(text):
            tokens = tokens[:-1]
        return Completion(text, tokens, row.logprobs[: len(tokens)], finish)


class Decoder:
    """Pick the next token of every row of a batch, over static buffers.

    A subclass says how many rows a step of n computes (`padded`), puts the keys and values of
    prompts into the cache (`_prefill`) and computes a step's logits (`_logits`).
    """

    prefill_tokens: int  # of prompts that go through the model at once

    def __init__(self, model: Phi, rows: int, positions: int, draws: int, dtype: torch.dtype):
        """Make room for `rows` texts of up to `positions` tokens, up to `draws` of them new."""
        c, device, rows = model.c, model.embed.weight.device, self.padded(rows)
        self.model = model
        self.last = min(positions, c.seq_len) - 1  # where no text goes on
        shape = (c.n_layer, 2, rows, c.n_head, positions, c.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # [L, k or v, B, H, S, D]
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # newest of each row
        self.position = torch.zeros_like(self.token)  # where it stands
        self.start = torch.zeros_like(self.token)  # where the prompt's last token stands
        self.draws = torch.zeros(rows, draws, dtype=torch.float64, device=device)
        self.logprob = torch.zeros(rows, device=device)
        self.prompts: list[tuple] = [()] * rows  # of each row, without the last token
        self.waiting: set[int] = set()  # rows whose prompts still have to go through the model
        self.graphs: dict = {}

    def fits(self, rows: int, positions: int, draws: int) -> bool:
        """Return whether the buffers have room for such a batch."""
        most = (len(self.token), self.cache.shape[4], self.draws.shape[1])
        return all(n <= m for n, m in zip((rows, positions, draws), most))

    @torch.inference_mode()
    def load(self, row: int, ids: list[int], draws: Tensor) -> None:
        """Put a prompt into `row`.

        All but its last token go through the model before the next step, unless another row's
        prompt was the same. The last one is left to the step, which so chooses every token.
        """
        prompt, last = tuple(ids[:-1]), len(ids) - 1
        twins = [r for r, p in enumerate(self.prompts) if p == prompt and r not in self.waiting]
        if twins:
            self.cache[:, :, row, :, :last] = self.cache[:, :, twins[0], :, :last]
            self.waiting.discard(row)
        else:
            self.waiting.add(row)
        self.prompts[row] = prompt
        self.token[row], self.position[row], self.start[row] = ids[-1], last, last
        self.draws[row, : len(draws)] = draws

    @torch.inference_mode()
    def move(self, source: int, row: int) -> None:
        """Put what `source` holds into `row`."""
        self._prefill_waiting()
        self.prompts[row] = self.prompts[source]
        self.cache[:, :, row] = self.cache[:, :, source]
        for x in (self.token, self.position, self.start, self.draws):
            x[row] = x[source]

    @torch.inference_mode()
    def steps(self, rows: int, longest: int, sampling: Sampling) -> tuple[list, list]:
        """Return the next tokens of the first `rows` rows and their logprobs: [rows][steps].

        `longest` is the length of the longest of these texts.
        """
        self._prefill_waiting()
        tokens, logprobs = [], []
        count, step = (GPU_STEPS, self._replay) if self.token.is_cuda else (1, self._step)
        for _ in range(count):
            step(self.padded(rows), longest, sampling)
            tokens.append(self.token[:rows].clone())
            logprobs.append(self.logprob[:rows].clone())
        tokens, logprobs = torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist()
        return tokens, logprobs if sampling.logprobs else [[]] * rows

    def _prefill_waiting(self) -> None:
        prompts: dict[tuple, list[int]] = {}  # their rows
        for row in self.waiting:
            prompts.setdefault(self.prompts[row], []).append(row)
        self.waiting.clear()
        left = [(ids, rows) for ids, rows in prompts.items() if ids]
        while left:
            most = max(1, self.prefill_tokens // max(len(ids) for ids, _ in left))
            self._prefill(left[:most])
            left = left[most:]

    def _replay(self, n: int, _longest: int, sampling: Sampling) -> None:
        """Run a step over the whole cache as one CUDA graph, captured when first needed."""
        if (n, sampling) not in self.graphs:
            longest, state = self.last + 1, [(x, x.clone()) for x in (self.token, self.position)]
            side = torch.cuda.Stream()  # torch wants a warm-up outside the default stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(n, longest, sampling)
            torch.cuda.current_stream().wait_stream(side)
            for x, old in state:  # what the step wrote to the cache, the next one writes again
                x.copy_(old)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(n, longest, sampling)
            self.graphs[n, sampling] = graph
        self.graphs[n, sampling].replay()

    def _step(self, n: int, longest: int, sampling: Sampling) -> None:
        logits = self._logits(n, longest)  # fp32 [n, V]
        position, draw = self.position[:n], None
        if sampling.temperature > 0:
            count = (position - self.start[:n]).clamp(max=self.draws.shape[1] - 1)
            draw = self.draws[:n].gather(1, count[:, None])[:, 0]
        token = choose(logits, draw, sampling.temperature, sampling.top_p)
        if sampling.logprobs:
            chosen = logits.gather(1, token[:, None])[:, 0]
            self.logprob[:n] = chosen - logits.logsumexp(-1)
        self.token[:n] = token
        # A row that is full is stepped on until it leaves; it then overwrites its last position.
        position.add_(1).clamp_(max=self.last)


class TritonDecoder(Decoder):
    """Decode with kernels/decode.py in the model's dtype: three launches a block."""

    prefill_tokens = 1  # each prompt goes alone

    @torch.inference_mode()
    def __init__(self, model: Phi, rows: int, positions: int, draws: int):
        from kernels import decode  # here, as triton is not everywhere

        self.kernels = decode
        super().__init__(model, rows, positions, draws, model.embed.weight.dtype)
        rows, (_, _, _, n_head, positions, head_dim) = len(self.token), self.cache.shape
        self.b_out = [b.b_attn + b.b_mlp for b in model.blocks]
        self.scratch = decode.scratch(rows, n_head, positions, head_dim, self.cache.device)

    def padded(self, rows: int) -> int:
        return rows if rows == 1 else -(-rows // self.kernels.ROWS) * self.kernels.ROWS

    def _prefill(self, prompts: list[tuple[tuple, list[int]]]) -> None:
        [(ids, rows)] = prompts
        idx = torch.tensor([ids], device=self.token.device)
        seen = KVCache(self.model.c, 1, len(ids), idx.device, self.cache.dtype)
        self.model(idx, cache=seen, positions=torch.arange(len(ids), device=idx.device)[None])
        for row in rows:
            self.cache[:, 0, row, :, : len(ids)] = seen.k[:, 0]
            self.cache[:, 1, row, :, : len(ids)] = seen.v[:, 0]

    def _logits(self, n: int, longest: int) -> Tensor:
        m, c, linear = self.model, self.model.c, self.kernels.linear
        C, position = c.width, self.position[:n]
        x = m.embed(self.token[:n])  # [n, C]
        qkv, ya = x.new_empty(n, 3 * C), x.new_empty(n, C + c.mlp_width)
        for b, b_out, cache in zip(m.blocks, self.b_out, self.cache):
            k, v = cache[:, :n]
            linear(x, b.w_in, b.b_in, qkv, norm=(b.ln.weight, b.ln.bias, b.ln.eps), act=ya[:, C:])
            self.kernels.attention(qkv, k, v, position, m.cos, m.sin, ya[:, :C], *self.scratch)
            linear(ya, b.w_out, b_out, x)
        logits = x.new_empty(n, c.vocab_size, dtype=torch.float32)
        norm = (m.ln_f.weight, m.ln_f.bias, m.ln_f.eps)
        linear(x, m.head.weight, m.head.bias, logits, norm=norm)
        return logits


class TorchDecoder(Decoder):
    """Decode in plain torch, with fp32 copies of the weights (phi-1's: 5.7 GB).

    BLAS chooses the order of a product's sums by its number of rows. With weights as [K, J], not
    as the transpose of [J, K], MKL has one order for 2 to 64 rows (it has three for the transpose);
    so the tokens of a step or of a prefill go through in products of that many.

    The pairs that rotary embedding turns lie side by side in queries and keys, as complex numbers:
    one multiplication turns them and puts q, k and v in order. `model.rotate` has the same bits in
    a dozen operations, which cost a tenth of a step at batch 1.
    """

    prefill_tokens = 512

    @torch.inference_mode()
    def __init__(self, model: Phi, rows: int, positions: int, draws: int):
        self.model, c, device = model, model.c, model.embed.weight.device
        if c.head_dim % 2 or c.mlp_width % 2:
            raise UserError(
                f"generation wants an even head dim (width / n_head, {c.head_dim}) and an even "
                f"mlp_width ({c.mlp_width})"
            )
        order = torch.arange(3 * c.width + c.mlp_width)
        heads = order[: 2 * c.width].view(2 * c.n_head, c.head_dim)[:, : c.rotary_dim]
        heads.copy_(heads.unflatten(1, (2, -1)).mT.flatten(1).clone())

        def fp32(w: Tensor) -> Tensor:
            return w.t().float().contiguous()  # [J, K] -> [K, J]; a bias stays [J]

        self.layers = [
            (fp32(b.ln.weight), fp32(b.ln.bias), fp32(b.w_in[order]), fp32(b.b_in[order]),
             fp32(b.w_out), fp32(b.b_attn + b.b_mlp))
            for b in model.blocks
        ]  # fmt: skip
        self.embed, self.eps = model.embed.weight.float(), model.ln_f.eps
        self.ln_f = fp32(model.ln_f.weight), fp32(model.ln_f.bias)
        self.w_head, self.b_head = fp32(model.head.weight), fp32(model.head.bias)
        # What each pair of q, k and v is multiplied with as a complex number: [3, T, 1, D/2].
        shape = (3, c.seq_len, 1, c.head_dim // 2)
        self.turn = torch.ones(shape, dtype=torch.complex64, device=device)
        self.turn[:2, :, 0, : c.rotary_dim // 2] = torch.complex(model.cos, model.sin)
        self.same = same_rows([self.layers[0][2], self.layers[0][4], self.w_head])
        positions = self.span(positions)
        super().__init__(model, rows, positions, draws, torch.float32)
        slot = torch.arange(2 * len(self.token) * c.n_head, device=device) * positions
        self.slot = slot.view(2, -1, c.n_head)  # where each head's keys and values begin
        far = torch.full((positions, positions), float("-inf"), device=device)
        self.mask = far.triu(1)[:, None, None]  # [position, 1, 1, position that it may see]
        self.views = {}

    def span(self, positions: int) -> int:
        """Return how much of the cache a step reads for texts of up to `positions` tokens.

        A multiple of 8, and enough for attention's products to be of 400 multiplications or more,
        as torch has another kernel for fewer: with either otherwise, a row's bits would depend on
        the longest row beside it.
        """
        return -(-max(positions, 400 // self.model.c.head_dim + 1) // 8) * 8

    def padded(self, rows: int) -> int:
        rows += rows % 2  # as BLAS has another routine for one row than for two
        return rows if rows <= self.same else -(-rows // self.same) * self.same

    def _blocks(self, token: Tensor, position: Tensor, attend: Callable) -> Tensor:
        """Return the residual stream [n, C] of tokens [n], n even, at `position` [n].

        `attend(layer, qkv, y)` puts the attention of qkv [3, n, H, D] into y [n, C].
        """
        x, turn = torch.embedding(self.embed, token), self.turn[:, position]
        (n, C), (_, _, _, H, _, D), M = x.shape, self.cache.shape, self.model.c.mlp_width
        h, ya, qkv = x.new_empty(n, 3 * C + M), x.new_empty(n, C + M), x.new_empty(3, n, H, D)
        up, y, a = h[:, 3 * C :], ya[:, :C], ya[:, C:]
        pairs = torch.view_as_complex(h[:, : 3 * C].view(n, 3, H, D // 2, 2)).transpose(0, 1)
        turned = torch.view_as_complex(qkv.view(3, n, H, D // 2, 2))
        for i, (gain, bias, w_in, b_in, w_out, b_out) in enumerate(self.layers):
            normed = torch.layer_norm(x, (C,), gain, bias, self.eps)
            grouped_linear(normed, w_in, b_in, self.same, out=h)  # q | k | v | up
            torch.mul(pairs, turn, out=turned)
            attend(i, qkv, y)
            F.gelu(up, approximate="tanh", out=a)
            x = x + grouped_linear(ya, w_out, b_out, self.same)
        return x

    def _prefill(self, prompts: list[tuple[tuple, list[int]]]) -> None:
        ids = torch.tensor([token for ids, _ in prompts for token in ids])
        position = torch.cat([torch.arange(len(ids)) for ids, _ in prompts])
        n = self.padded(len(ids))
        ids, position = (F.pad(x, (0, n - len(x))).to(self.token.device) for x in (ids, position))

        def attend(layer: int, qkv: Tensor, y: Tensor) -> None:
            at = 0
            for prompt, rows in prompts:
                one = qkv[:, None, at : at + len(prompt)].transpose(2, 3)  # [3, 1, H, T, D]
                for row in rows:
                    self.cache[layer, :, row, :, : len(prompt)] = one[1:, 0]
                one = F.scaled_dot_product_attention(*one, is_causal=True)[0]
                y[at : at + len(prompt)].view(-1, *qkv.shape[2:]).copy_(one.transpose(0, 1))
                at += len(prompt)

        self._blocks(ids, position, attend)

    def _logits(self, n: int, longest: int) -> Tensor:
        position, (_, _, _, H, _, D), seen = self.position[:n], self.cache.shape, self.span(longest)
        mask = self.mask[position, ..., :seen].expand(n, H, 1, seen).reshape(n * H, 1, seen)
        at = (self.slot[:, :n] + position[:, None]).flatten()
        if (n, seen) not in self.views:
            heads = self.cache[:, :, :n, :, :seen].flatten(2, 3)  # [L, k or v, n H, S, D]
            views = [(kv.view(-1, D), k.mT, v) for kv, (k, v) in zip(self.cache, heads)]
            self.views = {(n, seen): views}  # the last step's only
        views = self.views[n, seen]

        def attend(layer: int, qkv: Tensor, y: Tensor) -> None:
            cache, k, v = views[layer]
            cache.index_copy_(0, at, qkv[1:].view(-1, D))
            # Half the time of scaled_dot_product_attention for one query a head.
            s = torch.baddbmm(mask, qkv[0].view(n * H, 1, D), k, alpha=D**-0.5)  # [n H, 1, S]
            y.copy_(torch.bmm(s.softmax(-1), v).view(n, H * D))

        x = self._blocks(self.token[:n], position, attend)
        x = torch.layer_norm(x, x.shape[1:], *self.ln_f, self.eps)
        return grouped_linear(x, self.w_head, self.b_head, self.same)


def grouped_linear(x: Tensor, w: Tensor, b: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
    """Return x w + b for x [n, K] and w [K, J], in products of up to `rows` rows each."""
    if len(x) <= rows:
        return torch.addmm(b, x, w, out=out)
    if out is None:
        out = x.new_empty(len(x), w.shape[1])
    for part, to in zip(x.split(rows), out.split(rows)):
        torch.addmm(b, part, w, out=to)
    return out


@torch.inference_mode()
def same_rows(weights: list[Tensor]) -> int:
    """Return how many rows a product may have for a row's bits to depend on it alone, 64 at most.

    An even number such that products of 2, 4, .. rows up to it agree here on weights [K, J]; one
    row would have a routine of its own. With MKL 2024.2 and AVX-512 it is 64.
    """
    most = 64
    for w in weights:
        generator = torch.Generator(w.device).manual_seed(0)
        x = torch.randn(most, len(w), generator=generator, device=w.device)
        bias = w.new_ones(w.shape[1])
        want = grouped_linear(x, w, bias, 2)
        for n in range(4, most + 1, 2):
            if not torch.equal(torch.addmm(bias, x[:n], w), want[:n]):
                most = n - 2
                break
    return most


@torch.inference_mode()
def choose(logits: Tensor, draws: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """Return a token [B] for each row of logits [B, V]: its distribution inverted at draws [B].

    Probabilities are summed as integers: exact, and so the same however a sum is split.
    """
    if temperature == 0 and logits.is_cuda:
        return logits.argmax(-1)
    if temperature == 0:  # a fifteenth of torch's time
        return torch.from_numpy(logits.numpy().argmax(-1))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    mass = (logits.exp() * 2.0**40).long()  # 2^40: sums of 2^22 tokens fit 63 bits
    if top_p < 1:
        mass, order = mass.sort(dim=-1, descending=True, stable=True)
    total = mass.cumsum(-1)  # [B, V]
    kept = total[:, -1:]
    if top_p < 1:  # the token that crosses top_p is in
        inside = total - mass < (top_p * kept.double()).long()
        kept = torch.where(inside, total, 0).amax(-1, keepdim=True)
    at = (draws[:, None].double() * kept.double()).long()
    choice = torch.searchsorted(total, at, right=True)
    choice = choice.clamp(max=logits.shape[1] - 1)  # the logits of a model that diverged are NaN
    return (order.gather(-1, choice) if top_p < 1 else choice)[:, 0]


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
