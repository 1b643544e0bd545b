"""Pick the next token of every row of a batch, over a static KV cache.

`TorchDecoder` does it in plain torch, `TritonDecoder` on a GPU with kernels/decode.py, as a CUDA
graph. A row has a temperature, a top_p and draws of its own.

A row's tokens do not depend on the other rows: probabilities are summed as integers; attention is
by row (in torch, if 4 divides the head dim); products are of as many rows as agree bit by bit
(torch: `same_rows`), or of tiles of 16 rows (kernels). With `fast`, torch gives that up where it
costs time: for up to 3 rows at once, and where only few agree.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import UserError
from model import QK_NORM, Phi

GPU_STEPS = 8  # tokens between two looks at what a GPU has generated
MOST_ROWS = 64  # of a product in torch
GREEDY, SAMPLED, SORTED = range(3)  # ways to choose tokens, each able to do what stands before it
COLD, HOT = 1e-37, 1e38  # what stands for temperature 0 beside other rows; more than fp32 has


class Decoder:
    """Pick the next token of every row of a batch, over static buffers.

    Subclasses say how many rows a step of n computes (`padded`), put the keys and values of prompts
    into the cache (`_prefill`) and compute a step's logits (`_logits`).
    """

    prefill_tokens: int  # of prompts that go through the model at once

    def __init__(self, model: Phi, rows: int, positions: int, dtype: torch.dtype):
        """Make room for `rows` texts of up to `positions` tokens."""
        c, device, rows = model.c, model.embed.weight.device, self.padded(rows)
        self.model = model
        self.last = min(positions, c.seq_len) - 1  # where no text goes on
        shape = (c.n_layer, 2, rows, c.n_head, positions, c.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # [L, k or v, B, H, S, D]
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # newest of each row
        self.position = torch.zeros_like(self.token)  # where it stands
        self.draws = torch.zeros(rows, positions, dtype=torch.float64, device=device)
        self.temperature = torch.zeros(rows, 1, device=device)
        self.top_p = torch.ones(rows, 1, dtype=torch.float64, device=device)
        self.ways = [GREEDY] * rows
        self.waiting: dict[int, tuple] = {}  # rows whose prompts have yet to go through the model
        self.graphs: dict = {}

    @torch.inference_mode()
    def load(
        self, row: int, ids: list[int], draws: Tensor, temperature: float = 0.0, top_p: float = 1.0
    ) -> None:
        """Put a prompt into `row`; `draws` in [0, 1) are for its new tokens.

        All but its last token go through the model before the next step, the last one in it.
        """
        last = len(ids) - 1
        self.waiting[row] = tuple(ids[:-1])
        self.token[row], self.position[row] = ids[-1], last
        self.draws[row, last : last + len(draws)] = draws
        self.temperature[row], self.top_p[row] = min(temperature, HOT), top_p
        self.ways[row] = GREEDY if temperature == 0 else SORTED if top_p < 1 else SAMPLED

    @torch.inference_mode()
    def move(self, source: int, row: int) -> None:
        """Put what `source` holds into `row`."""
        self._prefill_waiting()
        self.cache[:, :, row] = self.cache[:, :, source]
        for x in (self.token, self.position, self.draws, self.temperature, self.top_p, self.ways):
            x[row] = x[source]

    @torch.inference_mode()
    def steps(self, rows: int, longest: int) -> list[list[int]]:
        """Return the next tokens of the first `rows` rows, [rows][steps]; `longest` is a length."""
        self._prefill_waiting()
        tokens, way = [], max(self.ways[:rows])
        count, step = (GPU_STEPS, self._replay) if self.token.is_cuda else (1, self._step)
        for _ in range(count):
            step(self.padded(rows), longest, way)
            tokens.append(self.token[:rows].clone())
        return torch.stack(tokens, 1).tolist()

    def _prefill_waiting(self) -> None:
        prompts: dict[tuple, list[int]] = {}  # the rows of each
        for row, ids in self.waiting.items():
            if ids:
                prompts.setdefault(ids, []).append(row)
        self.waiting.clear()
        left = list(prompts.items())
        while left:
            count = max(1, self.prefill_tokens // max(len(ids) for ids, _ in left))
            self._prefill(left[:count])
            left = left[count:]

    def _replay(self, n: int, _longest: int, way: int) -> None:
        """Run a step over the whole cache as one CUDA graph, captured when first needed."""
        if (n, way) not in self.graphs:
            longest, state = self.last + 1, [(x, x.clone()) for x in (self.token, self.position)]
            side = torch.cuda.Stream()  # torch wants a warm-up outside the default stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(n, longest, way)
            torch.cuda.current_stream().wait_stream(side)
            for x, old in state:  # what the step wrote to the cache, the next one writes again
                x.copy_(old)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(n, longest, way)
            self.graphs[n, way] = graph
        self.graphs[n, way].replay()

    def _step(self, n: int, longest: int, way: int) -> None:
        logits, position = self._logits(n, longest), self.position[:n]  # fp32 [n, V]
        draws = self.draws[:n].gather(1, position[:, None])
        self.token[:n] = choose(logits, draws, self.temperature[:n], self.top_p[:n], way)
        # A row that is full is stepped on until it leaves; it then overwrites its last position.
        position.add_(1).clamp_(max=self.last)


class TritonDecoder(Decoder):
    """Decode with kernels/decode.py in the model's dtype: three launches a block."""

    prefill_tokens = 1  # each prompt goes alone

    @torch.inference_mode()
    def __init__(self, model: Phi, rows: int, positions: int):
        from kernels import decode  # here, as triton is not everywhere

        self.kernels = decode
        super().__init__(model, rows, positions, model.embed.weight.dtype)
        rows, (_, _, _, n_head, positions, head_dim) = len(self.token), self.cache.shape
        self.b_out = [b.b_attn + b.b_mlp for b in model.blocks]
        self.scratch = decode.scratch(rows, n_head, positions, head_dim, self.cache.device)

    def padded(self, rows: int) -> int:
        return rows if rows == 1 else -(-rows // self.kernels.ROWS) * self.kernels.ROWS

    def _prefill(self, prompts: list[tuple[tuple, list[int]]]) -> None:
        [(ids, rows)] = prompts
        keys_and_values = []
        self.model(torch.tensor([ids], device=self.token.device), keep=keys_and_values)
        for cache, pair in zip(self.cache, keys_and_values):
            cache[:, rows, :, : len(ids)] = torch.stack(pair)  # [2, 1, H, T, D] to each row

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

    BLAS chooses the order of a product's sums by its number of rows. With weights [K, J], MKL has
    one order for 2 to 64 rows (three for the transpose of [J, K]) where there is AVX-512, so that
    products are of that many. With AVX2 alone it has another for up to 3, and on two threads for
    the last rows of 5 to 11; oneDNN, which takes 15 us more a call, has one for all.

    The pairs that rotary embedding turns lie side by side here, as complex numbers: one product
    turns them, with the bits of `model.rotate`, whose many small ones take 15% of a step of 1 row.
    """

    prefill_tokens = 512

    @torch.inference_mode()
    def __init__(self, model: Phi, rows: int, positions: int, fast: bool = False):
        self.model, self.fast, c = model, fast, model.c
        if c.head_dim % 2 or c.mlp_width % 2:
            raise UserError(f"want even head_dim and mlp_width, got {c.head_dim}, {c.mlp_width}")
        order = torch.arange(3 * c.width + c.mlp_width)
        heads = order[: 2 * c.width].view(2 * c.n_head, c.head_dim)[:, : c.rotary_dim]
        heads.copy_(heads.unflatten(1, (2, -1)).mT.flatten(1).clone())
        # What each pair of q, k and v is multiplied with: [3, T, 1, D/2].
        self.turn = torch.ones(3, c.seq_len, 1, c.head_dim // 2, dtype=torch.complex64)
        self.turn[:2, :, 0, : c.rotary_dim // 2] = torch.complex(model.cos, model.sin)
        self.turn = self.turn.to(model.cos.device)

        def fp32(*tensors: Tensor) -> list[Tensor]:
            return [x.float() for x in tensors]

        first, head = model.blocks[0], model.head
        weights = fp32(first.w_in, first.w_out, head.weight)
        same = same_rows(weights, onednn=False)
        onednn = same < MOST_ROWS == same_rows(weights, onednn=True)
        same = MOST_ROWS if onednn else same
        if fast and (rows < 4 or same < MOST_ROWS):
            onednn, same = False, sys.maxsize
        # BLAS has routines of its own for one row, and for the attention of one head.
        self.step = 1 if (onednn and c.n_head > 1) or same > MOST_ROWS else 2
        linear = partial(make_linear, onednn=onednn, most=same)
        self.layers = [
            (*fp32(b.ln.weight, b.ln.bias), linear(*fp32(b.w_in[order], b.b_in[order])),
             linear(*fp32(b.w_out, b.b_attn + b.b_mlp)))
            for b in model.blocks
        ]  # fmt: skip
        self.embed, self.eps = model.embed.weight.float(), model.ln_f.eps
        self.ln_f = fp32(model.ln_f.weight, model.ln_f.bias)
        self.head = linear(*fp32(head.weight, head.bias))
        super().__init__(model, rows, self.span(positions), torch.float32)

    def span(self, positions: int) -> int:
        """Return how much of the cache a step reads for texts of up to `positions` tokens.

        A multiple of 8, and enough for products of 400 multiplications, as torch has another kernel
        for fewer: or else a row's bits would depend on the longest row.
        """
        return -(-max(positions, 400 // self.model.c.head_dim + 1) // 8) * 8

    def padded(self, rows: int) -> int:
        return -(-rows // self.step) * self.step

    def _blocks(self, token: Tensor, position: Tensor, attend: Callable) -> Tensor:
        """Return the residual stream [n, C] of tokens [n], n padded, at `position` [n].

        `attend(layer, qkv, y)` puts the attention of qkv [3, n, H, D] into y [n, H, D].
        """
        c, x, turn = self.model.c, F.embedding(token, self.embed), self.turn[:, position]
        n, C, H, D = len(x), c.width, c.n_head, c.head_dim
        ya, qkv = x.new_empty(n, C + c.mlp_width), x.new_empty(3, n, H, D)
        y, a = ya[:, :C].view(n, H, D), ya[:, C:]
        pairs = (3, n, H, D // 2), (C // 2, (3 * C + c.mlp_width) // 2, D // 2, 1)  # sizes, strides
        turned = qkv.view(torch.complex64)
        # Torch shares out 2^14 numbers or more among threads, and rounds otherwise where it cuts.
        most = n if self.fast else max(1, (2**14 - 1) // c.mlp_width)
        for i, (gain, bias, w_in, w_out) in enumerate(self.layers):
            h = w_in(torch.layer_norm(x, (C,), gain, bias, self.eps))  # q | k | v | up
            if c.qk_norm:
                qk = h[:, : 2 * C].view(n, 2, H, D)
                qk.copy_(QK_NORM * F.layer_norm(qk, (D,)))
            torch.mul(h.view(torch.complex64).as_strided(*pairs), turn, out=turned)
            attend(i, qkv, y)
            for up, act in zip(h[:, 3 * C :].split(most), a.split(most)):
                F.gelu(up, approximate="tanh", out=act)
            x = x + w_out(ya)
        return x

    def _prefill(self, prompts: list[tuple[tuple, list[int]]]) -> None:
        ids = torch.tensor([token for ids, _ in prompts for token in ids])
        position = torch.cat([torch.arange(len(ids)) for ids, _ in prompts])
        n = self.padded(len(ids))
        ids, position = (F.pad(x, (0, n - len(x))).to(self.token.device) for x in (ids, position))

        def attend(layer: int, qkv: Tensor, y: Tensor) -> None:
            at = 0
            for prompt, rows in prompts:
                part = slice(at, at + len(prompt))
                one = qkv[:, None, part].transpose(2, 3)  # [3, 1, H, T, D]
                self.cache[layer][:, rows, :, : len(prompt)] = one[1:]  # to each row
                y[part] = F.scaled_dot_product_attention(*one, is_causal=True)[0].transpose(0, 1)
                at += len(prompt)

        self._blocks(ids, position, attend)

    def _logits(self, n: int, longest: int) -> Tensor:
        position, (L, _, B, H, S, D), seen = self.position[:n], self.cache.shape, self.span(longest)
        slot = torch.arange(2 * B * H, device=position.device).view(2, B, H)[:, :n] * S
        slot = (slot + position[:, None]).flatten()  # in the cache, of this step's keys and values
        later = torch.arange(seen, device=position.device) > position[:, None]
        mask = torch.zeros(later.shape, device=position.device).masked_fill_(later, float("-inf"))
        mask = mask[:, None].expand(n, H, seen).reshape(n * H, 1, seen)
        heads = self.cache[:, :, :n, :, :seen].flatten(2, 3)  # [L, k or v, n H, S, D]
        keys, values = heads[:, 0].mT.unbind(), heads[:, 1].unbind()
        caches = self.cache.view(L, -1, D).unbind()

        def attend(layer: int, qkv: Tensor, y: Tensor) -> None:
            caches[layer].index_copy_(0, slot, qkv[1:].view(-1, D))
            q = qkv[0].view(n * H, 1, D)
            # Half the time of scaled_dot_product_attention for one query a head.
            s = torch.baddbmm(mask, q, keys[layer], alpha=D**-0.5)  # [n H, 1, S]
            y.copy_(torch.bmm(s.softmax(-1), values[layer]).view(n, H, D))

        x = self._blocks(self.token[:n], position, attend)
        x = F.layer_norm(x, x.shape[1:], *self.ln_f, self.eps)
        return self.head(x)


def make_linear(w: Tensor, b: Tensor, onednn: bool, most: int) -> Callable[[Tensor], Tensor]:
    """Return x -> x w^T + b for w [J, K], in products of up to `most` rows each."""
    if onednn:
        w = torch.ops.mkldnn._reorder_linear_weight(w, MOST_ROWS)
        rest = {"attr": "none", "scalars": [], "algorithm": ""}
        product = partial(torch.ops.mkldnn._linear_pointwise.default, W=w, B=b, **rest)
    else:
        product = partial(torch.addmm, b, mat2=w.t().contiguous())
    return lambda x: product(x) if len(x) <= most else torch.cat([*map(product, x.split(most))])


@torch.inference_mode()
def same_rows(weights: list[Tensor], onednn: bool) -> int:
    """Return up to how many rows, at most 64, products agree bit by bit, wherever a row lies.

    Those of 2, 4, .. rows by BLAS; of 1, 2, .. by oneDNN, of which less than 64 says only that it
    will not do. It takes 1 ms for a number of rows that is new to it: not all are tried.
    """
    most, step = MOST_ROWS, 2 - onednn
    tried = (*range(2, 12), 16, 31, 48, 64) if onednn else range(4, 65, 2)
    if onednn and (weights[0].is_cuda or not torch.backends.mkldnn.is_available()):
        return 0
    for w in weights:  # [J, K]
        generator = torch.Generator(w.device).manual_seed(0)
        x = torch.randn(most, w.shape[1], generator=generator, device=w.device)
        product = make_linear(w, w.new_ones(len(w)), onednn, most)
        want = torch.cat([*map(product, x.split(step))])
        for n in tried:
            if n <= most and not torch.equal(product(x[:n].roll(1, 0)), want[:n].roll(1, 0)):
                most = n - step
                break
    return most


@torch.inference_mode()
def choose(logits: Tensor, draws: Tensor, temperature: Tensor, top_p: Tensor, way: int) -> Tensor:
    """Return a token [B] for each row of logits [B, V]: its distribution inverted at draws [B, 1].

    `way` is GREEDY if every temperature [B, 1] is 0, SORTED if a top_p [B, 1] is below 1, else
    SAMPLED: a row's token is the same by every way that can do it. Probabilities are summed as
    integers: exact, and so the same however a sum is split.
    """
    if way == GREEDY:  # in numpy, a fifteenth of torch's time
        cpu = not logits.is_cuda
        return torch.from_numpy(logits.numpy().argmax(-1)) if cpu else logits.argmax(-1)
    draws = draws * (temperature > 0)  # at COLD and 0 the first of the likeliest tokens is chosen
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=COLD)
    mass = (logits.exp() * 2.0**40).long()  # 2^40: sums of 2^22 tokens fit 63 bits
    if way == SORTED:  # where top_p is 1 the order stays, as the sort is stable
        largest, order = mass.where(top_p < 1, 0).sort(dim=-1, descending=True, stable=True)
        mass = largest.where(top_p < 1, mass)
    total = mass.cumsum(-1)  # [B, V]
    kept = total[:, -1:]
    if way == SORTED:  # the token that crosses top_p is in
        inside = (total - mass < (top_p * kept.double()).long()) | (top_p == 1)
        kept = total.where(inside, 0).amax(-1, keepdim=True)
    choice = torch.searchsorted(total, (draws.double() * kept.double()).long(), right=True)
    choice = choice.clamp(max=logits.shape[1] - 1)  # the logits of a model that diverged are NaN
    return (order.gather(-1, choice) if way == SORTED else choice)[:, 0]
