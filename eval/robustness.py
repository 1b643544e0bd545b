"""Measure how much a score drops when the prompts are rewritten.

    python -m eval.robustness --problems HumanEval.jsonl.gz --checkpoint out/run --out out/robust

The phi-1 authors list sensitivity to prompt style as a limitation. Each perturbation in
eval/perturb.py keeps the task; the self-check also runs the perturbed references. Rewritten prose
cannot be checked by running it: read problems.jsonl. The drop pairs each problem with itself, over
the problems that a perturbation applies to. --out holds results.json, problems.jsonl (all prompts
as asked) and samples.jsonl.
"""

import json
import math
from dataclasses import dataclass, replace

from common.config import UserError, parse, run
from data.base.benchmarks import read_problems
from eval.harness import BODY, Evaluation, measure, writing
from eval.perturb import PERTURBATIONS
from eval.scores import Z95, mean, rates
from sandbox.self_check import PATIENCE, check, run_all, slowdown


@dataclass(frozen=True)
class Config(Evaluation):
    """Score a checkpoint on problems, as they are and with perturbed prompts."""

    only: tuple[str, ...] = ()  # perturbation to try, none = all; repeatable

    def __post_init__(self):
        super().__post_init__()
        for name in self.only:
            if name not in PERTURBATIONS:
                raise UserError(f"--only {name}: want one of {', '.join(PERTURBATIONS)}")


def paired(before: list[float], after: list[float]) -> dict:
    """Return the paired drop from `before` to `after`, with its 95 % interval.

    Bonett and Price 2012: Wald's interval after adding one pair that falls by 1 and one that rises.
    """
    n = len(before) + 2
    drops = [a - b for a, b in zip(before, after, strict=True)]
    middle = math.fsum(drops) / n
    spread = Z95 * math.sqrt((math.fsum(d * d for d in [*drops, 1, -1]) / n - middle**2) / n)
    return {
        "problems": len(drops),
        "before": math.fsum(before) / len(before),
        "after": math.fsum(after) / len(after),
        "drop": math.fsum(drops) / len(drops),
        "ci95": [max(-1.0, middle - spread), min(1.0, middle + spread)],
    }


def robustness(config: Config) -> tuple[dict, list[dict], list[dict]]:
    """Return (results.json, problems asked, samples). Raises UserError."""
    problems = read_problems(config.problems)[: config.limit or None]
    names = config.only or PERTURBATIONS
    changed = [(PERTURBATIONS[name](p), name) for name in names for p in problems]
    changed = [{**p, "task_id": f"{p['task_id']}@{name}"} for p, name in changed if p]
    limits = config.limits()
    wait_s = PATIENCE * config.timeout_s * slowdown(**limits)
    checks = [check(p, p["canonical_solution"], wait_s) for p in changed]
    verdicts = run_all(checks, progress="references", **limits)
    sound = [p for p, v in zip(changed, verdicts) if v.status == "passed"]
    asked = [*problems, *sound]
    result, samples = measure(replace(config, limit=0), "robustness", asked, BODY)
    found = rates(samples)
    before, rows = {p["task_id"]: found[p["task_id"]] for p in problems}, {}
    for name in names:
        of = f"@{name}"
        after = {t.removesuffix(of): rate for t, rate in found.items() if t.endswith(of)}
        pairs = [before[t] for t in after], [*after.values()]
        rows[name] = paired(*pairs) if after else {"problems": 0}
    # Drop scores over all prompts, perturbed ones included: they are not the benchmark's score.
    whole = ("pass@", "ci95", "intervals", "counts")
    result = {k: v for k, v in result.items() if not k.startswith(whole)}
    result |= {"references_failed": len(changed) - len(sound), "perturbations": rows}
    return result | mean([*before.values()]), asked, samples


def main() -> None:
    config = parse(Config)
    with writing(config.out) as write:
        result, asked, samples = robustness(config)
        write(result, problems=asked, samples=samples)
    if config.json:
        return print(json.dumps(result))
    print(f"{result['problems']} unperturbed problems: pass@1 {100 * result['pass@1']:.1f} %")
    print("perturbation       pairs  before   after    drop (95 % interval)")
    for name, row in result["perturbations"].items():
        if not row["problems"]:
            continue
        values = [row["before"], row["after"], row["drop"], *row["ci95"]]
        before, after, drop, low, high = (f"{100 * x:5.1f}" for x in values)
        print(f"{name:17} {row['problems']:6}  {before}   {after}   {drop} ({low} to {high})")
    if failed := result["references_failed"]:
        print(f"{failed} perturbed problems left out: their references fail")
    print(result["limits"])


if __name__ == "__main__":
    run(main)
