"""All that needs a GPU in one command: the tests, the benchmarks, and a short table last.

    make gpu                       python3 -m kernels.gpu --out=out/gpu

Each part is a process of its own, with a share of the time left, so that one that fails or hangs
costs no other its turn. What they print lies in `out`, and all numbers in `out`/gpu.json, which is
what belongs under records/. Uses whichever Python runs it; installs and downloads nothing.
"""

import csv
import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from config import UserError, parse, run

ROOT = Path(__file__).parents[1]
# what has tests for a GPU
TESTED = ["attention", "block", "mlp", "layernorm", "cross_entropy", "plan", "train"]


@dataclass(frozen=True)
class Config:
    """Run GPU tests, kernel benchmarks and step benchmarks on this GPU."""

    out: Path = Path("out/gpu")  # folder for gpu.json and what each part prints
    minutes: float = 8.5  # for all of it


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]  # after the interpreter
    minutes: float  # at most
    rc: int | None = None  # exit status; None if it was stopped
    seconds: float = 0.0


def parts(out: Path) -> list[Part]:
    """In the order of worth: later ones go without if time runs out."""
    steps = []
    for model in ("phi1", "phi1_small"):
        for impl in ("ours", "torch", "transformers"):
            command = ["bench.py", f"configs/{model}.toml", f"--impl={impl}", "--json"]
            steps.append(Part(f"{model} {impl}", command, 2))
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [f"tests/test_{k}.py" for k in TESTED]
    ops = ["-m", "kernels.bench", f"--csv={out / 'kernels.csv'}"]
    decode = ["-m", "eval.decode_bench", "configs/phi1.toml", "--batch=1", "--batch=64", "--json"]
    return [
        Part("tests", [*pytest, "-m", "gpu", *files], 2),
        *steps[:3],
        Part("kernels", ops, 3),
        Part("decode", [*decode, "--new_tokens=256", "--rounds=3"], 1.5),
        *steps[3:],
        Part("all tests", [*pytest, *files[:-1], "tests/test_decode.py"], 2),  # on the GPU here
    ]


def run_part(part: Part, out: Path, seconds: float) -> Part:
    """Run it for at most `seconds`; what it prints goes to files, its end here when it fails."""
    stem, began = out / part.name.replace(" ", "_"), time.monotonic()
    print(f"{part.name}: {' '.join(part.command)}", flush=True)
    with open(f"{stem}.out", "w") as stdout, open(f"{stem}.err", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, stdout=stdout, stderr=stderr
        )
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            rc = None
    done = replace(part, rc=rc, seconds=round(time.monotonic() - began, 1))
    print(f"  {'stopped' if rc is None else f'exit {rc}'} after {done.seconds} s", flush=True)
    if rc != 0:
        said = "".join(Path(f"{stem}.{k}").read_text(errors="replace") for k in ("out", "err"))
        print("    " + "\n    ".join(said.splitlines()[-15:]), flush=True)
    return done


def collect(out: Path, done: list[Part]) -> dict:
    """Everything that was measured, as one JSON object."""
    record = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "parts": {p.name: {"exit": p.rc, "seconds": p.seconds} for p in done},
        "kernels": [],
        "steps": {},
    }
    if (out / "kernels.csv").exists():
        with open(out / "kernels.csv", newline="") as f:
            record["kernels"] = list(csv.DictReader(f))
    for part in done:
        if "--json" in part.command and part.rc == 0:
            text = (out / f"{part.name.replace(' ', '_')}.out").read_text()
            found = json.loads(text[text.index("{") :])
            if "results" in found:
                record["steps"][part.name] = found
            else:
                record[part.name] = found["rows"]
    tests = out / "tests.out"
    record["tests"] = tests.read_text().strip().splitlines()[-1:] if tests.exists() else []
    return record


def table(record: dict) -> str:
    """The record in some thirty lines: ours, the fastest peer, and the ratio."""
    lines = [f"{record['device']}, torch {record['versions']['torch']}, {record['date']}"]
    lines += [f"tests     {line}" for line in record["tests"]]
    rows = [r for r in record["kernels"] if r["ok"] == "True"]
    wrong = [r for r in record["kernels"] if r["ok"] != "True" and not r["note"]]
    for op, phase in dict.fromkeys((r["op"], r["phase"]) for r in rows):
        same = [r for r in rows if (r["op"], r["phase"]) == (op, phase)]
        ours, peers = (
            sorted((r for r in same if r["provider"].startswith("ours") == mine), key=_ms)
            for mine in (True, False)
        )
        if ours and peers:
            lines.append(
                f"{op:<14}{phase:<8}{_ms(ours[0]):>9.3f} ms {float(ours[0]['roof_frac']):>7.1%} of "
                f"the roof {_ms(peers[0]) / _ms(ours[0]):>6.2f}x {peers[0]['provider']}"
            )
    lines += [f"WRONG     {r['op']} {r['provider']}: error {r['error']}" for r in wrong]
    results = {name: step["results"][0] for name, step in record["steps"].items()}
    for name, r in results.items():
        if r["note"]:
            lines.append(f"{name:<24}none: {r['note']}")
            continue
        ours = results.get(f"{name.split()[0]} ours", {}).get("tokens_per_s")
        ratio = f"{ours / r['tokens_per_s']:>7.2f}x" if ours else f"{'-':>8}"
        lines.append(
            f"{name:<24}{r['tokens_per_s']:>10,.0f} tokens/s {r['mfu']:>7.1%} MFU "
            f"{r['peak_gib']:>6.1f} GiB, ours is{ratio}"
        )
    for r in record.get("decode", []):
        share = f", {r['roof_frac']:.1%} of a copy's bandwidth" if "roof_frac" in r else ""
        which = f"decode, batch {r['batch']:<4}{r['impl']:<24}"
        lines.append(f"{which}{r['tokens_per_s']:>10,.0f} tokens/s{share}")
    failed = [n for n, p in record["parts"].items() if p["exit"] != 0]
    return "\n".join([*lines, f"failed or stopped: {', '.join(failed)}"][: None if failed else -1])


def _ms(row: dict) -> float:
    return float(row["p50_ms"])


def run_all(todo: list[Part], out: Path, minutes: float) -> list[Part]:
    """Run the parts until the time is over; gpu.json is written after each."""
    end, done = time.monotonic() + 60 * minutes, []
    for part in todo:
        left = end - time.monotonic()
        if left < 20:
            print(f"{part.name}: no time left", flush=True)
            continue
        done.append(run_part(part, out, min(left, 60 * part.minutes)))
        (out / "gpu.json").write_text(json.dumps(collect(out, done), indent=1) + "\n")
    return done


def main() -> None:
    config = parse(Config)
    if not torch.cuda.is_available():
        raise UserError("make gpu measures a GPU, and there is no CUDA device here")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "kernels.csv").unlink(missing_ok=True)
    os.environ.pop("TRITON_INTERPRET", None)
    done = run_all(parts(config.out.resolve()), config.out, config.minutes)
    print("\n" + table(collect(config.out, done)))
    sys.exit(any(p.rc != 0 for p in done))


if __name__ == "__main__":
    run(main)
