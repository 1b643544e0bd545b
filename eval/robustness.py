"""What a score loses when the prompts are written in another way.

    python -m eval.robustness --problems HumanEval.jsonl.gz --checkpoint out/run --out out/robust

The authors of phi-1 name as a limit that it is sensitive to style and to errors in a prompt. Each
perturbation of eval/perturb.py keeps what is asked for. Where it touches code, that is checked: a
problem whose reference fails under the perturbed prompt and test is left out, and counted. What it
does to prose cannot be run: read problems.jsonl.

The drop is over the problems that a perturbation applies to, each paired with itself, with the
interval for paired proportions of Bonett and Price (2012).

The folder --out has results.json, problems.jsonl (all prompts as asked) and samples.jsonl.
"""

import contextlib
import json
import math
import sys
from dataclasses import dataclass, replace

from common.config import UserError, parse, run
from common.files import new_folder, write_json, write_jsonl
from data.base.benchmarks import read_problems
from eval.harness import BODY, Evaluation, measure
from eval.perturb import PERTURBATIONS
from eval.scores import Z95, mean
from sandbox.self_check import PATIENCE, check, remembered, run_all, slowdown


@dataclass(frozen=True)
class Config(Evaluation):
    """Score a checkpoint on problems, and on the same problems with perturbed prompts."""

    only: tuple[str, ...] = ()  # perturbation to try, all if none is named; several times

    def __post_init__(self):
        super().__post_init__()
        if self.samples:
            raise UserError("--samples were made for other prompts; give --checkpoint")
        for name in self.only:
            if name not in PERTURBATIONS:
                raise UserError(f"--only {name}: want one of {', '.join(PERTURBATIONS)}")


def variants(config: Config, problems: list[dict]) -> tuple[list[dict], dict[str, dict]]:
    """Return the perturbed problems, as TASK_ID@PERTURBATION, whose references pass, and for each
    perturbation {"does_not_apply", "reference_fails"}, how many are left out."""
    limits = config.limits()
    made, left_out = [], {}
    for name in config.only or PERTURBATIONS:
        new = [(p["task_id"], PERTURBATIONS[name](p)) for p in problems]
        made += [{**p, "task_id": f"{task_id}@{name}"} for task_id, p in new if p]
        left_out[name] = {"does_not_apply": sum(not p for _, p in new), "reference_fails": 0}

    def references() -> dict[str, bool]:
        timeout_s = PATIENCE * config.timeout_s * slowdown(**limits)
        checks = [check(p, p["canonical_solution"], timeout_s) for p in made]
        verdicts = run_all(checks, progress="references", **limits)
        return {p["task_id"]: v.status == "passed" for p, v in zip(made, verdicts)}

    passed = remembered(
        *(config.self_check, "perturbed references", made, references),
        **{**limits, "timeout_s": config.timeout_s},
    )
    for p in made:
        if not passed[p["task_id"]]:
            left_out[p["task_id"].rpartition("@")[2]]["reference_fails"] += 1
    return [p for p in made if passed[p["task_id"]]], left_out


def paired(before: list[float], after: list[float]) -> dict:
    """Compare `before` with `after`, pair by pair: the drop, with a 95 % interval.

    Bonett and Price 2012: Wald's interval with one pair more that fell by 1 and one that rose.
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
        "lost": sum(d > 0 for d in drops),
        "gained": sum(d < 0 for d in drops),
    }


def robustness(config: Config) -> tuple[dict, list[dict], list[dict]]:
    """Measure (results.json, problems asked, samples). Raises UserError."""
    problems = read_problems(config.problems)[: config.limit or None]
    perturbed, left_out = variants(config, problems)
    asked = [*problems, *perturbed]
    result, samples, _ = measure(replace(config, limit=0), "robustness", asked, BODY)
    passed: dict[str, list[bool]] = {}
    for sample in samples:
        passed.setdefault(sample["task_id"], []).append(sample["passed"])
    rates = {task_id: sum(p) / len(p) for task_id, p in passed.items()}
    before = {p["task_id"]: rates[p["task_id"]] for p in problems}
    table = {}
    for name, counts in left_out.items():
        after = {t.rpartition("@")[0]: r for t, r in rates.items() if t.endswith(f"@{name}")}
        pairs = [before[t] for t in after], list(after.values())
        table[name] = {**counts, **(paired(*pairs) if after else {"problems": 0})}
    # What is over all prompts, perturbed ones among them, would be read as the benchmark's.
    whole = ("pass@", "ci95", "intervals", "counts")
    result = {k: v for k, v in result.items() if not k.startswith(whole)}
    result |= {**mean(list(before.values())), "perturbations": table}
    return result, asked, samples


def main() -> None:
    config = parse(Config)
    with new_folder(config.out) if config.out else contextlib.nullcontext() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            result, asked, samples = robustness(config)
        if folder:
            write_json(folder / "results.json", result)
            write_jsonl(folder / "problems.jsonl", asked, ensure_ascii=True)
            write_jsonl(folder / "samples.jsonl", samples, ensure_ascii=True)
    if config.json:
        return print(json.dumps(result))
    print(f"{result['problems']} problems as they are: pass@1 {100 * result['pass@1']:.1f} %")
    print("perturbed by       pairs  before   after    drop (95 % interval)   lost gained left out")
    for name, row in result["perturbations"].items():
        left_out = row["does_not_apply"] + row["reference_fails"]
        if not row["problems"]:
            print(f"{name:17} {0:6}  applies to none")
            continue
        low, high = (100 * x for x in row["ci95"])
        numbers = [100 * row[k] for k in ("before", "after", "drop")]
        print(
            f"{name:17} {row['problems']:6}  {numbers[0]:5.1f}   {numbers[1]:5.1f}   "
            f"{numbers[2]:5.1f} ({low:5.1f} to {high:5.1f})  {row['lost']:7} {row['gained']:6} "
            f"{left_out:8}"
        )
    failing = {n: r["reference_fails"] for n, r in result["perturbations"].items()}
    if any(failing.values()):
        print(f"left out as the reference fails: { {n: k for n, k in failing.items() if k} }")
    print(result["limits"])


if __name__ == "__main__":
    run(main)
