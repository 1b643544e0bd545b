"""Score problems similar to the training exercises and the other problems separately.

    python -m eval.similarity out/eval/a out/eval/b --report out/clean/report/problems.jsonl

Section 5 of the phi-1 paper (arXiv 2306.11644): a model that only memorised its exercises solves
problems similar to them and no others. A problem is similar at tau if data.decontaminate found a
close exercise with a match rate of at least tau. Similar problems may also be easier, so compare a
model that has not seen the exercises (the paper uses StarCoder). Intervals are 95%: Wilson's, and
Newcombe's (1998, method 10) for the difference.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, run
from common.files import read_json, read_jsonl
from eval.scores import mean, parse_folders, percent, rates


@dataclass(frozen=True)
class Config:
    """Print pass@1 on problems similar to the training exercises and on the others."""

    report: Path  # data.decontaminate's report/problems.jsonl for the same problems
    result: tuple[Path, ...] = ()  # evaluation folders; can come first, without --result
    json: bool = False  # print as JSON


def read_report(path: Path) -> dict[str, dict[str, int]]:
    """Return {task_id: {tau: number of close exercises}}. Raises UserError."""
    try:
        return {row["task_id"]: dict(row["close"]) for row in read_jsonl(path)}
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: {e!r}; want data.decontaminate's report/problems.jsonl") from None


def split(rates: dict[str, float], close: dict[str, dict[str, int]], tau: str) -> dict:
    """Return the scores on problems similar at `tau` and on the others."""
    similar = mean([rate for task_id, rate in rates.items() if close[task_id][tau]])
    other = mean([rate for task_id, rate in rates.items() if not close[task_id][tau]])
    return {"similar": similar, "other": other, "difference": difference(similar, other)}


def difference(a: dict | None, b: dict | None) -> dict | None:
    """Return score a minus score b, on disjoint problems, with Newcombe's interval."""
    if a is None or b is None:
        return None
    p, q, (p_low, p_high), (q_low, q_high) = a["pass@1"], b["pass@1"], a["ci95"], b["ci95"]
    low = p - q - math.hypot(p - p_low, q_high - q)
    high = p - q + math.hypot(p_high - p, q - q_low)
    return {"pass@1": p - q, "ci95": [low, high]}


def table(folder: Path, report: Path) -> dict:
    """Split an evaluation's score at each tau of the report. Raises UserError."""
    close, result = read_report(report), read_json(folder / "results.json") or {}
    if "protocol" not in result:
        raise UserError(f"{folder}/results.json is no evaluation's; give the --out folder of one")
    rated = rates(read_jsonl(folder / "samples.jsonl"))
    if unknown := rated.keys() - close:
        raise UserError(f"{folder}: {min(unknown)!r} is not in {report}; run data.decontaminate "
                        "with the --benchmarks that were scored")  # fmt: skip
    taus = sorted(next(iter(close.values())), key=float, reverse=True)
    return {
        "folder": str(folder),
        "model": result["config"]["checkpoint"] or result["config"]["samples"],
        "benchmark": result["benchmark"],
        "total": mean(list(rated.values())),
        "taus": {tau: split(rated, close, tau) for tau in taus},
    }


def main() -> None:
    config = parse_folders(Config, "result")
    if not config.result:
        raise UserError("give at least one folder that an evaluation wrote")
    found = [table(folder, config.report) for folder in config.result]
    if config.json:
        return print(json.dumps(found))
    for t in found:
        print(f"{t['model']} on {t['benchmark']}: pass@1 % {percent(t['total'])}")
        print("  tau  similar / not   on similar               on others                difference")
        for tau, row in t["taus"].items():
            n = [row[k]["problems"] if row[k] else 0 for k in ("similar", "other")]
            cells = [f"{percent(row[k]):24}" for k in ("similar", "other", "difference")]
            print(f"{float(tau):5.2f}  {n[0]:5} / {n[1]:5}   {' '.join(cells)}".rstrip())


if __name__ == "__main__":
    run(main)
