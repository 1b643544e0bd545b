"""Add wrong variants of the reference to problems, to test whether a model can tell them apart.

    python -m eval.mutants --problems HumanEval.jsonl.gz --out out/mutants/humaneval.jsonl
    python -m eval.bits --problems out/mutants/humaneval.jsonl --checkpoint out/run

A mutant is the reference with one operator, name, constant or branch replaced (see
data/synthetic/damage.py). Nothing is deleted, because shorter code is more likely. Every mutant
failed a test when run; timeouts are dropped. Problems with a failing reference get no mutants.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, require, run
from common.files import write_jsonl
from data.base.benchmarks import read_rows
from data.synthetic.damage import damages
from eval import humaneval, mbpp
from sandbox.execute import choose
from sandbox.self_check import PATIENCE, check, run_all, slowdown

TRIED = 3  # candidates to run per mutant wanted


@dataclass(frozen=True)
class Config:
    """Write problems in HumanEval's format, each with `mutants`: solutions that fail the tests."""

    problems: Path  # file in HumanEval's format or MBPP's (test split, docstring prompts)
    out: Path  # JSON lines file to write
    each: int = 3  # maximum mutants per problem
    limit: int = 0  # use only the first LIMIT problems, 0 = all
    sandbox: str = "auto"  # tier: A, B, C or auto; see eval.humaneval
    timeout_s: float = 1.0  # CPU time limit of a mutant, scaled to this machine
    workers: int = 0  # parallel programs, 0 = one per CPU core

    def __post_init__(self):
        for name, low in (("each", 1), ("limit", 0), ("workers", 0)):
            require(self, name, getattr(self, name) >= low, f"at least {low}")
        require(self, "timeout_s", self.timeout_s > 0, "more than 0")


def read(path: Path) -> list[dict]:
    """Read problems in HumanEval's format or MBPP's (test split, docstring). Raises UserError."""
    rows = read_rows(path)
    of_mbpp = any("assertion" in row or "test_list" in row for row in rows)
    return (mbpp if of_mbpp else humaneval).convert(path, rows)[1]


def mutants(problem: dict) -> list[str]:
    """List the problem's solutions that differ from its reference by one replacement."""
    prompt = problem["prompt"].encode("ascii", "replace").decode()  # same length; ast counts bytes
    source = prompt + problem["canonical_solution"]
    try:
        found = [source[:i] + new + source[j:] for i, j, new in damages(source)
                 if new.strip() and source[i:j].strip() and i >= len(prompt)]  # fmt: skip
    except SyntaxError as e:
        raise UserError(f"{problem['task_id']}: the reference does not parse: {e}") from None
    return [text[len(prompt) :] for text in dict.fromkeys(found)]


def main() -> None:
    config = parse(Config)
    problems = read(config.problems)[: config.limit or None]
    workers = config.workers or len(os.sched_getaffinity(0))
    limits = {"workers": workers, "tier": choose(config.sandbox)}
    limit_s = config.timeout_s * slowdown(**limits)
    tried = []
    for p in problems:
        found, rng = mutants(p), random.Random(p["task_id"])
        tried.append(rng.sample(found, min(len(found), TRIED * config.each)))
    checks = [check(p, p["canonical_solution"], PATIENCE * limit_s) for p in problems]
    checks += [check(p, m, limit_s) for p, some in zip(problems, tried) for m in some]
    verdicts = iter(run_all(checks, progress="mutants", **limits))
    sound = [next(verdicts).status == "passed" for _ in problems]
    for p, good, some in zip(problems, sound, tried):
        wrong = [m for m in some if next(verdicts).status == "failed"]
        p["mutants"] = wrong[: config.each] if good else []
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(config.out, problems)
    count = sum(len(p["mutants"]) for p in problems)
    without = sum(not p["mutants"] for p in problems)
    print(f"{config.out}: {count:,} mutants of {len(problems)} problems, {without} have none")


if __name__ == "__main__":
    run(main)
