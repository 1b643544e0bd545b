"""The next token of every row of a batch: static KV cache, one pass through the model, a choice.

In plain torch on a CPU; on a GPU with the kernels of kernels/decode.py, as one CUDA graph. A row's
tokens depend on its prompt and its draws, never on the batch:

    prompts      go through the model alone, before they join the batch
    steps, GPU   products are of tiles of 16 rows with K in one order, attention is by row
    steps, CPU   a BLAS sums in another order for another number of rows, so that products are of
                 groups of rows, in numbers that `same_rows` has found to agree bit by bit
    choices      are integer arithmetic on exp(logit), which no order of summing changes
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from model import KVCache, Phi

# On a CPU attention reads the cache up to a multiple of 16 positions, and so many that its products
# are of 400 multiplications or more, as torch has another kernel for fewer: with either otherwise,
# the bits of a row depend on the longest row beside it.
SPAN, SPAN_PRODUCT = 16, 400
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
        c, like = model.c, model.embed.weight
        self.model, self.kernels, self.rows = model, kernels, rows
        self.tile = TILE if kernels else same_rows(model)
        rows, self.positions = self.padded(rows), self.span(positions)
        shape = (c.n_layer, 2, rows, c.n_head, self.positions, c.head_dim)
        self.cache = like.new_zeros(shape)  # [L, k or v, B, H, S, D]
        self.token = torch.zeros(rows, dtype=torch.int64, device=like.device)  # newest of each row
        self.position = torch.zeros_like(self.token)  # where it stands
        self.start = torch.zeros_like(self.token)  # where the prompt's last token stands
        self.draws = torch.zeros(rows, draws, dtype=torch.float64, device=like.device)
        self.logprob = torch.zeros(rows, device=like.device)
        # The rotary tables for pairs laid side by side, so that one product turns both halves.
        self.cos = torch.cat([model.cos, model.cos], -1)[:, None]  # [T, 1, R]
        self.sin = torch.cat([-model.sin, model.sin], -1)[:, None]
        self.layers = [
            (b, b.w_in.t(), b.w_out.t(), b.b_attn + b.b_mlp, cache)
            for b, cache in zip(model.blocks, self.cache)
        ]
        slot = torch.arange(2 * rows * c.n_head, device=like.device) * self.positions
        self.slot = slot.view(2, rows, c.n_head)  # where each head's keys and values begin
        self.graphs: dict = {}
        if kernels:
            from kernels import decode  # here, as triton is not everywhere

            self.scratch = decode.scratch(rows, c.n_head, self.positions, c.head_dim, like.device)

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

        All but its last token go through the model here. The first step takes the last one, so that
        every choice of a token is made by `steps`.
        """
        last = len(ids) - 1
        if twin is not None:
            self.cache[:, :, row, :, :last] = self.cache[:, :, twin, :, :last]
        elif last:
            idx = torch.tensor([ids[:-1]], device=self.token.device)
            seen = KVCache(self.model.c, 1, last, self.token.device, self.cache.dtype)
            self.model(idx, cache=seen, positions=torch.arange(last, device=idx.device)[None])
            self.cache[:, 0, row, :, :last] = seen.k[:, 0]
            self.cache[:, 1, row, :, :last] = seen.v[:, 0]
        self.token[row], self.position[row], self.start[row] = ids[-1], last, last
        self.draws[row, : len(draws)] = draws

    @torch.inference_mode()
    def move(self, source: int, row: int) -> None:
        """Put what `source` holds into `row`."""
        self.cache[:, :, row] = self.cache[:, :, source]
        for x in (self.token, self.position, self.start, self.draws):
            x[row] = x[source]

    @torch.inference_mode()
    def steps(self, rows: int, longest: int, sampling: Sampling) -> tuple[list, list]:
        """The next tokens of the first `rows` rows, and their log-probabilities: [rows][steps].

        `longest` is the length of the longest of these texts.
        """
        tokens, logprobs = [], []
        for i in range(GPU_STEPS if self.token.is_cuda else 1):
            if self.token.is_cuda:
                self._replay(self.padded(rows), sampling)
            else:
                self._step(self.padded(rows), self.span(longest + i), sampling)
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
        position.add_(1).clamp_(max=min(self.positions, len(self.cos)) - 1)

    def _logits_kernels(self, n: int) -> Tensor:
        """fp32 logits [n, V]; kernels/decode.py: three launches a block."""
        from kernels import decode

        m, c = self.model, self.model.c
        C, position = c.width, self.position[:n]
        x = m.embed(self.token[:n])
        qkv, ya = x.new_empty(n, 3 * C), x.new_empty(n, C + c.mlp_width)
        for b, _, _, b_out, cache in self.layers:
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
        m, c, position = self.model, self.model.c, self.position[:n]
        C, H, D, R = c.width, c.n_head, c.head_dim, c.rotary_dim
        cos, sin = self.cos[position], self.sin[position]  # [n, 1, R]
        heads = position.repeat_interleave(H)[:, None, None]  # [n H, 1, 1]
        far = torch.arange(span, device=heads.device) > heads
        mask = torch.where(far, float("-inf"), 0.0).to(self.cache.dtype)  # [n H, 1, span]
        at = (self.slot[:, :n] + position[:, None]).flatten()
        tile = min(n, self.tile)
        x = m.embed(self.token[:n])
        for block, w_in, w_out, b_out, cache in self.layers:
            h = grouped_linear(block.ln(x), w_in, block.b_in, tile)
            qk = h[:, : 2 * C].view(n, 2 * H, D)[..., :R]
            qk.copy_(torch.addcmul(qk * cos, qk.roll(R // 2, -1), sin))
            q, kv = h[:, :C].reshape(n * H, 1, D), h[:, C : 3 * C].view(n, 2, H, D)
            cache.view(-1, D).index_copy_(0, at, kv.transpose(0, 1).reshape(-1, D))
            k, v = cache[:, :n, :, :span].flatten(1, 2)  # [n H, span, D]
            # Half the time of scaled_dot_product_attention for one query a head.
            s = torch.baddbmm(mask, q, k.mT, alpha=D**-0.5)  # [n H, 1, span]
            y = torch.bmm(s.softmax(-1), v)
            a = F.gelu(h[:, 3 * C :], approximate="tanh")
            x = x + grouped_linear(torch.cat([y.view(n, C), a], -1), w_out, b_out, tile)
        return grouped_linear(m.ln_f(x), m.head.weight.t(), m.head.bias, tile).float()


def grouped_linear(x: Tensor, w: Tensor, b: Tensor, rows: int) -> Tensor:
    """x w + b of x [n, K] and w [K, J], as n / rows products of `rows` rows each."""
    groups = x.shape[0] // rows
    if groups == 1:  # the same in fewer calls
        return torch.addmm(b, x, w)
    x, w = x.view(groups, rows, x.shape[1]), w.expand(groups, -1, -1)
    return torch.baddbmm(b, x, w).view(groups * rows, -1)


@torch.inference_mode()
def same_rows(model: Phi) -> int:
    """How many rows a matrix product may have, at most, for a row's bits to depend on it alone.

    An even number such that products of 2, 4, .. rows up to it, and several of that many at once,
    agree here on the model's matrices. With MKL 2024.2 and AVX-512 it is 8, as 16 rows give other
    bits (and one row, so that there are always two); with two threads it is 2 for small matrices.
    """
    block, tile = model.blocks[0], 8
    for w in (block.w_in.t(), block.w_out.t(), model.head.weight.t()):
        generator = torch.Generator(w.device).manual_seed(0)
        x = torch.randn(16, len(w), generator=generator, device=w.device).to(w.dtype)
        bias = w.new_ones(w.shape[1])
        want = grouped_linear(x, w, bias, 2)
        while tile > 2 and not all(
            torch.equal(grouped_linear(x[:n], w, bias, rows), want[:n])
            for rows in range(2, tile + 1, 2)
            for n in (rows, tile // rows * rows, 16 // rows * rows)
        ):
            tile -= 2
    return tile


@torch.inference_mode()
def choose(logits: Tensor, draws: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """A token [B] for each row of logits [B, V], by inverting its distribution at draws [B].

    Probabilities are summed as integers: exact, and so the same however a sum is split.
    """
    if temperature == 0:
        return logits.argmax(-1)
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
