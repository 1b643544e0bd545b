"""What a run tells: metrics.jsonl, its progress line, and what a result can be traced by."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

# Dense bf16/fp16 peak in FLOP/s (NVIDIA's data sheets), by a word of the device's name.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


class RunLog:
    """metrics.jsonl, one JSON object a line, and the progress line; silent on ranks but 0."""

    def __init__(self, out: Path, step: int, rank: int):
        """Open `out`/metrics.jsonl to go on from `step`: what was logged after it is dropped."""
        self.rank, self.path = rank, out / "metrics.jsonl"
        self.terminal = sys.stdout.isatty()
        if rank:
            return
        records = self.read() if step else []
        kept = [r for r in records if r["step"] <= step - ("val_loss" in r)]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))

    def read(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines() if line[-1:] == "}"]

    def best(self) -> tuple[float, int]:
        """(validation loss, step) of the best evaluation so far."""
        records = [] if self.rank else self.read()
        return min(
            ((r["val_loss"], r["step"]) for r in records if "val_loss" in r), default=(math.inf, 0)
        )

    def write(self, record: dict) -> None:
        if self.rank == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")

    def line(self, text: str, keep: bool = False) -> None:
        """Show `text`: on a terminal in place of the line before, elsewhere only if `keep`."""
        if self.rank == 0 and (self.terminal or keep):
            end = "\n" if keep else ""
            print(("\r\x1b[K" if self.terminal else "") + text, end=end, flush=True)


def peak_flops(device: torch.device) -> tuple[float, str]:
    """The roof for MFU in FLOP/s and what it is: a GPU's bf16 peak, else a matmul timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, peak in PEAK_FLOPS.items():
            if word in name:
                return peak, f"{name}, {peak / 1e12:.0f} TFLOP/s"
    n, best_s = 1024, math.inf
    a, out = torch.randn(n, n, device=device), torch.empty(n, n, device=device)
    for _ in range(50):  # the best of many, as other programs may be running
        began = time.perf_counter()
        torch.mm(a, a, out=out)[0, 0].item()
        best_s = min(best_s, time.perf_counter() - began)
    rate = 2 * n**3 / best_s
    return rate, f"a {n} x {n} fp32 matmul measured here, {rate / 1e9:.0f} GFLOP/s"


def environment() -> dict:
    """What a result needs to be traced: commit, versions, machine."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        here = Path(__file__).parent
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(sys.argv),
    }
