"""The next token of every row of a batch: static KV cache, one pass through the model, a choice.

In plain torch on a CPU; on a GPU with the kernels of kernels/decode.py, as one CUDA graph. A row's
tokens depend on its prompt and its draws, never on the batch:

    GPU          prompts go through the model alone; the products of a step are of tiles of 16 rows
                 with K in one order
    CPU          products are of as many rows as agree bit by bit (decoder_torch.py), those of
                 prompts too, which go through the model together
    attention    is by row, of prompts by prompt
    choices      are integer arithmetic on exp(logit), which no order of summing changes
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import UserError
from decoder_torch import Blocks, Buffers
from model import KVCache, Phi

# On a CPU attention reads the cache up to a multiple of 8 positions, and so many that its products
# are of 400 multiplications or more, as torch has another kernel for fewer: with either otherwise,
# the bits of a row depend on the longest row beside it.
SPAN, SPAN_PRODUCT = 8, 400
PREFILL_TOKENS = 512  # of prompts that go through the model at once on a CPU
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
        self.blocks = None if kernels else Blocks(model)
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
        slot = torch.arange(2 * rows * c.n_head, device=device) * self.positions
        self.slot = slot.view(2, rows, c.n_head)  # where each head's keys and values begin
        far = torch.full((self.positions,) * 2, float("-inf"), device=device)
        self.mask = far.triu(1)[:, None, None]  # [position, 1, 1, position that it may see]

    def padded(self, rows: int) -> int:
        """How many rows a step of `rows` computes."""
        if self.blocks:
            return self.blocks.padded(rows)
        return rows if rows == 1 else -(-rows // TILE) * TILE

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
            most = PREFILL_TOKENS // max(len(ids) for ids, _ in prompts) if self.blocks else 1
            part, prompts = prompts[: max(1, most)], prompts[max(1, most) :]
            if self.blocks:
                self._prefill_torch(part)
                continue
            [(ids, rows)] = part
            idx = torch.tensor([ids], device=self.token.device)
            seen = KVCache(self.model.c, 1, len(ids), idx.device, self.cache.dtype)
            self.model(idx, cache=seen, positions=torch.arange(len(ids), device=idx.device)[None])
            for row in rows:
                self.cache[:, 0, row, :, : len(ids)] = seen.k[:, 0]
                self.cache[:, 1, row, :, : len(ids)] = seen.v[:, 0]

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

        return self.blocks.logits(self.blocks(self.token[:n], position, buffers, attend))

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

        self.blocks(ids, position, Buffers(self.model.c, n, ids.device), attend)


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
