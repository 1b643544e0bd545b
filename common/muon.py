"""Muon: orthogonalised momentum for the blocks' matrices, AdamW for everything else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) updates a matrix by approximately
U V^T, where U S V^T is its momentum; Newton-Schulz iterations compute it with matmuls alone. A
block's `w_in` holds q, k, v and up, its `w_out` attention and down; each of the six is
orthogonalised on its own. An update's RMS is `RMS` times the learning rate for every shape, about
the same as AdamW's (Liu et al. 2025, arXiv 2502.16982).

If S ranks share the weights, only rank i mod S orthogonalises block i: one all-to-all gathers the
block's momentum shards, another scatters the update, both overlapped with another block's compute.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

RMS = 0.2
MOMENTUM = 0.95
# Polynomials a x + b x^3 + c x^5 that in sequence map [0.005, 1] to within 0.083 of 1. Minimax, as
# in Polar Express (Amsel et al. 2025, arXiv 2505.16932).
COEFFICIENTS = (
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
    (2.1895, -1.5672, 0.4079),
)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Return about RMS sqrt(max(rows, cols)) U V^T for each x = U S V^T, fp32 [n, rows, cols].

    Iterate on the Gram matrix, [cols, cols], and multiply x by the product at the end. This
    diverges in bf16; in simulated TF32 it is closer to fp32 than bf16 iterations on x (LOG.md).
    """
    _, rows, cols = x.shape
    if rows < cols:
        return orthogonalize(x.mT).mT
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, product = x.mT @ x, RMS * rows**0.5 * torch.eye(cols, device=x.device)
    product = product.expand_as(gram)
    for a, b, c in COEFFICIENTS:
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # beta=a below adds the a I term
        product = torch.baddbmm(product, product, q, beta=a)
        gram = torch.baddbmm(gram, q, gram, beta=a)
        gram = torch.baddbmm(gram, gram, q, beta=a)
    return x @ product


def update(w_in: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a block's updates from its momenta, fp32 [3C + M, C] and [C, C + M]."""
    C, M = len(w_out), w_out.shape[1] - len(w_out)
    q, k, v, up = w_in.split([C, C, C, M])
    attention, down = w_out.split([C, M], dim=1)
    q, k, v, attention = orthogonalize(torch.stack([q, k, v, attention]))
    up, down = orthogonalize(torch.stack([up, down.mT]))
    return torch.cat([q, k, v, up]), torch.cat([attention, down.mT], dim=1)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of `blocks`, and `adamw` for the rest, as one optimiser."""

    def __init__(self, blocks, adamw: torch.optim.AdamW, lr: float, weight_decay: float):
        self.blocks = [(block.w_in, block.w_out) for block in blocks]
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__([p for block in self.blocks for p in block], defaults)
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        self.adamw, adamw.state = adamw, self.state
        self.param_groups += adamw.param_groups  # shared: a new lr reaches both
        p, self.group, self.ranks, self.rank = self.blocks[0][0], None, 1, 0
        self.grad_scale = torch.ones((), device=p.device)  # same interface as torch's fused AdamW
        self.found_inf = torch.zeros((), device=p.device)
        if isinstance(p, DTensor):
            self.group = p.device_mesh.get_group("shard")
            self.ranks, self.rank = self.group.size(), self.group.rank()
        # Elements of w_in and w_out on each rank.
        self.sizes = list(zip(*(_shards(p, self.ranks) for p in self.blocks[0])))

    @torch.no_grad()
    def step(self) -> None:
        """Step with the gradients divided by `grad_scale`, or do nothing if `found_inf` is 1.

        Both are scalars on the device, as in torch's fused optimisers.
        """
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()
        turns = [self.blocks[i : i + self.ranks] for i in range(0, len(self.blocks), self.ranks)]
        gathered = ((turn, self._gather(turn)) for turn in turns)
        scattered = ((turn, self._scatter(turn, *sent)) for turn, sent in _one_ahead(gathered))
        lr = self.param_groups[0]["lr"] * (1 - self.found_inf)
        decay = 1 - lr * self.param_groups[0]["weight_decay"]
        for turn, (flat, work) in _one_ahead(scattered):
            if work:
                work.wait()
            updates = flat.split(self.sizes[self.rank] * len(turn))
            for p, u in zip(itertools.chain(*turn), updates):
                p = _local(p)
                p.mul_(decay).addcmul_(u.view_as(p), lr, value=-1)

    def _gather(self, turn: list) -> tuple:
        """Start gathering the momenta of each block in `turn` on the block's rank."""
        parts = [self._momentum(p) for block in turn for p in block]
        return self._exchange(parts, *self._counts(turn))

    def _scatter(self, turn: list, flat: torch.Tensor, work) -> tuple:
        """Wait for the gathered momenta, then start sending each rank its rows of the updates."""
        if work:
            work.wait()
        parts = self._update(flat) if self.rank < len(turn) else [flat]
        return self._exchange(parts, *reversed(self._counts(turn)))

    def _counts(self, turn: list) -> tuple[list[int], list[int]]:
        """Return the elements to send to, and receive from, each rank when gathering a turn."""
        mine, blocks = sum(self.sizes[self.rank]), len(turn)
        to = [mine] * blocks + [0] * (self.ranks - blocks)
        return to, [sum(n) if self.rank < blocks else 0 for n in self.sizes]

    def _momentum(self, p: torch.Tensor) -> torch.Tensor:
        """Update the momentum of this rank's rows; return the Nesterov momentum, flattened."""
        g, m = _local(p.grad).div_(self.grad_scale), _local(self.state[p]["momentum"])
        g = torch.where(self.found_inf > 0, m, g)
        m.lerp_(g, 1 - MOMENTUM)
        u = g.lerp_(m, MOMENTUM).flatten()
        return u.bfloat16() if u.is_cuda else u

    def _update(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Compute a block's updates from its momenta, both split by rank: w_in, w_out per rank."""
        parts = flat.split(list(itertools.chain(*self.sizes)))
        w_in, w_out = (torch.cat(parts[i::2]).float().view(p.shape)
                       for i, p in enumerate(self.blocks[0]))  # fmt: skip
        rows = [u.to(flat.dtype).flatten().split([n[i] for n in self.sizes])
                for i, u in enumerate(update(w_in, w_out))]  # fmt: skip
        return list(itertools.chain(*zip(*rows)))

    def _exchange(self, parts: list[torch.Tensor], to: list[int], back: list[int]) -> tuple:
        """Start an all-to-all with these element counts; return (receive buffer, work)."""
        sent = torch.cat(parts)
        if not self.group:
            return sent, None
        got = sent.new_empty(sum(back))
        return got, dist.all_to_all_single(got, sent, back, to, self.group, async_op=True)


def _shards(p: torch.Tensor, ranks: int) -> list[int]:
    """Return the elements of p on each rank; FSDP splits rows like torch.chunk."""
    rows = -(-len(p) // ranks)
    return [p.shape[1] * max(0, min(rows, len(p) - rank * rows)) for rank in range(ranks)]


def _one_ahead(begun: Iterator) -> Iterator:
    """Yield each item only after starting the next one, to overlap them."""
    last = next(begun)
    for item in begun:
        yield last
        last = item
    yield last


def _local(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if isinstance(p, DTensor) else p
