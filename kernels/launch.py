"""What a kernel tells the outside about itself: the table behind `python -m bench.resources`.

Each kernel module exports `KERNELS`, a list of `Kernel`. `configs` are candidates written by hand,
the default first. `kernels/tuning.json` is written by programs only: `bench.resources --prune`
keeps the candidates that fit the hardware; `bench.tune` writes another, the fastest first, with
the version of each GEMM that won. A launch takes the first entry for its device; the environment's
NANOPHI_TUNING names another file to read.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TUNING_FILE = Path(os.environ.get("NANOPHI_TUNING", Path(__file__).with_name("tuning.json")))
TUNING: dict = json.loads(TUNING_FILE.read_text())


@dataclass(frozen=True)
class Kernel:
    """One @triton.jit function with its launch configurations at a representative shape."""

    name: str
    fn: Any  # the triton.JITFunction (not an Autotuner)
    # {80: [{"BLOCK_M": 128, ..., "num_warps": 8, "num_stages": 3}, ...], 90: [...]}: constexprs and
    # launch options together, default first. A key in capitals that `fn` does not take is for the
    # launcher (a grid size).
    configs: dict[int, list[dict]]
    # type of every argument that is not a constexpr, in any order; T is the working dtype:
    # {"x_ptr": "*T", "lse_ptr": "*fp32", "n_rows": "i32", "eps": "fp32"}. Pointers and integers are
    # compiled as multiples of 16, which they are at phi-1's shapes.
    signature: dict[str, str]
    constexprs: dict[str, Any]  # the constexprs that are not in configs, at phi-1's shape
    tensor_core: bool  # must contain mma / wgmma instructions
    variants: tuple[dict, ...] = ({},)  # further constexprs; a configuration must fit in each
    # {"x_ptr": "T[{BLOCK_M},{BLOCK_K}]"}: arguments that are TMA descriptors of such a block in a
    # configuration with TMA=True, and the pointers of the signature in one without
    descriptors: dict[str, str] = field(default_factory=dict)


LAUNCHED: dict[str, Kernel] = {}  # each that was launched, by name: bench.tune asks


def types(pointers: str, integers: str = "", **others: str) -> dict[str, str]:
    """A signature: names of working-dtype pointers, of 32-bit integers, and the rest as given."""
    names = dict.fromkeys(pointers.split(), "*T") | dict.fromkeys(integers.split(), "i32")
    return names | others


def capability(x: torch.Tensor) -> int:
    """Which tables `x` is served from: 90 on Hopper and later, else 80 (so too the interpreter)."""
    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9 else 80


def config(kernel: Kernel, x: torch.Tensor) -> dict:
    """The launch configuration of `kernel` for the device of `x`."""
    LAUNCHED[kernel.name] = kernel
    sm = capability(x)
    return (TUNING.get(f"sm_{sm}", {}).get(kernel.name) or kernel.configs[sm])[0]


def measured(sm: int) -> dict:
    """What bench.tune found on a device of this capability: its name, and op -> GEMM version."""
    return TUNING.get("measured", {}).get(f"sm_{sm}", {"device": "no device yet", "gemm": {}})


def write_tuning() -> None:
    """TUNING as it is now to tuning.json, one configuration a line."""
    tables = {
        key: {n: [json.dumps(c) for c in v] if sm else v for n, v in sorted(table.items())}
        for key, table in sorted(TUNING.items())
        for sm in [key.startswith("sm_")]
    }
    text = json.dumps(tables, indent=1)
    TUNING_FILE.write_text(re.sub(r'"({.*})"', lambda m: m[1].replace(r"\"", '"'), text) + "\n")
