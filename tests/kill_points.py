"""Kill a training run at random moments until it is done, and compare it with one never killed.

    python tests/kill_points.py --data out/demo/tokens/exercises --out /tmp/kills --kills 20

The run is that of configs/demo.toml, smaller, with dropout, on two processes. Every kill is a
SIGKILL to one rank, and the others must end by themselves.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import checkpoint  # noqa: E402
from common.config import UserError, parse, run  # noqa: E402

TIMES = {"tokens_per_s", "mfu", "loader_wait_frac", "memory_gib", "seconds"}


@dataclass(frozen=True)
class Config:
    """Kill a training run at random moments, and compare it with one never killed."""

    data: Path  # folder of token shards
    out: Path  # folder for the two runs
    kills: int = 20  # times a rank is killed
    ranks: int = 2  # processes
    steps: int = 120  # of the run
    seed: int = 0  # of the moments


def curve(folder: Path) -> list[dict]:
    """What a run logged that must be repeatable: everything but times and memory."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def launch(flags: list[str], ranks: int, port: int) -> list[subprocess.Popen]:
    """Start the ranks of a run without torchrun, so that each one's process is at hand."""
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                 "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
        env = os.environ | {k: str(v) for k, v in place.items() if ranks > 1}
        processes.append(
            subprocess.Popen(
                [sys.executable, "train.py", *flags],
                cwd=ROOT,
                env=env | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def last_step(folder: Path) -> int:
    """The step that a run's status file names, 0 if there is none."""
    try:
        return json.loads((folder / "status.json").read_text())["step"]
    except (FileNotFoundError, ValueError):
        return 0


def main() -> None:
    c = parse(Config)
    shutil.rmtree(c.out, ignore_errors=True)
    shape = ["configs/demo.toml", f"--data={c.data.resolve()}", "--n_layer=2", "--width=64",
             "--n_head=2", "--mlp_width=128", "--seq_len=64", "--seqs_per_step=4",
             "--micro_batch=1", "--dropout=0.1", f"--max_steps={c.steps}", "--eval_interval=5",
             "--eval_seqs=8", "--log_interval=2", "--device=cpu", "--threads=1", "--keep=2",
             "--timeout_s=60"]  # fmt: skip
    ports, draw = iter(range(29600, 32000)), random.Random(c.seed)

    def start(name: str) -> list[subprocess.Popen]:
        flags = [*shape, f"--out={c.out / name}", "--resume"]
        return launch(flags, c.ranks, next(ports))

    began = time.perf_counter()
    for process in start("whole"):
        said, _ = process.communicate()
        if process.returncode:
            raise UserError(f"the run that is not killed failed:\n{said}")
    whole_s = time.perf_counter() - began

    began = time.perf_counter()
    while not (c.out / "whole/status.json").exists():
        time.sleep(0.01)
    killed, at, again_s = c.out / "killed", [], []
    while True:
        processes, before, died = start("killed"), last_step(killed), time.perf_counter()
        victim = draw.choice(processes)
        if len(at) < c.kills:
            wait_steps = draw.randrange(2 * max(1, c.steps // c.kills))
            while last_step(killed) <= before and all(p.poll() is None for p in processes):
                time.sleep(0.005)
            if at:
                again_s.append(time.perf_counter() - died)
            while (
                last_step(killed) < min(before + wait_steps, c.steps - 2) and victim.poll() is None
            ):
                time.sleep(0.001)
            time.sleep(draw.random() * 0.1)
            at.append(last_step(killed))
            victim.send_signal(signal.SIGKILL)
        said = [process.communicate()[0] for process in processes]
        status = [process.returncode for process in processes]
        if not any(status):
            break
        print(
            f"killed rank {processes.index(victim)} at step {at[-1]}: statuses {status}", flush=True
        )
        if len(at) > c.kills or set(status) - {-signal.SIGKILL, 0, 2}:
            raise UserError(f"ended by itself with {status}:\n" + "\n".join(said))
    same = curve(c.out / "whole") == curve(killed)
    hashes = [
        checkpoint.checksum(checkpoint.find(c.out / n, newest=True)) for n in ("whole", "killed")
    ]
    again_s.sort()
    print(
        f"{len(at)} kills at steps {at}: curves {'equal' if same else 'DIFFER'}, weights {hashes}; "
        f"start to first new log line {again_s[len(again_s) // 2]:.1f} s (median), "
        f"{again_s[-1]:.1f} s at most; whole run {whole_s:.1f} s"
    )
    if not same or hashes[0] != hashes[1]:
        raise UserError("the killed run is not the one that was never killed")


if __name__ == "__main__":
    run(main)
