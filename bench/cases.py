"""What bench.ops runs: for each op its inputs, ours, the peers and an fp32 reference.

With dropout each implementation draws masks of its own: the reference is then ours, in fp32, whose
masks are the same, and the peers are timed only.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from bench.cost import training_ops
from kernels import attention as attention_module
from kernels import gemm, mlp, pointwise
from kernels.attention import attention_bwd, attention_fwd, attention_reference
from kernels.block import block
from kernels.cross_entropy import cross_entropy_
from kernels.layernorm import layernorm, layernorm_reference
from model import ModelConfig

LIGER = importlib.util.find_spec("liger_kernel") is not None
SEED = 7  # of dropout's masks
DOCUMENT = 512  # tokens of each document, in attention_docs


class Attention(torch.autograd.Function):
    """attention.py alone, as the block calls it: attend(qkv, n_head, rope, p, seed, doc_start)."""

    @staticmethod
    def forward(ctx, qkv: Tensor, *options) -> Tensor:
        out, *stats = attention_fwd(qkv, *options)
        ctx.save_for_backward(qkv, out, *stats)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dqkv = attention_bwd(dout.contiguous(), *ctx.saved_tensors, *ctx.options)
        return dqkv, *(None,) * len(ctx.options)


def attend(qkv: Tensor, n_head: int, rope=None, p=0.0, seed=0, doc_start=None) -> Tensor:
    """Return attention [B, T, C] of qkv [B, T, 3C], differentiable; rotate q and k in place."""
    seed = torch.full((1,), seed, device=qkv.device) if p else None
    return Attention.apply(qkv, n_head, rope, p, seed, doc_start)


class Projections(torch.autograd.Function):
    """mlp.py alone, as the block calls it: `project`."""

    @staticmethod
    def forward(ctx, x, h, y, w_in, b_in, w_out, b_attn, b_mlp, p, seed):
        qkvu, a = mlp.in_proj_fwd(h, w_in, b_in)
        ctx.save_for_backward(h, y, qkvu, w_in, w_out)
        ctx.dropout = p, seed
        out = mlp.out_proj_fwd(y, a, w_out, b_attn, b_mlp, x, p, seed)
        return qkvu[:, : 3 * h.shape[1]].clone(), out

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv, dout):
        h, y, qkvu, w_in, w_out = ctx.saved_tensors
        split, dqkvu = dqkv.shape[1], torch.empty_like(qkvu)
        dw_in, dw_out = (torch.empty(w.shape, device=w.device) for w in (w_in, w_out))
        dqkvu[:, :split] = dqkv
        dy, db_attn, db_mlp, db_up = mlp.out_proj_bwd(
            dout.contiguous(), y, qkvu[:, split:], w_out, dqkvu[:, split:], dw_out, 0.0,
            *ctx.dropout,
        )  # fmt: skip
        db_in = torch.cat([pointwise.column_sum(dqkvu[:, :split]), db_up])
        gemm.accumulate_(dw_in, dqkvu, h, 0.0)
        grads = dout, dqkvu @ w_in, dy, dw_in, db_in, dw_out, db_attn, db_mlp
        return *(g.to(h.dtype) for g in grads), None, None


def project(x, h, y, w_in, b_in, w_out, b_attn, b_mlp, p=0.0, seed=0) -> tuple[Tensor, Tensor]:
    """Return (qkv, out) of `mlp.projections_reference`, differentiable."""
    return Projections.apply(x, h, y, w_in, b_in, w_out, b_attn, b_mlp, p, seed)


@dataclass(frozen=True)
class Case:
    """An op at a shape. `providers` map inputs to a tensor or a tuple; "eager" comes first.

    A provider runs, backward included, within `running(its name)`.
    """

    name: str
    inputs: list[Tensor]
    providers: dict[str, Callable]
    reference: Callable
    # What each phase costs: names of cost.py's ops at `batch` sequences.
    phases: dict[str, list[str]]
    batch: int
    backward: bool = True
    dropout: float = 0.0
    flops_frac: float = 1.0  # of cost.py's FLOPs: documents leave some out
    within: dict[str, tuple] = field(default_factory=dict)  # provider -> (module, name, its value)

    def running(self, provider: str):
        within = self.within.get(provider)
        return patch.object(*within) if within else contextlib.nullcontext()


def compiled(fn: Callable) -> Callable:
    """Return torch.compile's version on a GPU; on a CPU, where that takes minutes, fn itself."""
    return torch.compile(fn, dynamic=False) if torch.cuda.is_available() else fn


def both(fwd: list[str], bwd: list[str]) -> dict[str, list[str]]:
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}


def rows(c: ModelConfig, batch: int, width: int, like: dict, scale: float = 1.0) -> Tensor:
    return torch.randn(batch * c.seq_len, width, **like) * scale


def attention_case(
    c: ModelConfig, batch: int, dtype: torch.dtype, device: str, docs: bool = False
) -> Case:
    batch, T, C, H, p = max(1, batch // 4), c.seq_len, c.width, c.n_head, c.dropout
    rope = tuple(t.to(device) for t in model.rope_tables(T, c.rotary_dim, c.rope_theta))
    t = torch.arange(T, device=device, dtype=torch.int32)
    doc = (t // DOCUMENT * DOCUMENT).expand(batch, T).contiguous() if docs else None

    def rotated(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(batch, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        return model.rotate(q, *rope), model.rotate(k, *rope), v

    rotary = compiled(rotated)

    def sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
        q, k, v = rotary(qkv)
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return y.transpose(1, 2).reshape(batch, T, C)

    def eager(qkv: Tensor) -> Tensor:
        return model.attention(qkv, H, *rope, p, doc_start=doc)

    def ours(qkv: Tensor) -> Tensor:
        return attend(qkv, H, rope, p, SEED, doc)

    providers = {"eager": eager, "ours": ours, "ours fp32 adds": ours, "compile": compiled(eager)}
    within = {"ours fp32 adds": (attention_module, "FIXED_POINT", False)}
    if not docs:
        for name in ("flash", "cudnn", "efficient"):
            backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION")
            providers[f"sdpa {name}"] = partial(sdpa, backend)
    if not p:
        providers["flex"] = flex(rotary, T, device, doc)
    reference = ours if p else partial(attention_reference, n_head=H, rope=rope, doc_start=doc)
    qkv = torch.randn(batch, T, 3 * C, device=device, dtype=dtype)
    phases, frac = both(["attention_fwd"], ["attention_bwd"]), min(1, DOCUMENT / T) if docs else 1
    name = "attention" + "_docs" * docs
    return Case(name, [qkv], providers, reference, phases, batch, True, p, frac, within)


def flex(rotary: Callable, T: int, device: str, doc: Tensor | None) -> Callable:
    """FlexAttention behind `rotary`; its block mask is made at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    state = {}

    def seen(b, h, q, k):
        return (q >= k) & (k >= doc[0, q]) if doc is not None else q >= k

    def call(qkv: Tensor) -> Tensor:
        if not state:
            state["mask"] = create_block_mask(seen, None, None, T, T, device=device)
            state["fn"] = compiled(flex_attention)
        y = state["fn"](*rotary(qkv), block_mask=state["mask"])
        return y.transpose(1, 2).reshape(*qkv.shape[:2], -1)

    return call


def layernorm_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    like = {"device": device, "dtype": dtype}
    inputs = [rows(c, batch, c.width, like), *(torch.randn(c.width, **like) for _ in "wb")]
    providers = {"eager": layernorm_reference, "ours": layernorm}
    providers["compile"] = compiled(layernorm_reference)
    if LIGER:
        from liger_kernel.transformers.functional import liger_layer_norm

        providers["liger"] = lambda x, w, b: liger_layer_norm(x, w, b, 1e-5)
    phases = both(["ln_f_fwd"], ["ln_f_bwd"])
    return Case("layernorm", inputs, providers, layernorm_reference, phases, batch)


def cross_entropy_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    logits = rows(c, batch, c.vocab_size, {"device": device, "dtype": dtype}, 2.0)
    targets = torch.randint(c.vocab_size, logits.shape[:1], device=device)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)  # as model.py does

    def with_gradient(loss: Callable, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = logits.detach().requires_grad_()
            y = loss(x, targets)
            return y.detach(), *torch.autograd.grad(y, x)

    def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.full((), 1 / len(targets), device=device)
        return cross_entropy_(logits, targets, scale, -1, grad=True).mean(), logits

    reference = partial(with_gradient, loss)
    providers = {"eager": reference, "ours": ours}
    providers["compile"] = partial(with_gradient, compiled(loss))
    if LIGER:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        providers["liger"] = partial(with_gradient, LigerCrossEntropyLoss())
    # Ours computes the loss and its gradient in one pass: only the sum compares.
    phases = {"fwd+bwd": ["cross_entropy"]}
    return Case("cross_entropy", [logits, targets], providers, reference, phases, batch, False)


def _projection_inputs(c: ModelConfig, batch: int, like: dict) -> list[Tensor]:
    """x, h, y, w_in, b_in, w_out, b_attn, b_mlp of mlp.py, products of order one."""
    C, M = c.width, c.mlp_width
    w_in = torch.randn(3 * C + M, C, **like) * C**-0.5
    w_out = torch.randn(C, C + M, **like) * (C + M) ** -0.5
    x, h, y = (rows(c, batch, C, like) for _ in "xhy")
    return [x, h, y, w_in, *(torch.randn(n, **like) for n in (3 * C + M,)), w_out] + [
        torch.randn(C, **like) for _ in "12"
    ]


def mlp_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    """Both projections, forward and backward, without dropout."""
    inputs = _projection_inputs(c, batch, {"device": device, "dtype": dtype})
    reference = mlp.projections_reference
    providers = {"eager": reference, "ours": project, "compile": compiled(reference)}
    bwd = ["residual_bwd", "attention_out_dx", "gelu_bwd", "out_proj_dw", "attention_db"]
    phases = both(["in_proj_fwd", "out_proj_fwd"], [*bwd, "in_proj_dw", "in_proj_dx"])
    return Case("mlp", inputs, providers, reference, phases, batch)


def _forward_case(
    name: str, inputs: list[Tensor], ours: Callable, reference: Callable, batch: int, p: float = 0.0
) -> Case:
    """One op of the block by itself, forward; of mlp.py's GEMM table both versions."""
    providers, within = {"eager": reference, "compile": compiled(reference)}, {}
    for version in ("triton", "cublas") if name in mlp.GEMM[80] else ():
        providers[f"ours {version}"] = ours
        within[f"ours {version}"] = (mlp, "choice", lambda op, x, v=version: v)
    if not within:
        providers["ours"] = ours
    exact = ours if p else reference
    return Case(name, inputs, providers, exact, {"fwd": [name]}, batch, False, p, within=within)


def in_proj_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    _, h, _, w_in, b_in, *_ = _projection_inputs(c, batch, {"device": device, "dtype": dtype})

    def reference(h: Tensor, w_in: Tensor, b_in: Tensor) -> tuple[Tensor, Tensor]:
        qkvu = F.linear(h, w_in, b_in)
        return qkvu, F.gelu(qkvu[:, 3 * c.width :], approximate="tanh")

    return _forward_case("in_proj_fwd", [h, w_in, b_in], mlp.in_proj_fwd, reference, batch)


def out_proj_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    like = {"device": device, "dtype": dtype}
    x, _, y, _, _, w_out, *biases = _projection_inputs(c, batch, like)
    inputs, p = [y, rows(c, batch, c.mlp_width, like), w_out, *biases, x], c.dropout

    def reference(y, a, w_out, b_attn, b_mlp, x) -> Tensor:
        w_attn, w_mlp = w_out.split([c.width, c.mlp_width], 1)
        y, a = F.linear(y, w_attn, b_attn), F.linear(a, w_mlp, b_mlp)
        return x + F.dropout(y, p) + F.dropout(a, p)

    ours = partial(mlp.out_proj_fwd, p=p, seed=SEED)
    return _forward_case("out_proj_fwd", inputs, ours, reference, batch, p)


def residual_bwd_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    inputs, p = [rows(c, batch, c.width, {"device": device, "dtype": dtype})], c.dropout

    def reference(dout: Tensor) -> tuple[Tensor, ...]:
        d1, d2 = (F.dropout(dout, p) if p else dout for _ in "12")
        return d1, d2, d1.float().sum(0), d2.float().sum(0)

    ours = partial(pointwise.residual_bwd, p=p, seed=SEED)
    return _forward_case("residual_bwd", inputs, ours, reference, batch, p)


def gelu_bwd_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    like = {"device": device, "dtype": dtype}
    w_mlp = torch.randn(c.width, c.mlp_width, **like) * c.width**-0.5
    inputs = [rows(c, batch, c.width, like), w_mlp, rows(c, batch, c.mlp_width, like)]

    def ours(d: Tensor, w_mlp: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        du, a = torch.empty_like(u), torch.empty_like(u)
        if mlp.choice("gelu_bwd", u) == "triton":
            return du, a, gemm.gelu_bwd(d, w_mlp, u, du, a)
        return du, a, pointwise.gelu_bwd(d @ w_mlp, u, du, a)

    def reference(d: Tensor, w_mlp: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        du = torch.ops.aten.gelu_backward(d @ w_mlp, u, approximate="tanh")
        return du, F.gelu(u, approximate="tanh"), du.float().sum(0)

    return _forward_case("gelu_bwd", inputs, ours, reference, batch)


def block_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    """A whole block as model.py calls it: ours against its own torch path."""
    batch, C, p = max(1, batch // 4), c.width, c.dropout
    rope = tuple(t.to(device) for t in model.rope_tables(c.seq_len, c.rotary_dim, c.rope_theta))
    with torch.device(device):
        net = model.Block(c)
    for name, w in net.named_parameters():
        torch.nn.init.normal_(w, std=w.shape[-1] ** -0.5, mean=float(name == "ln.weight"))
    names, inputs = zip(*((n, w.detach().to(dtype)) for n, w in net.named_parameters()))
    x = torch.randn(batch, c.seq_len, C, device=device, dtype=dtype)

    def reference(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters)), (x, *rope))

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        w = dict(zip(names, parameters))
        order = "ln.weight", "ln.bias", "w_in", "b_in", "w_out", "b_attn", "b_mlp"
        return block(x, *(w[n] for n in order), c.n_head, rope, p, (SEED, SEED))

    outside = ("embedding", "ln_f", "head", "cross_entropy")
    ops = [o for o in training_ops(c, batch) if not o.name.startswith(outside)]
    work = {p: [o.name for o in ops if o.phase == p] for p in ("forward", "backward")}
    providers = {"eager": reference, "ours": ours, "compile": compiled(reference)}
    phases = both(work["forward"], work["backward"])
    exact = ours if p else reference
    return Case("block", [x, *inputs], providers, exact, phases, batch, True, p)


CASES: dict[str, Callable[[ModelConfig, int, torch.dtype, str], Case]] = {
    "block": block_case,
    "attention": attention_case,
    "attention_docs": partial(attention_case, docs=True),
    "layernorm": layernorm_case,
    "cross_entropy": cross_entropy_case,
    "mlp": mlp_case,
    "in_proj_fwd": in_proj_case,
    "out_proj_fwd": out_proj_case,
    "gelu_bwd": gelu_bwd_case,
    "residual_bwd": residual_bwd_case,
}
