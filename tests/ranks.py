"""Start the ranks of a training run as processes that a test can kill, stop and signal.

They fork from a server that has already imported torch and train.py, so a start takes 0.1 s. A test
can pass a function to call in each rank before training, to plant a fault.
"""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest

from common import checkpoint

TIMES = {"tokens_per_s", "mfu", "loader_wait_frac", "memory_gib", "seconds"}
ROOT = Path(__file__).parents[1]
server = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the fork server; it looks for preloaded modules on PYTHONPATH, not on sys.path."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(ROOT))
        server.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp"])
        forkserver.ensure_running()


class Run:
    """The ranks of one run, and their output."""

    def __init__(self, out: Path, flags: list, ranks: int = 1, plant: Callable | None = None):
        self.out, self.said_in = out, [out.with_name(f"{out.name}.{r}.log") for r in range(ranks)]
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        self.processes = []
        start_server()
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port,
                     "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost"}  # fmt: skip
            argv = ["train.py", *map(str, flags), f"--out={out}", "--threads=1"]
            args = (place if ranks > 1 else {}, argv, self.said_in[rank], plant)
            self.processes.append(server.Process(target=_rank, args=args, daemon=True))
        for process in self.processes:
            process.start()

    def wait_for(self, step: int) -> None:
        """Wait until the run's status file reports step `step`; fail if a rank ends first."""
        while status(self.out).get("step", -1) < step:
            assert all(p.is_alive() for p in self.processes), self.said()
            time.sleep(0.002)

    def finish(self, *statuses: int) -> str:
        """Wait for all ranks, check their exit statuses (default: all 0), return their output."""
        for process in self.processes:
            process.join(120)
            if process.is_alive():
                self.end()
                pytest.fail(f"a rank did not end: {self.said()}")
        got = [p.exitcode for p in self.processes]
        assert got == list(statuses or [0] * len(got)), self.said()
        return self.said()

    def end(self) -> None:
        for process in self.processes:
            process.kill()

    def said(self) -> str:
        return "\n".join(f.read_text() for f in self.said_in if f.exists())


def _rank(place: dict, argv: list[str], said_in: Path, plant: Callable | None) -> None:
    said = os.open(said_in, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.chdir(ROOT)
    os.environ.update({k: str(v) for k, v in place.items()})
    sys.argv = argv
    import train
    from common.config import run

    if plant:
        plant(place.get("RANK", 0))
    run(train.main)


def status(run: Path) -> dict:
    """Return a run's status.json, or {} if absent."""
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def events(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict]:
    """Return the reproducible part of a run's metrics: all but times and memory."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def back_to(run, step, copy):
    """Copy a finished run and delete the checkpoints after `step`, but not the log lines."""
    shutil.copytree(run, copy)
    for later in checkpoint.steps(copy):
        if later > step:
            shutil.rmtree(copy / f"checkpoints/step-{later:08d}")
    return copy
