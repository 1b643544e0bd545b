"""Record each kernel's launch at phi-1's shape on meta tensors, for bench.resources to compile.

The recorded arguments carry types, constexprs and TMA blocks, so op files do not repeat them. A new
kernel needs an entry in KERNELS here and one in kernels/tuning.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import attention, block, cross_entropy, decode, gemm, launch, layernorm, mlp, pointwise
from kernels.launch import TUNING
from model import ModelConfig

PHI1 = ModelConfig()
B, T, C, M, V, R = 16, PHI1.seq_len, PHI1.width, PHI1.mlp_width, PHI1.vocab_size, PHI1.rotary_dim
N, H, EPS = B * T, PHI1.n_head, 1e-5
SEED = 2**62  # for dropout
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
         torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A @triton.jit function and the call that launches it."""

    fn: Any  # the triton.JITFunction
    call: Callable  # call(**variant) launches it, possibly among others
    variant: str = ""  # bool argument of call: configurations must fit with False and True
    sms: tuple[int, ...] = (80, 90)  # architectures

    @property
    def variants(self) -> list[dict]:
        return [{self.variant: False}, {self.variant: True}] if self.variant else [{}]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _block(
    D: int = 64, p: float = 0.0, DOC: bool = False, DROPOUT: bool = False, version: str = "triton"
) -> None:
    """Run a block forward and backward."""
    angles = (empty(T, R // 2, dtype=torch.float32),) * 2
    shapes = (C,), (C,), (3 * C + M, C), (3 * C + M,), (C, C + M), (C,), (C,)
    x, doc = empty(B, T, C).requires_grad_(), empty(B, T, dtype=torch.int32) if DOC else None
    options = C // D, angles, 0.1 if DROPOUT else p, (SEED, SEED), doc, False
    with patch.object(mlp, "choice", lambda op, x: version):
        out = block._Block.apply(x, *(empty(*shape) for shape in shapes), *options)
        out.backward(empty(N, C))


def _cross_entropy(GRAD: bool) -> None:
    logits, scale = empty(N, V), empty(dtype=torch.float32)
    cross_entropy.cross_entropy_(logits, empty(N, dtype=torch.int64), scale, -1, GRAD)


def _rescale() -> None:
    scale = empty(dtype=torch.float32)
    cross_entropy._rescale_(empty(N, C), scale, scale)


def _layernorm_bwd(REBUILD_Y: bool) -> None:
    x, w, mean = empty(N, C), empty(C), empty(N, dtype=torch.float32)
    layernorm.layernorm_bwd(x, x, w, mean, mean, x, w if REBUILD_Y else None)


def _decode_linear(norm: bool, act: int = 0, out: torch.dtype = torch.bfloat16) -> None:
    ln, a = (empty(C), empty(C), EPS) if norm else None, empty(64, act) if act else None
    w, b = empty(3 * C + act, C), empty(3 * C + act)
    decode.linear(empty(64, C), w, b, empty(64, 3 * C, dtype=out), ln, a)


def _decode_attention() -> None:
    cache, angles = empty(64, H, T, C // H), empty(T, R // 2, dtype=torch.float32)
    position, scratch = empty(64, dtype=torch.int64), decode.scratch(64, H, T, C // H, "meta")
    qkv, out = empty(64, 3 * C), empty(64, C)
    decode.attention(qkv, cache, cache, position, angles, angles, out, *scratch)


def _quantise(E5M2: bool) -> None:
    dtype = torch.float8_e5m2 if E5M2 else torch.float8_e4m3fn
    pointwise.quantise(empty(N, C), empty(dtype=torch.float32), dtype)


KERNELS = {
    "attention_rotate_k": Kernel(attention._rotate_k_kernel, _block),
    "attention_delta": Kernel(attention._delta_kernel, _block, "DOC"),
    "attention_dq": Kernel(attention._dq_kernel, _block),
    **{
        f"attention_{op}_d{D}{'_dropout' * (p > 0)}": Kernel(fn, partial(_block, D, p), "DOC")
        for op, fn in (("fwd", attention._fwd_kernel), ("bwd", attention._bwd_kernel))
        for D in (64, 128)
        for p in (0.0, 0.1)
    },
    "cross_entropy": Kernel(cross_entropy._cross_entropy_kernel, _cross_entropy, "GRAD"),
    "rescale": Kernel(cross_entropy._rescale_kernel, _rescale),
    "decode_in_proj": Kernel(decode._linear_kernel, partial(_decode_linear, True, M)),
    "decode_out_proj": Kernel(decode._linear_kernel, partial(_decode_linear, False)),
    "decode_head": Kernel(decode._linear_kernel, partial(_decode_linear, True, out=torch.float32)),
    "decode_attention": Kernel(decode._attention_kernel, _decode_attention),
    "in_proj_fwd": Kernel(gemm._in_proj_fwd_kernel, _block),
    "out_proj_fwd": Kernel(gemm._out_proj_fwd_kernel, _block),
    "out_proj_fwd_dropout": Kernel(gemm._out_proj_fwd_kernel, partial(_block, p=0.1)),
    "gelu_bwd_gemm": Kernel(gemm._gelu_bwd_gemm_kernel, _block),
    "layernorm_fwd": Kernel(layernorm._layernorm_fwd_kernel, _block),
    "layernorm_bwd": Kernel(layernorm._layernorm_bwd_kernel, _layernorm_bwd, "REBUILD_Y"),
    "gelu_fwd": Kernel(pointwise._gelu_fwd_kernel, partial(_block, version="cublas")),
    "gelu_bwd": Kernel(pointwise._gelu_bwd_kernel, partial(_block, version="cublas")),
    "residual_fwd": Kernel(
        pointwise._residual_fwd_kernel, partial(_block, version="cublas"), "DROPOUT"
    ),
    "residual_bwd": Kernel(pointwise._residual_bwd_kernel, _block, "DROPOUT"),
    "quantise": Kernel(pointwise._quantise_kernel, _quantise, "E5M2", (90,)),  # sm_80 has no e4m3
}


def record(name: str, sm: int, config: dict, variant: dict) -> dict:
    """Return the arguments and options of kernel `name` as launched on `sm` with `config`."""
    kernel, launches = KERNELS[name], []

    def run(fn, *args, grid, warmup, **kwargs) -> None:
        launches.append((fn, dict(zip(fn.arg_names, args)) | kwargs))

    table = TUNING[f"sm_{sm}"] | ({name: [config]} if config else {})  # {}: no configuration
    with (
        patch.object(triton.JITFunction, "run", run),
        patch.object(launch, "capability", lambda x: sm),
        patch.dict(TUNING, {f"sm_{sm}": table}),
    ):
        kernel.call(**variant)
    return next(args for fn, args in launches if fn is kernel.fn)


def type_of(value) -> str:
    """Return Triton's type name of a non-constexpr argument."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
