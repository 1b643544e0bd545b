"""The model's blocks for decoding in plain torch: in few operations, and with bits that do not
depend on how many tokens go through together.

A BLAS chooses the order of a product's sums by its number of rows. With weights as [K, J], not the
transpose of [J, K], MKL has one order for 2 to 64 rows (it has three for the transpose), so that
tokens go through in products of that many; `same_rows` finds out how many there are here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import UserError
from model import ModelConfig, Phi

MOST_ROWS = 64  # of a product


class Layer(NamedTuple):
    """The fp32 weights of a block."""

    gain: Tensor  # of its LayerNorm
    bias: Tensor
    eps: float
    w_in: Tensor  # [C, 3C + M]
    b_in: Tensor
    w_out: Tensor  # [C + M, C]
    b_out: Tensor


class Buffers:
    """What n tokens write on their way through a block, n even; parts of a larger one's memory."""

    def __init__(self, c: ModelConfig, n: int, device, of: "Buffers | None" = None):
        C, M, H, D = c.width, c.mlp_width, c.n_head, c.head_dim
        sizes = [n * 3 * C, n * (3 * C + M), n * (C + M)]
        self.memory = of.memory if of else torch.empty(sum(sizes), device=device)
        qkv, h, ya = self.memory[: sum(sizes)].split(sizes)
        self.h, self.ya = h.view(n, -1), ya.view(n, -1)  # what w_in gives and what w_out takes
        self.up, self.y, self.a = self.h[:, 3 * C :], self.ya[:, :C], self.ya[:, C:]
        pairs = self.h[:, : 3 * C].view(n, 3, H, D // 2, 2)
        self.pairs = torch.view_as_complex(pairs).transpose(0, 1)  # [3, n, H, D/2]
        self.turned = torch.view_as_complex(qkv.view(3, n, H, D // 2, 2))
        self.qkv = qkv.view(3, n, H, D)
        self.q, self.kv = self.qkv[0].view(n * H, 1, D), self.qkv[1:].view(2 * n * H, D)


class Blocks:
    """The blocks and the head of a model, with copies of its weights in fp32 (phi-1's: 5.7 GB).

    The pairs that rotary embedding turns lie side by side in queries and keys, as complex numbers.
    """

    @torch.inference_mode()
    def __init__(self, model: Phi):
        c, device = model.c, model.embed.weight.device
        if c.head_dim % 2 or c.mlp_width % 2:
            raise UserError(
                f"generation wants an even head dim (width / n_head, {c.head_dim}) and an even "
                f"mlp_width ({c.mlp_width})"
            )
        order = torch.arange(3 * c.width + c.mlp_width)
        heads = order[: 2 * c.width].view(2 * c.n_head, c.head_dim)[:, : c.rotary_dim]
        heads.copy_(heads.unflatten(1, (2, -1)).mT.flatten(1).clone())
        self.layers = []
        for b in model.blocks:
            w_in, b_in = transposed(b.w_in[order]), b.b_in[order].float()
            w_out, b_out = transposed(b.w_out), (b.b_attn + b.b_mlp).float()
            self.layers.append(Layer(*norm(b.ln), w_in, b_in, w_out, b_out))
        self.embed, self.ln_f = model.embed.weight.float(), norm(model.ln_f)
        self.w_head, self.b_head = transposed(model.head.weight), model.head.bias.float()
        # What each pair of q, k and v is multiplied with as a complex number: [3, T, 1, D/2].
        self.turn = torch.ones(3, c.seq_len, 1, c.head_dim // 2, dtype=torch.complex64)
        self.turn = self.turn.to(device)
        self.turn[:2, :, 0, : c.rotary_dim // 2] = torch.complex(model.cos, model.sin)
        self.tile = same_rows([self.layers[0].w_in, self.layers[0].w_out, self.w_head])

    def padded(self, n: int) -> int:
        """How many tokens must go through the blocks for n to do so."""
        n += n % 2  # as BLAS has another routine for one row than for two
        return n if n <= self.tile else -(-n // self.tile) * self.tile

    def __call__(
        self, token: Tensor, position: Tensor, buffers: Buffers, attend: Callable
    ) -> Tensor:
        """The residual stream [n, C] of tokens [n] at `position` [n] after the blocks.

        `attend(layer, qkv, y)` puts the attention of qkv [3, n, H, D] into y [n, C].
        """
        x, b, turn = torch.embedding(self.embed, token), buffers, self.turn[:, position]
        for i, w in enumerate(self.layers):
            normed = torch.layer_norm(x, x.shape[1:], w.gain, w.bias, w.eps)
            grouped_linear(normed, w.w_in, w.b_in, self.tile, b.h)
            torch.mul(b.pairs, turn, out=b.turned)
            attend(i, b.qkv, b.y)
            F.gelu(b.up, approximate="tanh", out=b.a)
            x = x + grouped_linear(b.ya, w.w_out, w.b_out, self.tile)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """[n, V] of the residual stream [n, C] after the blocks."""
        x = torch.layer_norm(x, x.shape[1:], *self.ln_f)
        return grouped_linear(x, self.w_head, self.b_head, self.tile)


def transposed(w: Tensor) -> Tensor:
    return w.t().float().contiguous()


def norm(ln: torch.nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return ln.weight.float(), ln.bias.float(), ln.eps


def grouped_linear(x: Tensor, w: Tensor, b: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
    """x w + b of x [n, K] and w [K, J], as products of up to `rows` rows each."""
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
        x = torch.randn(tile, len(w), generator=generator, device=w.device)
        bias = w.new_ones(w.shape[1])
        want = grouped_linear(x, w, bias, 2)
        for n in range(4, tile + 1, 2):
            if not torch.equal(torch.addmm(bias, x[:n], w), want[:n]):
                tile = n - 2
                break
    return tile
