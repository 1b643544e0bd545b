"""Compute pass@k and how sure it is."""

import itertools
import math
import sys
from collections.abc import Iterable

from common.config import parse

KS = (1, 10, 100)  # as reported by Chen et al. 2021, arXiv 2107.03374
Z95 = 1.959964  # 97.5 % point of the normal distribution


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Estimate pass@k without bias from `passed` of `samples` independent samples.

    1 - C(samples - passed, k) / C(samples, k), as a product that neither overflows nor cancels
    (Chen et al. 2021, section 2.1).
    """
    assert 1 <= k <= samples
    assert 0 <= passed <= samples
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(samples - passed + 1, samples + 1))


def wilson(frac: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a mean `frac` of n values."""
    centre = frac + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(frac * (1 - frac) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def score(passed: dict[str, list[bool]]) -> dict:
    """Compute pass@k for k in KS, up to the fewest samples a problem has, from {task_id: passed?}.

    "intervals" has the Wilson interval of each over the problems, and "ci95" that of pass@1. With
    several samples a problem it is too wide, never too narrow: an estimate in [0, 1] varies at most
    as a coin of the same mean.
    """
    n, fewest, rates = len(passed), min(map(len, passed.values())), {}
    for k in KS:
        if k <= fewest:
            estimates = [pass_at_k(len(p), sum(p), k) for p in passed.values()]
            rates[f"pass@{k}"] = math.fsum(estimates) / n
    intervals = {name: list(wilson(rate, n)) for name, rate in rates.items()}
    about = {"problems": n, "samples_per_problem": fewest}
    return {**rates, "ci95": intervals["pass@1"], "intervals": intervals, **about}


def by_task(samples: Iterable[dict]) -> dict[str, list[bool]]:
    """Group samples by their problem: {task_id: did they pass?}."""
    passed = {}
    for sample in samples:
        passed.setdefault(sample["task_id"], []).append(sample["passed"])
    return passed


def rates(samples: Iterable[dict]) -> dict[str, float]:
    """Return {task_id: the share of its samples that passed}."""
    return {task_id: sum(p) / len(p) for task_id, p in by_task(samples).items()}


def parse_folders(cls, field: str):
    """Parse the command line, where folders may stand first, without --`field`."""
    folders = list(itertools.takewhile(lambda a: not a.startswith("-"), sys.argv[1:]))
    return parse(cls, [f"--{field}={f}" for f in folders] + sys.argv[1 + len(folders) :])


def mean(rates: list[float]) -> dict | None:
    """Return {"pass@1", "ci95", "problems"} of problems' rates, None of no problem."""
    if not rates:
        return None
    frac = math.fsum(rates) / len(rates)
    return {"pass@1": frac, "ci95": list(wilson(frac, len(rates))), "problems": len(rates)}


def percent(score: dict | None) -> str:
    """Format pass@1 with its interval, in percent."""
    if score is None:
        return "-"
    low, high = (100 * x for x in score["ci95"])
    return f"{100 * score['pass@1']:.1f} ({low:.1f} to {high:.1f})"
