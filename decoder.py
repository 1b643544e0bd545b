"""The next token of every row of a batch: static KV cache, one pass through the model, a choice.

In plain torch on a CPU; on a GPU with the kernels of kernels/decode.py, as one CUDA graph. A row's
tokens depend on its prompt and its draws, never on the batch:

    prompts      go through the model alone, before they join the batch
    steps, GPU   products are of tiles of 16 rows with K in one order, attention is by row
    steps, CPU   a BLAS sums in another order for another number of rows, so that products are of
                 groups of rows, in numbers that `same_rows` has found to agree bit by bit
    choices      are integer arithmetic on exp(logit), which no order of summing changes
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from model import KVCache, ModelConfig, Phi

# On a CPU attention reads the cache up to a multiple of 16 positions, and so many that its products
# are of 400 multiplications or more, as torch has another kernel for fewer: with either otherwise,
# the bits of a row depend on the longest row beside it.
SPAN, SPAN_PRODUCT = 16, 400
MOST_ROWS = 64  # of a product on a CPU
PREFILL_TOKENS = 1024  # of prompts that go through the model at once on a CPU
TILE = 16  # rows of a tile in kernels/decode.py
GPU_STEPS = 8  # tokens between two looks at what a GPU has generated


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0 takes the likeliest token each time
    top_p: float = 1.0  # sample from the likeliest tokens that hold this probability
    logprobs: bool = False  # also give each token's log-probability, at temperature 1

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("want temperature >= 0 and 0 < top_p <= 1")


GREEDY = Sampling()


class Decoder:
    """The next token of up to `rows` texts at a time, over static buffers."""

    @torch.inference_mode()
    def __init__(self, model: Phi, rows: int, positions: int, draws: int, kernels: bool):
        """For texts of up to `positions` tokens with up to `draws` new ones.

        `kernels` takes those of kernels/decode.py instead of torch. The model's weights must stay
        as they are.
        """
        c, device = model.c, model.embed.weight.device
        dtype = model.embed.weight.dtype if kernels else torch.float32
        self.model, self.kernels, self.rows = model, kernels, rows
        self.tile = TILE
        if not kernels:
            self.layers, self.head = layouts(model)
            self.tile = same_rows([self.layers[0].w_in, self.layers[0].w_out, self.head.w_in])
        rows, self.positions = self.padded(rows), self.span(positions)
        self.last = min(self.positions, c.seq_len) - 1  # where no text goes on
        shape = (c.n_layer, 2, rows, c.n_head, self.positions, c.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # [L, k or v, B, H, S, D]
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # newest of each row
        self.position = torch.zeros_like(self.token)  # where it stands
        self.start = torch.zeros_like(self.token)  # where the prompt's last token stands
        self.draws = torch.zeros(rows, draws, dtype=torch.float64, device=device)
        self.logprob = torch.zeros(rows, device=device)
        self.prompts: dict[tuple, list[int]] = {}  # still to go through the model; their rows
        self.graphs: dict = {}
        if kernels:
            from kernels import decode  # here, as triton is not everywhere

            self.b_out = [b.b_attn + b.b_mlp for b in model.blocks]
            self.scratch = decode.scratch(rows, c.n_head, self.positions, c.head_dim, device)
            return
        self.buffers, self.views = Buffers(c, rows, device), {}
        # What each pair of q, k and v is multiplied with as a complex number: [3, T, 1, D/2].
        turn = torch.ones(3, c.seq_len, 1, c.head_dim // 2, dtype=torch.complex64)
        turn[:2, :, 0, : c.rotary_dim // 2] = torch.complex(model.cos, model.sin).cpu()
        self.turn = turn.to(device)
        slot = torch.arange(2 * rows * c.n_head, device=device) * self.positions
        self.slot = slot.view(2, rows, c.n_head)  # where each head's keys and values begin
        far = torch.full((self.positions,) * 2, float("-inf"), device=device)
        self.mask = far.triu(1)[:, None, None]  # [position, 1, 1, position that it may see]

    def padded(self, rows: int) -> int:
        """How many rows a step of `rows` computes."""
        if self.kernels:
            return rows if rows == 1 else -(-rows // TILE) * TILE
        rows += rows % 2  # as BLAS has another routine for one row than for two
        return rows if rows <= self.tile else -(-rows // self.tile) * self.tile

    def span(self, positions: int) -> int:
        """How much of the cache a step reads for texts of up to `positions` tokens."""
        least = SPAN_PRODUCT // self.model.c.head_dim + 1
        return -(-max(positions, least) // SPAN) * SPAN

    def fits(self, rows: int, positions: int, draws: int) -> bool:
        """Whether the buffers have room for a batch like that."""
        return rows <= self.rows and positions <= self.positions and draws <= self.draws.shape[1]

    @torch.inference_mode()
    def load(self, row: int, ids: list[int], draws: Tensor, twin: int | None = None) -> None:
        """Put a prompt into `row`; `twin` is a row that holds the same prompt already.

        All but its last token go through the model before the next step, which takes the last one,
        so that every choice of a token is made by `steps`.
        """
        last = len(ids) - 1
        for rows in self.prompts.values():  # what waits for this row has left it
            rows[:] = [r for r in rows if r != row]
        if tuple(ids[:-1]) in self.prompts or twin is None:
            self.prompts.setdefault(tuple(ids[:-1]), []).append(row)
        else:
            self.cache[:, :, row, :, :last] = self.cache[:, :, twin, :, :last]
        self.token[row], self.position[row], self.start[row] = ids[-1], last, last
        self.draws[row, : len(draws)] = draws

    def _prefill(self) -> None:
        """Put the keys and values of the prompts that wait into their rows."""
        prompts = [(ids, rows) for ids, rows in self.prompts.items() if ids and rows]
        self.prompts.clear()
        while prompts:
            if self.kernels:
                (ids, rows), *prompts = prompts
                idx = torch.tensor([ids], device=self.token.device)
                seen = KVCache(self.model.c, 1, len(ids), idx.device, self.cache.dtype)
                self.model(
                    idx, cache=seen, positions=torch.arange(len(ids), device=idx.device)[None]
                )
                for row in rows:
                    self.cache[:, 0, row, :, : len(ids)] = seen.k[:, 0]
                    self.cache[:, 1, row, :, : len(ids)] = seen.v[:, 0]
            else:
                ends = list(accumulate(len(ids) for ids, _ in prompts))
                count = max(1, bisect_right(ends, PREFILL_TOKENS))
                self._prefill_torch(prompts[:count])
                prompts = prompts[count:]

    @torch.inference_mode()
    def move(self, source: int, row: int) -> None:
        """Put what `source` holds into `row`."""
        self._prefill()
        self.cache[:, :, row] = self.cache[:, :, source]
        for x in (self.token, self.position, self.start, self.draws):
            x[row] = x[source]

    @torch.inference_mode()
    def steps(self, rows: int, longest: int, sampling: Sampling) -> tuple[list, list]:
        """The next tokens of the first `rows` rows, and their log-probabilities: [rows][steps].

        `longest` is the length of the longest of these texts.
        """
        if self.prompts:
            self._prefill()
        if not self.token.is_cuda:
            self._step(self.padded(rows), self.span(longest), sampling)
            logprobs = self.logprob[:rows, None].tolist() if sampling.logprobs else [[]] * rows
            return self.token[:rows, None].tolist(), logprobs
        tokens, logprobs = [], []
        for _ in range(GPU_STEPS):
            self._replay(self.padded(rows), sampling)
            tokens.append(self.token[:rows].clone())
            if sampling.logprobs:
                logprobs.append(self.logprob[:rows].clone())
        logprobs = torch.stack(logprobs, 1).tolist() if logprobs else [[]] * rows
        return torch.stack(tokens, 1).tolist(), logprobs

    def _replay(self, rows: int, sampling: Sampling) -> None:
        """A step as one CUDA graph, captured when it is first needed."""
        key = (rows, sampling)
        if key not in self.graphs:
            state = [(x, x.clone()) for x in (self.token, self.position)]
            side = torch.cuda.Stream()  # torch wants a warm-up outside the default stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(rows, self.positions, sampling)
            torch.cuda.current_stream().wait_stream(side)
            for x, old in state:  # what the step wrote to the cache, the next one writes again
                x.copy_(old)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(rows, self.positions, sampling)
            self.graphs[key] = graph
        self.graphs[key].replay()

    def _step(self, n: int, span: int, sampling: Sampling) -> None:
        logits = self._logits_kernels(n) if self.kernels else self._logits_torch(n, span)
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

    def _logits_kernels(self, n: int) -> Tensor:
        """fp32 logits [n, V]; kernels/decode.py: three launches a block."""
        from kernels import decode

        m, c = self.model, self.model.c
        C, position = c.width, self.position[:n]
        x = m.embed(self.token[:n])
        qkv, ya = x.new_empty(n, 3 * C), x.new_empty(n, C + c.mlp_width)
        for b, b_out, cache in zip(m.blocks, self.b_out, self.cache):
            norm = (b.ln.weight, b.ln.bias, b.ln.eps)
            decode.linear(x, b.w_in, b.b_in, qkv, norm=norm, act=ya[:, C:])
            k, v = cache[:, :n]
            decode.attention(qkv, k, v, position, m.cos, m.sin, ya[:, :C], *self.scratch)
            decode.linear(ya, b.w_out, b_out, x)
        logits = x.new_empty(n, c.vocab_size, dtype=torch.float32)
        norm = (m.ln_f.weight, m.ln_f.bias, m.ln_f.eps)
        decode.linear(x, m.head.weight, m.head.bias, logits, norm=norm)
        return logits

    def _logits_torch(self, n: int, span: int) -> Tensor:
        """fp32 logits [n, V]; what the model does, for one token a row and in fewer operations."""
        H, D, position = self.model.c.n_head, self.model.c.head_dim, self.position[:n]
        mask = self.mask[position, ..., :span].expand(n, H, 1, span).reshape(n * H, 1, span)
        at = (self.slot[:, :n] + position[:, None]).flatten()
        if (n, span) not in self.views:
            seen = self.cache[:, :, :n, :, :span].flatten(2, 3)  # [L, k or v, n H, span, D]
            caches = [(c.view(-1, D), k.mT, v) for c, (k, v) in zip(self.cache, seen)]
            self.views[n, span] = Buffers(self.model.c, n, self.token.device, self.buffers), caches
        buffers, caches = self.views[n, span]

        def attend(layer: int, qkv: Tensor, y: Tensor) -> None:
            cache, k, v = caches[layer]
            cache.index_copy_(0, at, buffers.kv)
            # Half the time of scaled_dot_product_attention for one query a head.
            s = torch.baddbmm(mask, buffers.q, k, alpha=D**-0.5)  # [n H, 1, span]
            y.copy_(torch.bmm(s.softmax(-1), v).view(n, H * D))

        x, head = self._blocks(self.token[:n], position, buffers, attend), self.head
        x = torch.layer_norm(x, x.shape[1:], head.gain, head.bias, head.eps)
        return grouped_linear(x, head.w_in, head.b_in, self.tile)

    def _prefill_torch(self, prompts: list[tuple[tuple, list[int]]]) -> None:
        """Put keys and values of prompts into their rows; all of them in one pass."""
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

        self._blocks(ids, position, Buffers(self.model.c, n, ids.device), attend)

    def _blocks(self, token: Tensor, position: Tensor, buffers: "Buffers", attend) -> Tensor:
        """The residual stream [n, C] of tokens [n] after the blocks.

        `attend(layer, qkv, y)` puts the attention of qkv [3, n, H, D] into y [n, C].
        """
        x = torch.embedding(self.head.w_out, token)
        b, turn = buffers, self.turn[:, position]
        for i, w in enumerate(self.layers):
            normed = torch.layer_norm(x, x.shape[1:], w.gain, w.bias, w.eps)
            grouped_linear(normed, w.w_in, w.b_in, self.tile, b.h)
            torch.mul(b.pairs, turn, out=b.turned)
            attend(i, b.qkv, b.y)
            F.gelu(b.up, approximate="tanh", out=b.a)
            x = x + grouped_linear(b.ya, w.w_out, w.b_out, self.tile)
        return x


class Buffers:
    """What n tokens write on their way through a block, n even; parts of a larger one's memory."""

    def __init__(self, c: ModelConfig, n: int, device, of: "Buffers | None" = None):
        C, M, H, D = c.width, c.mlp_width, c.n_head, c.head_dim
        sizes = [n * 3 * C, n * (3 * C + M), n * (C + M)]
        self.memory = of.memory if of else torch.empty(sum(sizes), device=device)
        qkv, h, ya = self.memory[: sum(sizes)].split(sizes)
        self.h, self.ya = h.view(n, -1), ya.view(n, -1)  # [n, 3C + M], [n, C + M]
        self.up, self.y, self.a = self.h[:, 3 * C :], self.ya[:, :C], self.ya[:, C:]
        pairs = self.h[:, : 3 * C].view(n, 3, H, D // 2, 2)
        self.pairs = torch.view_as_complex(pairs).transpose(0, 1)  # [3, n, H, D/2]
        self.turned = torch.view_as_complex(qkv.view(3, n, H, D // 2, 2))
        self.qkv = qkv.view(3, n, H, D)
        self.q, self.kv = self.qkv[0].view(n * H, 1, D), self.qkv[1:].view(2 * n * H, D)


class Layer(NamedTuple):
    """The fp32 weights of a block; of the head, with the embedding as its w_out."""

    gain: Tensor
    bias: Tensor
    eps: float
    w_in: Tensor  # [C, 3C + M]; of the head, [C, V]
    b_in: Tensor
    w_out: Tensor  # [C + M, C]; of the head, [V, C]
    b_out: Tensor | None


@torch.inference_mode()
def layouts(model: Phi) -> tuple[list[Layer], Layer]:
    """Copies of the weights: the blocks' and the head's.

    Matrices are [K, J], as a BLAS then sums in the same order for more numbers of rows. The pairs
    that rotary embedding turns lie side by side in queries and keys, as complex numbers.
    """
    c, last = model.c, model.ln_f
    order = torch.arange(3 * c.width + c.mlp_width)
    heads = order[: 2 * c.width].view(2 * c.n_head, c.head_dim)[:, : c.rotary_dim]
    heads.copy_(heads.unflatten(1, (2, -1)).mT.flatten(1).clone())
    layers = []
    for b in model.blocks:
        w_in, b_in = b.w_in[order].t().float().contiguous(), b.b_in[order].float()
        w_out, b_out = b.w_out.t().float().contiguous(), (b.b_attn + b.b_mlp).float()
        norm = (b.ln.weight.float(), b.ln.bias.float(), b.ln.eps)
        layers.append(Layer(*norm, w_in, b_in, w_out, b_out))
    w_in, b_in = model.head.weight.t().float().contiguous(), model.head.bias.float()
    norm = (last.weight.float(), last.bias.float(), last.eps)
    return layers, Layer(*norm, w_in, b_in, model.embed.weight.float(), None)


def grouped_linear(x: Tensor, w: Tensor, b: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
    """x w + b of x [N, K] and w [K, J], as products of up to `rows` rows each."""
    if len(x) <= rows:
        return torch.addmm(b, x, w, out=out)
    if out is None:
        out = x.new_empty(len(x), w.shape[1])
    for part, to in zip(x.split(rows), out.split(rows)):
        torch.addmm(b, part, w, out=to)
    return out


@torch.inference_mode()
def same_rows(weights: list[Tensor]) -> int:
    """How many rows a product may have, at most, for a row's bits to depend on it alone.

    An even number such that products of 2, 4, .. rows up to it agree here on weights [K, J]; one
    row would have a routine of its own. With MKL 2024.2 and AVX-512 it is MOST_ROWS.
    """
    tile = MOST_ROWS
    for w in weights:
        generator = torch.Generator(w.device).manual_seed(0)
        x = torch.randn(tile, len(w), generator=generator, device=w.device).to(w.dtype)
        bias = w.new_ones(w.shape[1])
        want = grouped_linear(x, w, bias, 2)
        for n in range(4, tile + 1, 2):
            if not torch.equal(torch.addmm(bias, x[:n], w), want[:n]):
                tile = n - 2
                break
    return tile


@torch.inference_mode()
def choose(logits: Tensor, draws: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """A token [B] for each row of logits [B, V], by inverting its distribution at draws [B].

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
