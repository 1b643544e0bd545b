"""phi-1's transformer in plain torch: a decoder whose blocks run attention and MLP in parallel.

    x -> embed -> n_layer x [ x + attention(ln(x)) + mlp(ln(x)) ] -> ln_f -> head -> logits

Rotary embedding on the first `rotary_dim` head dims, tanh-GELU, biases on every linear layer, no
weight tying. Shapes: B batch, T time, C width, H heads, D head dim, R rotary dims, M MLP width,
V vocabulary, L layers.

A block's two input projections (qkv and MLP-up) read the same LayerNorm output, so `w_in` holds
both. Its two output projections add into the same residual, so `w_out` holds both.

This is the reference. `Phi(c, triton=True)` runs each block as one call into kernels/ and matches
it up to rounding. `select_kernels` chooses between them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from common import checkpoint
from common.config import UserError, require
from common.memory import CHUNK_ROWS
from kernels import fp8
from tokenizer import Tokenizer

QK_NORM = 1.5  # better than 1.2 and 2 (LOG.md)
INIT_STD = 0.02  # phi-1's initializer_range


@dataclass(frozen=True)
class ModelConfig:
    """Model shape; the defaults are phi-1."""

    vocab_size: int = 51200  # V, tokens in the vocabulary
    seq_len: int = 2048  # T, tokens of context
    n_layer: int = 24  # L, blocks
    n_head: int = 32  # H, attention heads
    width: int = 2048  # C, width of the residual stream; head dim D = C / H
    mlp_width: int = 8192  # M, hidden width of the MLP
    rotary_dim: int = 32  # R, dims per head with rotary embedding; even
    rope_theta: float = 10000.0  # base of the rotary frequencies
    dropout: float = 0.0  # attention and residual dropout probability; the paper uses 0.1
    qk_norm: bool = False  # normalise queries and keys; not in phi-1, not in the Triton kernels
    zero_init: bool = False  # initialise the blocks' output projections to zero; phi-1 does not
    kernels: str = "auto"  # auto, triton or torch: the code for the blocks and the loss; auto is
    # triton on a GPU that can run it, else torch

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "width", "mlp_width"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "n_head", self.width % self.n_head == 0, f"a divisor of width {self.width}")
        even = self.rotary_dim % 2 == 0 and 0 <= self.rotary_dim <= self.head_dim
        require(self, "rotary_dim", even,
                f"an even number up to the head dim {self.head_dim} (width / n_head)")  # fmt: skip
        require(self, "dropout", 0 <= self.dropout < 1, "0 <= dropout < 1")
        known = self.kernels in ("auto", "triton", "torch")
        require(self, "kernels", known, "auto, triton or torch")

    @property
    def head_dim(self) -> int:
        return self.width // self.n_head


def select_kernels(c: ModelConfig, device: torch.device, matmul: str = "plain") -> tuple[str, str]:
    """Choose the kernels for `device`: return ("triton" or "torch", reason).

    Raise UserError if c.kernels is "triton" or `matmul` is "fp8" and `device` cannot run it.
    """
    how = ""
    if matmul == "fp8":
        dims = {name: getattr(c, name) for name in ("seq_len", "width", "mlp_width")}
        if why := fp8.unsupported(device, **dims):
            raise UserError(f"matmul is fp8, but {why}")
        how = ", in fp8" if device.type == "cuda" else ", emulating fp8 slowly"
    if c.kernels == "torch":
        return "torch", f"as requested{how}"
    if c.kernels == "auto" and device.type != "cuda":
        return "torch", f"device is {device.type}{how}"
    try:
        from kernels import block, mlp  # imported here: triton may not be installed
    except ImportError as e:
        why = f"{e.name} is not installed"
    else:
        why = block.unsupported(c.width, c.n_head, c.mlp_width, c.rotary_dim)
        why = why or c.qk_norm * "the kernels do not support qk_norm"
        if not block.runs_on(device):
            why = f"device is {device}, want {block.WANTED_DEVICE}"
    if not why:
        return "triton", mlp.describe(device) + how
    if c.kernels == "auto":
        return "torch", f"no triton: {why}{how}"
    raise UserError(f"kernels is triton, but {why}; try --kernels=torch")


def select_dtype(c: ModelConfig, dtype: str, device: torch.device, batch: int) -> tuple[str, str]:
    """Choose the training dtype: return (name, reason). "auto" means the fastest.

    On a CPU with bfloat16 matmuls, time two blocks forward and backward on `batch` sequences.
    """
    if dtype != "auto":
        return dtype, "as requested"
    if device.type == "cuda":
        return "bfloat16", "auto"
    cpu = torch.cpu.get_capabilities()
    if not (cpu.get("amx_bf16") or cpu.get("avx512_bf16")):
        return "float32", "this CPU has no bfloat16 matmul"
    seconds = {}
    for name in ("float32", "bfloat16"):
        model = Phi(replace(c, n_layer=min(2, c.n_layer))).to(getattr(torch, name))
        idx = torch.randint(c.vocab_size, (batch, c.seq_len))
        for _ in range(4):
            began = time.perf_counter()
            model(idx, idx).backward()
            took = time.perf_counter() - began
            seconds[name] = min(took, seconds.get(name, took))
    ratio = seconds["bfloat16"] / seconds["float32"]
    name = "bfloat16" if ratio < 0.9 else "float32"
    return name, f"a bfloat16 step takes {ratio:.2f}x the float32 time here"


class Block(nn.Module):
    """x + attention(ln(x)) + mlp(ln(x)); `fused` is the Triton block of kernels/block.py, or None.

    `recompute` saves only the block's input and reruns the block in backward. `fp8` trains with
    8-bit matmuls (kernels/fp8.py); eval mode does not quantise.
    """

    def __init__(self, c: ModelConfig, fused: Callable | None = None, recompute=False, fp8=False):
        super().__init__()
        self.c, self.fused, self.recompute, self.fp8 = c, fused, recompute, fp8
        self.ln = nn.LayerNorm(c.width, eps=1e-5)
        self.w_in = nn.Parameter(torch.empty(3 * c.width + c.mlp_width, c.width))  # q | k | v | up
        self.b_in = nn.Parameter(torch.empty(3 * c.width + c.mlp_width))
        self.w_out = nn.Parameter(torch.empty(c.width, c.width + c.mlp_width))  # attention | down
        self.b_attn = nn.Parameter(torch.empty(c.width))
        self.b_mlp = nn.Parameter(torch.empty(c.width))

    def forward(self, *args):
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self.compute, *args, use_reentrant=False)
        return self.compute(*args)

    def compute(self, x, cos, sin, doc_start=None, keep=None):
        c, p, in_fp8 = self.c, self.c.dropout * self.training, self.fp8 and self.training
        if self.fused and keep is None:
            # Draw on the CPU: reading a seed from the GPU would stall on it.
            seeds = torch.randint(2**62, (2,), device="cpu").tolist() if p else (0, 0)
            weights = self.w_in, self.b_in, self.w_out, self.b_attn, self.b_mlp
            rope = (cos, sin) if c.rotary_dim else None
            return self.fused(
                x, self.ln.weight, self.ln.bias, *weights, c.n_head, rope, p, seeds, doc_start,
                in_fp8,
            )  # fmt: skip
        C, M, linear = c.width, c.mlp_width, fp8.linear if in_fp8 else F.linear
        h = linear(self.ln(x), self.w_in, self.b_in)  # [B, T, 3C + M]
        qkv, up = h.split([3 * C, M], dim=-1)
        y = attention(qkv, c.n_head, cos, sin, p, doc_start, keep, c.qk_norm)  # [B, T, C]
        a = F.gelu(up, approximate="tanh")  # [B, T, M]
        w_attn, w_mlp = self.w_out.split([C, M], dim=1)
        y = F.dropout(linear(y, w_attn, self.b_attn), p)
        a = F.dropout(linear(a, w_mlp, self.b_mlp), p)
        return x + y + a


def attention(
    qkv, n_head: int, cos, sin, dropout: float = 0.0, doc_start=None, keep=None, qk_norm=False
):
    """Apply causal rotary attention to the packed projection: [B, T, 3C] -> [B, T, C].

    cos, sin   fp32 [T, R/2]
    doc_start  int32 [B, T], where each position's document begins in its row; masks earlier keys
    keep       list to append the rotated keys and the values to: (k, v), each [B, H, T, D]
    qk_norm    scale queries and keys to mean 0 and standard deviation QK_NORM, before rotation
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
    if qk_norm:
        q, k = (QK_NORM * F.layer_norm(x, x.shape[-1:]) for x in (q, k))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if keep is not None:
        keep.append((k, v))
    if doc_start is not None:
        t = torch.arange(T, device=qkv.device)
        seen = (t <= t[:, None]) & (t >= doc_start[:, :, None])  # [B, T, T]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], dropout_p=dropout)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def rope_tables(T: int, R: int, theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, fp32 [T, R/2]: position t rotates pair i by t theta^(-2i/R)."""
    fp32 = {"dtype": torch.float32, "device": "cpu"}  # same bits for every device
    frequency = 1.0 / theta ** (torch.arange(0, R, 2, **fp32) / max(1, R))
    angle = torch.arange(T, **fp32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + R/2}) of the first R dims of x [.., T, D] by its angle."""
    half = cos.shape[-1]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1).to(x.dtype)


class Phi(nn.Module):
    """The language model; `triton` runs the blocks and the loss with kernels/."""

    def __init__(self, c: ModelConfig, triton=False, recompute=False, fp8=False):
        super().__init__()
        self.c, self.triton = c, triton
        fused_block = None
        if triton:
            from kernels.block import block as fused_block
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(Block(c, fused_block, recompute, fp8) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.width, eps=1e-5)
        self.head = nn.Linear(c.width, c.vocab_size)
        for name, table in zip(("cos", "sin"), rope_tables(c.seq_len, c.rotary_dim, c.rope_theta)):
            self.register_buffer(name, table.to(self.head.weight.device), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.0 if c.zero_init and "w_out" in name else INIT_STD)
            elif not (".ln." in name or name.startswith("ln_f")):
                nn.init.zeros_(p)  # biases; LayerNorms start as the identity

    def _apply(self, fn, recurse=True):
        """Move the rotary tables with .to() and friends, but keep them fp32."""
        super()._apply(fn, recurse)
        c, device = self.c, self.cos.device
        if not self.cos.is_meta:
            tables = rope_tables(c.seq_len, c.rotary_dim, c.rope_theta)
            self.cos, self.sin = (table.to(device) for table in tables)
        return self

    def forward(self, idx, targets=None, doc_start=None, keep: list | None = None):
        """Return the mean loss (fp32, or fp64 for an fp64 model), or the logits without targets.

        idx        int64 [B, T]
        targets    int64 [B, T], the next token at each position; -1 is excluded from the mean
        doc_start  int32 [B, T], where the position's document begins in its row; masks earlier keys
        keep       list to append each layer's rotated (k, v) to, [B, H, T, D]; forces torch
        """
        T = idx.shape[1]
        assert T <= self.c.seq_len
        cos, sin = self.cos[:T], self.sin[:T]
        triton = self.triton and keep is None
        x = self.embed(idx)  # [B, T, C]
        if triton and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residual stream too
        for block in self.blocks:
            x = block(x, cos, sin, doc_start, keep)
        if triton and targets is not None:
            return self.fused_loss(x, targets)
        logits = self.head(self.ln_f(x))  # [B, T, V]
        if targets is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    def fused_loss(self, x, targets):
        """Return the loss for the last block's x [B, T, C] without materialising all logits."""
        from kernels.cross_entropy import linear_cross_entropy
        from kernels.layernorm import layernorm

        ln, head, targets = self.ln_f, self.head, targets.flatten().contiguous()
        x = layernorm(x, ln.weight, ln.bias, ln.eps).flatten(0, 1)
        # The mean's gradients underflow in fp16: compute the sum's, then scale.
        expected_grad = float(len(x)) if x.dtype == torch.float16 else 1.0
        return linear_cross_entropy(
            x, head.weight, head.bias, targets, chunk_rows=CHUNK_ROWS, expected_grad=expected_grad
        )


def flops_per_token(c: ModelConfig) -> int:
    """Count training FLOPs per token: 6 per matmul parameter plus 6 L C T for causal attention.

    PaLM counts 12 L C T, for full attention (arXiv 2204.02311, B).
    """
    matmul = c.n_layer * (4 * c.width**2 + 2 * c.width * c.mlp_width) + c.vocab_size * c.width
    return 6 * matmul + 6 * c.n_layer * c.width * c.seq_len


def mfu(c: ModelConfig, tokens_per_s: float, peak: float) -> float:
    """Return model FLOPs utilisation: the fraction of `peak` FLOP/s used at this rate."""
    return tokens_per_s * flops_per_token(c) / peak


@lru_cache
def parameter_count(c: ModelConfig) -> int:
    """Count the parameters of `Phi(c)` without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Phi(c).parameters())


def load_model(path: Path, device: str = "auto") -> tuple[Phi, Tokenizer, Path]:
    """Load the model of a run or checkpoint in eval mode; return (model, tokenizer, folder used).

    `device` is a torch device name, or "auto": a GPU if there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device, folder = torch.device(device), checkpoint.find(path)
    c = ModelConfig(**checkpoint.read_meta(folder)["model"])
    # A run trained with triton may load on a machine without it.
    asked = replace(c, kernels="auto") if c.kernels == "triton" else c
    model = Phi(c, select_kernels(asked, device)[0] == "triton")
    checkpoint.load_weights(model, folder)
    return model.to(device).eval(), Tokenizer(folder), folder
