"""Figures about training that LOG.md reports: `python tests/measure_training.py --what loader`.

    loader   our loader's tokens/s beside nanoGPT's way of making a batch, from the same shard
    save     how long a save holds up training: asynchronous, and waited for
    ranks    tokens/s of one process and of two, one thread each
What is compared is measured in turns, as other programs may be running; the loader in seconds of
this process's CPU, the others in seconds of the clock.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from ranks import Run  # noqa: E402

from common import checkpoint, distributed  # noqa: E402
from common.config import UserError, parse, run  # noqa: E402
from data.loader import Loader, Windows  # noqa: E402
from data.shards import HEADER_BYTES, write_shard  # noqa: E402
from model import ModelConfig, Phi  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass(frozen=True)
class Config:
    """Measure what LOG.md reports about training."""

    data: Path  # folder of token shards, for its tokenizer and for training
    what: str = "loader"  # loader, save or ranks
    rounds: int = 5  # turns


def in_turns(rounds: int, ways: dict[str, Callable]) -> dict[str, list[float]]:
    """CPU seconds of each way, in each round."""
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            times[name].append(time.process_time() - began)
    return times


def loader(c: Config, folder: Path) -> None:
    """Micro-batches of 16 x 2048 tokens from 50M tokens."""
    B, T, batches, tokens = 16, 2048, 50, 50_000_000
    drawn = np.random.default_rng(0).integers(0, 50_000, tokens)
    write_shard(folder / "train_00000.bin", drawn, 50_304, 1, "0" * 32)
    windows = Windows(folder, "train", T, 50_304, "0" * 32)
    ours = Loader(windows, B, B, 0, 0, 1, torch.device("cpu"))
    step = iter(range(10**9))

    def nanogpt() -> None:
        """As its get_batch does: a map opened for each batch, a copy for each row of x and of y."""
        data = np.memmap(folder / "train_00000.bin", np.uint16, "r", offset=HEADER_BYTES)
        rows = torch.randint(len(data) - T, (B,)).tolist()
        torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in rows])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in rows])

    def many(make: Callable) -> Callable:
        def way() -> None:
            for _ in range(batches):
                make()

        return way

    ways = {"ours": many(lambda: ours._make(next(step), 0)), "nanoGPT": many(nanogpt)}
    times = in_turns(c.rounds, ways)
    rates = {k: [batches * B * T / s / 1e6 for s in v] for k, v in times.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["nanoGPT"]))
    for name, r in rates.items():
        print(f"{name:8} {statistics.median(r):7.0f} Mtok/s ({min(r):.0f} to {max(r):.0f})")
    print(f"ratio    {ratio:7.1f} (each row's CRC-32 compared)")


def save(c: Config, folder: Path) -> None:
    """A model of 18M parameters: 220 MB with Adam's states, as in docs; one process."""
    model = Phi(ModelConfig(4096, 256, 6, 8, 448, 1792, 28))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = distributed.optimizer_state(model, optimizer)
    size = sum(t.nbytes for t in [*model.state_dict().values(), *state.values()])
    saver = checkpoint.Saver(folder / "run", 0, None, keep=1, keep_every=0)
    tokenizer, step = Tokenizer(c.data), iter(range(10**9))

    def begin() -> None:
        saver.save(next(step), model, state, tokenizer, {})

    stalls, waits = [], []
    for _ in range(c.rounds):
        began = time.perf_counter()
        begin()
        stalls.append(time.perf_counter() - began)
        if problem := saver.finish():
            raise UserError(problem)
        waits.append(time.perf_counter() - began)
    print(
        f"{size / 1e6:.0f} MB: training is held up {statistics.median(stalls):.3f} s "
        f"({min(stalls):.3f} to {max(stalls):.3f}); waiting for the disk would take "
        f"{statistics.median(waits):.3f} s ({min(waits):.3f} to {max(waits):.3f})"
    )


def ranks(c: Config, folder: Path) -> None:
    """The demo's model, 8 sequences a step, one thread a process."""
    rates = {1: [], 2: []}
    for i in range(c.rounds):
        for n in rates:
            out = folder / f"{n}-{i}"
            Run(out, ["configs/demo.toml", f"--data={c.data.resolve()}", "--device=cpu",
                "--max_steps=30", "--seqs_per_step=8", "--micro_batch=4", "--eval_interval=30",
                "--eval_seqs=1", "--log_interval=10"], n).finish()  # fmt: skip
            lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            rates[n].append(max(r["tokens_per_s"] for r in lines if "lr" in r))
    one, two = (statistics.median(r) for r in rates.values())
    ratio = statistics.median(b / a for a, b in zip(*rates.values()))
    print(f"1 process {one:,.0f} tokens/s, 2 processes {two:,.0f}: {ratio:.2f} times {rates}")


def main() -> None:
    c = parse(Config)
    torch.set_num_threads(1)
    ways = {f.__name__: f for f in (loader, save, ranks)}
    if c.what not in ways:
        raise UserError(f"what is {c.what!r}, want one of {', '.join(ways)}")
    with tempfile.TemporaryDirectory() as folder:
        ways[c.what](c, Path(folder))


if __name__ == "__main__":
    run(main)
