"""Benchmark cases for bench.ops: inputs, our kernel, peers and an fp32 reference for each op.

With dropout every implementation draws its own masks. The reference is then ours in fp32, with the
same masks, and peers are only timed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import model
from bench.cost import training_ops
from kernels import attention
from kernels.attention import attention_reference
from kernels.block import block
from kernels.cross_entropy import cross_entropy_
from kernels.layernorm import layernorm, layernorm_reference
from model import ModelConfig

SEED = 7  # for dropout masks
DOCUMENT = 512  # tokens a document, in attention_docs


class Op(torch.autograd.Function):
    """Autograd wrapper: `fn` returns (outputs, backward), backward maps gradients to gradients."""

    @staticmethod
    def forward(ctx, fn: Callable, *inputs: Tensor):
        out, ctx.run_backward = fn(*inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts: Tensor):
        return None, *ctx.run_backward(*douts)


def attend(
    qkv: Tensor, n_head: int, rope=None, p=0.0, seed=0, doc_start=None, fixed_point=True
) -> Tensor:
    """Return differentiable attention [B, T, C] of qkv [B, T, 3C]. Rotate q and k in place."""
    seed = torch.full((1,), seed, device=qkv.device) if p else None
    options = n_head, rope, p, seed, doc_start

    def run(qkv: Tensor):
        out, *stats = attention.attention_fwd(qkv, *options)
        saved = qkv.detach(), out.detach(), *stats

        def backward(dout: Tensor) -> tuple[Tensor]:
            with patch.object(attention, "FIXED_POINT", fixed_point):
                return (attention.attention_bwd(dout.contiguous(), *saved, *options),)

        return out, backward

    return Op.apply(run, qkv)


@dataclass(frozen=True)
class Case:
    """An op at a shape. `providers` map inputs to a tensor or a tuple; "eager" comes first."""

    name: str
    inputs: list[Tensor]
    providers: dict[str, Callable]
    reference: Callable
    phases: dict[str, list[str]]  # timed phase -> its ops in cost.py, at `batch` sequences
    batch: int
    backward: bool = True
    dropout: float = 0.0
    flops_frac: float = 1.0  # share of cost.py's FLOPs: documents mask some out


def compiled(fn: Callable) -> Callable:
    """Compile `fn` on a GPU; return it as is on a CPU, where compiling takes minutes."""
    return torch.compile(fn, dynamic=False) if torch.cuda.is_available() else fn


def make_case(op: str, c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    with torch.device(device):
        return CASES[op](c, batch, dtype)


def rope_of(c: ModelConfig) -> tuple[Tensor, Tensor]:
    tables = model.rope_tables(c.seq_len, c.rotary_dim, c.rope_theta)
    return tuple(t.to(torch.get_default_device()) for t in tables)


def attention_case(c: ModelConfig, batch: int, dtype: torch.dtype, docs: bool = False) -> Case:
    batch, T, C, H, p = max(1, batch // 4), c.seq_len, c.width, c.n_head, c.dropout
    qkv, rope = torch.randn(batch, T, 3 * C, dtype=dtype), rope_of(c)
    starts = torch.arange(T, dtype=torch.int32) // DOCUMENT * DOCUMENT
    doc = starts.expand(batch, T).contiguous() if docs else None

    def rotated(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(batch, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        return model.rotate(q, *rope), model.rotate(k, *rope), v

    def sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
        q, k, v = rotary(qkv)
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return y.transpose(1, 2).reshape(batch, T, C)

    def eager(qkv: Tensor) -> Tensor:
        return model.attention(qkv, H, *rope, p, doc_start=doc)

    def ours(qkv: Tensor, fixed_point: bool = True) -> Tensor:
        return attend(qkv, H, rope, p, SEED, doc, fixed_point)

    def seen(b, h, q, k):
        return (q >= k) & (k >= doc[0, q]) if docs else q >= k

    @functools.cache
    def mask() -> BlockMask:
        return create_block_mask(seen, None, None, T, T, device=qkv.device)

    def flex(qkv: Tensor) -> Tensor:
        y = fused_flex(*rotary(qkv), block_mask=mask())
        return y.transpose(1, 2).reshape(batch, T, C)

    rotary, fused_flex = compiled(rotated), compiled(flex_attention)
    providers = {"eager": eager, "ours": ours, "ours fp32 adds": partial(ours, fixed_point=False)}
    providers["compile"] = compiled(eager)
    if not docs:
        providers["sdpa flash"] = partial(sdpa, SDPBackend.FLASH_ATTENTION)
        providers["sdpa cudnn"] = partial(sdpa, SDPBackend.CUDNN_ATTENTION)
    if not p:
        providers["flex"] = flex
    reference = ours if p else partial(attention_reference, n_head=H, rope=rope, doc_start=doc)
    phases = {"fwd": ["attention_fwd"], "bwd": ["attention_bwd"]}
    name, frac = "attention" + "_docs" * docs, min(1, DOCUMENT / T) if docs else 1
    return Case(name, [qkv], providers, reference, phases, batch, True, p, frac)


def layernorm_case(c: ModelConfig, batch: int, dtype: torch.dtype) -> Case:
    shapes = (batch * c.seq_len, c.width), (c.width,), (c.width,)
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    providers = {"eager": layernorm_reference, "ours": layernorm}
    providers["compile"] = compiled(layernorm_reference)
    phases = {"fwd": ["ln_f_fwd"], "bwd": ["ln_f_bwd"]}
    return Case("layernorm", inputs, providers, layernorm_reference, phases, batch)


def cross_entropy_case(c: ModelConfig, batch: int, dtype: torch.dtype) -> Case:
    """Time loss plus gradient: ours computes both in one pass."""
    logits = torch.randn(batch * c.seq_len, c.vocab_size, dtype=dtype) * 2
    targets = torch.randint(c.vocab_size, logits.shape[:1])

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)  # as model.py does

    def with_gradient(loss: Callable, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = logits.detach().requires_grad_()
            y = loss(x, targets)
            return y.detach(), *torch.autograd.grad(y, x)

    def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.full((), 1 / len(targets), device=logits.device)
        return cross_entropy_(logits, targets, scale, -1, grad=True).mean(), logits

    reference = partial(with_gradient, loss)
    providers = {"eager": reference, "ours": ours}
    providers["compile"] = partial(with_gradient, compiled(loss))
    phases = {"fwd+bwd": ["cross_entropy"]}
    return Case("cross_entropy", [logits, targets], providers, reference, phases, batch, False)


def block_case(c: ModelConfig, batch: int, dtype: torch.dtype) -> Case:
    """Return the case of a whole block as model.py calls it: ours against its torch path."""
    batch, p, rope = max(1, batch // 4), c.dropout, rope_of(c)
    net, x = model.Block(c), torch.randn(batch, c.seq_len, c.width, dtype=dtype)
    for name, w in net.named_parameters():
        torch.nn.init.normal_(w, std=w.shape[-1] ** -0.5, mean=float(name == "ln.weight"))
    names, inputs = zip(*((n, w.detach().to(dtype)) for n, w in net.named_parameters()))

    def reference(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters)), (x, *rope))

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        w = dict(zip(names, parameters))
        order = "ln.weight", "ln.bias", "w_in", "b_in", "w_out", "b_attn", "b_mlp"
        return block(x, *(w[n] for n in order), c.n_head, rope, p, (SEED, SEED))

    outside = ("embedding", "ln_f", "head", "cross_entropy")
    ops = [o for o in training_ops(c, batch) if not o.name.startswith(outside)]
    fwd, bwd = ([o.name for o in ops if o.phase == phase] for phase in ("forward", "backward"))
    providers = {"eager": reference, "ours": ours, "compile": compiled(reference)}
    phases, exact = {"fwd": fwd, "bwd": bwd}, ours if p else reference
    return Case("block", [x, *inputs], providers, exact, phases, batch, True, p)


CASES: dict[str, Callable[[ModelConfig, int, torch.dtype], Case]] = {
    "block": block_case,
    "attention": attention_case,
    "attention_docs": partial(attention_case, docs=True),
    "layernorm": layernorm_case,
    "cross_entropy": cross_entropy_case,
}
