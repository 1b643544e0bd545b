"""What kernels.bench runs: for each op its inputs, ours, the peers and an fp32 reference."""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from kernels import gemm, mlp, pointwise
from kernels.attention import attention, attention_reference
from kernels.block import block
from kernels.cross_entropy import cross_entropy
from kernels.layernorm import layernorm, layernorm_reference
from kernels.work import training_ops
from model import ModelConfig

LIGER = importlib.util.find_spec("liger_kernel") is not None


@dataclass(frozen=True)
class Case:
    """An op at a shape. `providers` map inputs to a tensor or a tuple; "eager" comes first."""

    name: str
    inputs: list[Tensor]
    providers: dict[str, Callable]
    reference: Callable
    # What each phase costs: names of work.py's ops at `batch` sequences.
    phases: dict[str, list[str]]
    batch: int
    backward: bool = field(default=True)


def compiled(fn: Callable) -> Callable:
    return torch.compile(fn, dynamic=False)


def both(fwd: list[str], bwd: list[str]) -> dict[str, list[str]]:
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}


def rows(c: ModelConfig, batch: int, width: int, like: dict, scale: float = 1.0) -> Tensor:
    return torch.randn(batch * c.seq_len, width, **like) * scale


def attention_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    batch, T, C, H = max(1, batch // 4), c.seq_len, c.width, c.n_head
    rope = [t.to(device) for t in model.rope_tables(T, c.rotary_dim, c.rope_theta)]

    def rotated(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(batch, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        return model.rotate(q, *rope), model.rotate(k, *rope), v

    rotary = compiled(rotated)

    def sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
        q, k, v = rotary(qkv)
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(batch, T, C)

    providers = {
        "eager": lambda qkv: model.attention(qkv, H, *rope),
        "ours": lambda qkv: attention(qkv, H, rope),
        "compile": compiled(lambda qkv: model.attention(qkv, H, *rope)),
        "sdpa flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "flex": flex(rotary, T, device),
    }
    reference = partial(attention_reference, n_head=H, rope=rope)
    qkv = torch.randn(batch, T, 3 * C, device=device, dtype=dtype)
    phases = both(["attention_fwd"], ["attention_bwd"])
    return Case("attention", [qkv], providers, reference, phases, batch)


def flex(rotary: Callable, T: int, device: str) -> Callable:
    """FlexAttention behind `rotary`; its block mask is made at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    state = {}

    def call(qkv: Tensor) -> Tensor:
        if not state:
            state["mask"] = create_block_mask(
                lambda b, h, q, k: q >= k, None, None, T, T, device=device
            )
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

    def reference(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)  # as model.py does

    providers = {"eager": reference, "ours": cross_entropy, "compile": compiled(reference)}
    if LIGER:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        providers["liger"] = LigerCrossEntropyLoss()
    # Ours writes the gradient in its forward pass: only the sum compares.
    phases = {"fwd+bwd": ["cross_entropy"]}
    return Case("cross_entropy", [logits, targets], providers, reference, phases, batch)


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
    inputs = _projection_inputs(c, batch, {"device": device, "dtype": dtype})
    reference = mlp.projections_reference
    providers = {"eager": reference, "ours": mlp.projections, "compile": compiled(reference)}
    bwd = ["residual_bwd", "attention_out_dx", "gelu_bwd", "out_proj_dw", "attention_db"]
    phases = both(["in_proj_fwd", "out_proj_fwd"], [*bwd, "in_proj_dw", "in_proj_dx"])
    return Case("mlp", inputs, providers, reference, phases, batch)


@contextlib.contextmanager
def every_gemm(version: str):
    """Within, mlp.py takes this version of each op, on every device."""
    was, mlp.choice = mlp.choice, lambda op, x: version
    try:
        yield
    finally:
        mlp.choice = was


def _gemm_case(name: str, inputs: list[Tensor], ours: Callable, reference: Callable, batch: int):
    """One op of mlp.py's GEMM table, by itself, forward: both versions and the peers."""

    def version(which: str) -> Callable:
        def call(*args):
            with every_gemm(which):
                return ours(*args)

        return call

    providers = {"eager": reference, "compile": compiled(reference)}
    providers |= {f"ours {which}": version(which) for which in ("triton", "cublas")}
    return Case(name, inputs, providers, reference, {"fwd": [name]}, batch, backward=False)


def in_proj_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    _, h, _, w_in, b_in, *_ = _projection_inputs(c, batch, {"device": device, "dtype": dtype})

    def reference(h: Tensor, w_in: Tensor, b_in: Tensor) -> tuple[Tensor, Tensor]:
        qkvu = F.linear(h, w_in, b_in)
        return qkvu, F.gelu(qkvu[:, 3 * c.width :], approximate="tanh")

    return _gemm_case("in_proj_fwd", [h, w_in, b_in], mlp.in_proj_fwd, reference, batch)


def out_proj_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    like = {"device": device, "dtype": dtype}
    x, _, y, _, _, w_out, *biases = _projection_inputs(c, batch, like)
    inputs = [y, rows(c, batch, c.mlp_width, like), w_out, *biases, x]

    def reference(y, a, w_out, b_attn, b_mlp, x) -> Tensor:
        w_attn, w_mlp = w_out.split([c.width, c.mlp_width], 1)
        return x + F.linear(y, w_attn, b_attn) + F.linear(a, w_mlp, b_mlp)

    return _gemm_case("out_proj_fwd", inputs, mlp.out_proj_fwd, reference, batch)


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

    return _gemm_case("gelu_bwd", inputs, ours, reference, batch)


def block_case(c: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> Case:
    """A whole block as model.py calls it: ours against its own torch path."""
    batch, C = max(1, batch // 4), c.width
    rope = tuple(t.to(device) for t in model.rope_tables(c.seq_len, c.rotary_dim, c.rope_theta))
    with torch.device(device):
        net = model.Block(c)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5, mean=float(name == "ln.weight"))
    names, inputs = zip(*((n, p.detach().to(dtype)) for n, p in net.named_parameters()))
    x = torch.randn(batch, c.seq_len, C, device=device, dtype=dtype)

    def reference(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters)), (x, *rope))

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        w = dict(zip(names, parameters))
        order = "ln.weight", "ln.bias", "w_in", "b_in", "w_out", "b_attn", "b_mlp"
        return block(x, *(w[n] for n in order), c.n_head, rope)

    outside = ("embedding", "ln_f", "head", "cross_entropy")
    ops = [o for o in training_ops(c, batch) if not o.name.startswith(outside)]
    work = {p: [o.name for o in ops if o.phase == p] for p in ("forward", "backward")}
    providers = {"eager": reference, "ours": ours, "compile": compiled(reference)}
    phases = both(work["forward"], work["backward"])
    return Case("block", [x, *inputs], providers, reference, phases, batch)


CASES: dict[str, Callable[[ModelConfig, int, torch.dtype, str], Case]] = {
    "block": block_case,
    "attention": attention_case,
    "layernorm": layernorm_case,
    "cross_entropy": cross_entropy_case,
    "mlp": mlp_case,
    "in_proj_fwd": in_proj_case,
    "out_proj_fwd": out_proj_case,
    "gelu_bwd": gelu_bwd_case,
}
