"""Launch configurations: kernels/tuning.json, read once.

    {"sm_80": {kernel: [candidate, ...]}, "sm_90": ..., "measured": {"sm_80": {"device", "gemm"}}}

A launch takes the first candidate of its device's table: constexprs, `num_warps`, `num_stages`. To
try another one, add it there; `python -m bench.resources` says whether it fits the hardware, and
`bench.tune` writes a file of its own, with the fastest candidate first and the version of each GEMM
that won. The environment's NANOPHI_TUNING names another file to read.
"""

import json
import os
import re
from pathlib import Path

import torch

TUNING_FILE = Path(os.environ.get("NANOPHI_TUNING", Path(__file__).with_name("tuning.json")))
TUNING: dict = json.loads(TUNING_FILE.read_text())
LAUNCHED: dict[str, None] = {}  # names of the kernels launched so far, in order: bench.tune asks


def capability(x: torch.Tensor) -> int:
    """Return whose table serves x: 90 on Hopper and later, else 80 (in the interpreter too)."""
    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9 else 80


def check(name: str, t: torch.Tensor, x: torch.Tensor, shape: tuple, dtype=None) -> None:
    """Raise ValueError unless t is contiguous, beside x, of `shape` and `dtype`: x's, or fp32."""
    dtypes = (dtype,) if dtype else (x.dtype, torch.float32)
    if t.shape != shape or not t.is_contiguous() or t.dtype not in dtypes or t.device != x.device:
        got = f"{t.dtype} {tuple(t.shape)}, strides {t.stride()}, on {t.device}"
        raise ValueError(f"{name} is {got}, want contiguous {dtypes} {shape} on {x.device}")


def config(kernel: str, x: torch.Tensor) -> dict:
    """Return a copy of the launch configuration of `kernel` on the device of x. Raises KeyError."""
    LAUNCHED[kernel], sm = None, f"sm_{capability(x)}"
    if not TUNING.get(sm, {}).get(kernel):
        raise KeyError(f"{TUNING_FILE} has no configuration of {kernel} for {sm}; add one there")
    return dict(TUNING[sm][kernel][0])


def measured(sm: int) -> dict:
    """Return what bench.tune found on this capability: the device, and each op's GEMM version."""
    return TUNING.get("measured", {}).get(f"sm_{sm}", {"device": "no device yet", "gemm": {}})


def write_tuning() -> None:
    """Write TUNING to tuning.json, a candidate a line."""
    tables = {
        key: {n: [json.dumps(c) for c in v] if sm else v for n, v in sorted(table.items())}
        for key, table in sorted(TUNING.items())
        for sm in [key.startswith("sm_")]
    }
    text = json.dumps(tables, indent=1)
    TUNING_FILE.write_text(re.sub(r'"({.*})"', lambda m: m[1].replace(r"\"", '"'), text) + "\n")
