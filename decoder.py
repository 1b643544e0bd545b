"""Pick the next token of every row of a batch, over a static KV cache.

`TorchDecoder` uses plain torch, `TritonDecoder` kernels/decode.py on a GPU, as a CUDA graph. Each
row has its own temperature, top_p and random draws.

A row's tokens do not depend on the other rows. Probabilities are summed as integers. Attention runs
per row (in torch, if 4 divides the head dim). Matmuls use only row counts with bitwise equal
results (torch: `same_rows`) or tiles of 16 rows (kernels). `fast` drops this guarantee in torch
where it costs time: for up to 3 rows at once, and where only few rows agree.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import UserError
from model import QK_NORM, Phi

GPU_STEPS = 8  # tokens to generate between two reads from a GPU
MOST_ROWS = 64  # of one matmul in torch
GREEDY, SAMPLED, SORTED = range(3)  # ways to choose tokens; each can also do the ones before it
COLD, HOT = 1e-37, 1e38  # replace temperature 0 in a sampled batch, and one beyond fp32's range


class Decoder:
    """Base class of the decoders: static buffers, prompt queue, sampling.

    Subclasses define `padded` (rows computed in a step of n), `_prefill` (write the keys and values
    of prompts to the cache) and `_logits` (compute a step's logits).
    """

    prefill_tokens: int  # max prompt tokens per prefill batch

    def __init__(self, model: Phi, rows: int, positions: int, dtype: torch.dtype):
        """Allocate `rows` texts of up to `positions` tokens."""
        c, device, rows = model.c, model.embed.weight.device, self.padded(rows)
        self.model = model
        self.last = min(positions, c.seq_len) - 1  # last position of any text
        shape = (c.n_layer, 2, rows, c.n_head, positions, c.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # [L, k or v, B, H, S, D]
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # newest in each row
        self.position = torch.zeros_like(self.token)  # its position
        self.draws = torch.zeros(rows, positions, dtype=torch.float64, device=device)
        self.temperature = torch.zeros(rows, 1, device=device)
        self.top_p = torch.ones(rows, 1, dtype=torch.float64, device=device)
        self.ways = [GREEDY] * rows
        self.waiting: dict[int, tuple] = {}  # row: prompt tokens still to prefill
        self.graphs: dict = {}

    @torch.inference_mode()
    def load(
        self, row: int, ids: list[int], draws: Tensor, temperature: float = 0.0, top_p: float = 1.0
    ) -> None:
        """Load a prompt into `row`; `draws` in [0, 1) sample its new tokens.

        The next step prefills all but the last token, then computes the last one.
        """
        last = len(ids) - 1
        self.waiting[row] = tuple(ids[:-1])
        self.token[row], self.position[row] = ids[-1], last
        self.draws[row, last : last + len(draws)] = draws
        self.temperature[row], self.top_p[row] = min(temperature, HOT), top_p
        self.ways[row] = GREEDY if temperature == 0 else SORTED if top_p < 1 else SAMPLED

    @torch.inference_mode()
    def move(self, source: int, row: int) -> None:
        """Copy row `source` to `row`."""
        self._prefill_waiting()
        self.cache[:, :, row] = self.cache[:, :, source]
        for x in (self.token, self.position, self.draws, self.temperature, self.top_p, self.ways):
            x[row] = x[source]

    @torch.inference_mode()
    def steps(self, rows: int, longest: int) -> list[list[int]]:
        """Return the next tokens of rows [:rows], [rows][steps]; `longest` is their max length."""
        self._prefill_waiting()
        tokens, way = [], max(self.ways[:rows])
        count, step = (GPU_STEPS, self._replay) if self.token.is_cuda else (1, self._step)
        for _ in range(count):
            step(self.padded(rows), longest, way)
            tokens.append(self.token[:rows].clone())
        return torch.stack(tokens, 1).tolist()

    def _prefill_waiting(self) -> None:
        prompts: dict[tuple, list[int]] = {}  # prompt: its rows
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
        """Run a step over the whole cache as one CUDA graph, captured at first use."""
        if (n, way) not in self.graphs:
            longest, state = self.last + 1, [(x, x.clone()) for x in (self.token, self.position)]
            side = torch.cuda.Stream()  # torch requires warm-up on a side stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(n, longest, way)
            torch.cuda.current_stream().wait_stream(side)
            for x, old in state:  # undo the warm-up; the next step rewrites its cache entries
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
        # A full row keeps stepping until it leaves, overwriting its last position.
        position.add_(1).clamp_(max=self.last)


class TritonDecoder(Decoder):
    """Decoder on kernels/decode.py, in the model's dtype: three launches per block."""

    prefill_tokens = 1  # one prompt at a time

    @torch.inference_mode()
    def __init__(self, model: Phi, rows: int, positions: int):
        from kernels import decode  # imported here: triton may not be installed

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
    """Decoder in plain torch, on fp32 copies of the weights (5.7 GB for phi-1).

    BLAS picks the summation order of a matmul by its number of rows. With weights [K, J] and
    AVX-512, MKL uses one order for 2 to 64 rows (three orders for a transposed [J, K]), so matmuls
    take up to 64 rows. With AVX2 only, it uses another order for up to 3 rows, and with two threads
    for the last rows of 5 to 11. oneDNN uses one order throughout, but costs 15 us more per call.

    Rotary pairs are stored side by side, as complex numbers: one multiply rotates them, with the
    same bits as `model.rotate`, whose many small ops take 15% of a step of 1 row.
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
        # Rotary factors of the pairs of q, k and v (1 for v): [3, T, 1, D/2].
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
        # BLAS has separate routines for a single row, and for attention with a single head.
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
        """Return how many cache positions a step reads for texts of up to `positions` tokens.

        A multiple of 8 and above 400 / head_dim: below 400 multiplications torch switches to
        another kernel, and a row's bits would depend on the longest row.
        """
        return -(-max(positions, 400 // self.model.c.head_dim + 1) // 8) * 8

    def padded(self, rows: int) -> int:
        return -(-rows // self.step) * self.step

    def _blocks(self, token: Tensor, position: Tensor, attend: Callable) -> Tensor:
        """Run the blocks on tokens [n], n padded, at `position` [n]; return x [n, C].

        `attend(layer, qkv, y)` writes the attention of qkv [3, n, H, D] to y [n, H, D].
        """
        c, x, turn = self.model.c, F.embedding(token, self.embed), self.turn[:, position]
        n, C, H, D = len(x), c.width, c.n_head, c.head_dim
        ya, qkv = x.new_empty(n, C + c.mlp_width), x.new_empty(3, n, H, D)
        y, a = ya[:, :C].view(n, H, D), ya[:, C:]
        pairs = (3, n, H, D // 2), (C // 2, (3 * C + c.mlp_width) // 2, D // 2, 1)  # sizes, strides
        turned = qkv.view(torch.complex64)
        # From 2^14 elements on torch splits the work over threads, and rounds differently at cuts.
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
                self.cache[layer][:, rows, :, : len(prompt)] = one[1:]  # broadcast to its rows
                y[part] = F.scaled_dot_product_attention(*one, is_causal=True)[0].transpose(0, 1)
                at += len(prompt)

        self._blocks(ids, position, attend)

    def _logits(self, n: int, longest: int) -> Tensor:
        position, (L, _, B, H, S, D), seen = self.position[:n], self.cache.shape, self.span(longest)
        slot = torch.arange(2 * B * H, device=position.device).view(2, B, H)[:, :n] * S
        slot = (slot + position[:, None]).flatten()  # cache rows for this step's keys and values
        later = torch.arange(seen, device=position.device) > position[:, None]
        mask = torch.zeros(later.shape, device=position.device).masked_fill_(later, float("-inf"))
        mask = mask[:, None].expand(n, H, seen).reshape(n * H, 1, seen)
        heads = self.cache[:, :, :n, :, :seen].flatten(2, 3)  # [L, k or v, n H, S, D]
        keys, values = heads[:, 0].mT.unbind(), heads[:, 1].unbind()
        caches = self.cache.view(L, -1, D).unbind()

        def attend(layer: int, qkv: Tensor, y: Tensor) -> None:
            caches[layer].index_copy_(0, slot, qkv[1:].view(-1, D))
            q = qkv[0].view(n * H, 1, D)
            # Takes half the time of scaled_dot_product_attention for one query per head.
            s = torch.baddbmm(mask, q, keys[layer], alpha=D**-0.5)  # [n H, 1, S]
            y.copy_(torch.bmm(s.softmax(-1), values[layer]).view(n, H, D))

        x = self._blocks(self.token[:n], position, attend)
        x = F.layer_norm(x, x.shape[1:], *self.ln_f, self.eps)
        return self.head(x)


def make_linear(w: Tensor, b: Tensor, onednn: bool, most: int) -> Callable[[Tensor], Tensor]:
    """Return x -> x w^T + b for w [J, K], computed in chunks of up to `most` rows."""
    if onednn:
        w = torch.ops.mkldnn._reorder_linear_weight(w, MOST_ROWS)
        rest = {"attr": "none", "scalars": [], "algorithm": ""}
        product = partial(torch.ops.mkldnn._linear_pointwise.default, W=w, B=b, **rest)
    else:
        product = partial(torch.addmm, b, mat2=w.t().contiguous())
    return lambda x: product(x) if len(x) <= most else torch.cat([*map(product, x.split(most))])


@torch.inference_mode()
def same_rows(weights: list[Tensor], onednn: bool) -> int:
    """Return the most rows (up to 64) for which matmuls agree bitwise, wherever a row lies.

    For BLAS, compare 2, 4, .. rows. For oneDNN compare 1, 2, .., but not all, as each new row count
    costs it 1 ms; there, a result below 64 only means that oneDNN is unusable.
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
    """Choose a token [B] per row of logits [B, V], by inverting its distribution at draws [B, 1].

    `way` is GREEDY if every temperature [B, 1] is 0, SORTED if any top_p [B, 1] is below 1, else
    SAMPLED; every way that supports a row picks the same token. Probabilities are summed as
    integers, which is exact in any order.
    """
    if way == GREEDY:  # numpy takes a fifteenth of torch's time
        cpu = not logits.is_cuda
        return torch.from_numpy(logits.numpy().argmax(-1)) if cpu else logits.argmax(-1)
    draws = draws * (temperature > 0)  # COLD with draw 0 picks the first of the likeliest tokens
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=COLD)
    mass = (logits.exp() * 2.0**40).long()  # 2^40: sums over 2^22 tokens fit in 63 bits
    if way == SORTED:  # rows with top_p 1 keep their order, as the sort is stable
        largest, order = mass.where(top_p < 1, 0).sort(dim=-1, descending=True, stable=True)
        mass = largest.where(top_p < 1, mass)
    total = mass.cumsum(-1)  # [B, V]
    kept = total[:, -1:]
    if way == SORTED:  # include the token that crosses top_p
        inside = (total - mass < (top_p * kept.double()).long()) | (top_p == 1)
        kept = total.where(inside, 0).amax(-1, keepdim=True)
    choice = torch.searchsorted(total, (draws.double() * kept.double()).long(), right=True)
    choice = choice.clamp(max=logits.shape[1] - 1)  # for NaN logits of a diverged model
    return (order.gather(-1, choice) if way == SORTED else choice)[:, 0]
