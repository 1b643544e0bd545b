"""Launch configurations, read once from kernels/tuning.json.

    {"sm_80": {kernel: [candidate, ...]}, "sm_90": ..., "measured": {"sm_80": {"device", "gemm"}}}

A launch uses the first candidate in its device's table: constexprs, `num_warps`, `num_stages`. Add
candidates there; `python -m bench.resources` checks that they fit the hardware. `bench.tune` writes
a new file with the fastest candidate first and the winning version of each GEMM. Set NANOPHI_TUNING
to read another file.
"""

import json
import os
import re
from pathlib import Path

import torch

TUNING_FILE = Path(os.environ.get("NANOPHI_TUNING", Path(__file__).with_name("tuning.json")))
TUNING: dict = json.loads(TUNING_FILE.read_text())
LAUNCHED: dict[str, None] = {}  # kernels launched so far, in order, for bench.tune


def capability(x: torch.Tensor) -> int:
    """Return the table for x's device: 90 on Hopper or later, else 80 (interpreter included)."""
    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9 else 80


def check(name: str, t: torch.Tensor, x: torch.Tensor, shape: tuple, dtype=None) -> None:
    """Raise ValueError unless t is contiguous, on x's device, of `shape`, `dtype` (x's or fp32)."""
    dtypes = (dtype,) if dtype else (x.dtype, torch.float32)
    if t.shape != shape or not t.is_contiguous() or t.dtype not in dtypes or t.device != x.device:
        got = f"{t.dtype} {tuple(t.shape)}, strides {t.stride()}, on {t.device}"
        raise ValueError(f"{name} is {got}, want contiguous {dtypes} {tuple(shape)} on {x.device}")


def config(kernel: str, x: torch.Tensor) -> dict:
    """Return a copy of `kernel`'s launch options for x's device; KeyError if there are none."""
    LAUNCHED[kernel], sm = None, f"sm_{capability(x)}"
    if not TUNING.get(sm, {}).get(kernel):
        raise KeyError(f"{TUNING_FILE} has no configuration for {kernel} on {sm}; add one")
    return dict(TUNING[sm][kernel][0])


def measured(sm: int) -> dict:
    """Return bench.tune's result for this capability: {"device", "gemm": {op: version}}."""
    return TUNING.get("measured", {}).get(f"sm_{sm}", {"device": "", "gemm": {}})


def write_tuning() -> None:
    """Write TUNING to TUNING_FILE, one candidate per line."""
    tables = {
        key: {n: [json.dumps(c) for c in v] if sm else v for n, v in sorted(table.items())}
        for key, table in sorted(TUNING.items())
        for sm in [key.startswith("sm_")]
    }
    text = json.dumps(tables, indent=1)
    TUNING_FILE.write_text(re.sub(r'"({.*})"', lambda m: m[1].replace(r"\"", '"'), text) + "\n")
