"""Compute pass@k and its uncertainty."""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable

from common.config import parse

KS = (1, 10, 100)  # reported by Chen et al. 2021, arXiv 2107.03374
CURVE = (1, 2, 5, 10, 20, 50, 100)  # k in figures
FEW = 20  # samples per problem in the fit that predicts pass@100
Z95 = 1.959964  # 97.5 % point of the normal distribution


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased pass@k estimate from `passed` of `samples` independent samples.

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


def measured(passed: dict[str, list[bool]], ks: Iterable[int]) -> dict[int, float]:
    """Return {k: pass@k} for k up to the fewest samples of any problem, from {task_id: passed?}."""
    fewest, n = min(map(len, passed.values())), len(passed)
    estimates = {k: [pass_at_k(len(p), sum(p), k) for p in passed.values()]
                 for k in ks if k <= fewest}  # fmt: skip
    return {k: math.fsum(rates) / n for k, rates in estimates.items()}


def fit(passed: dict[str, list[bool]]) -> dict | None:
    """Fit a beta distribution of per-problem solve rates; predict pass@k in KS: [value, low, high].

    Solve rates follow Beta(a, b). The 95 % interval is the range of pass@k over all (a, b) within
    Z95^2 / 2 of the best log-likelihood, found on a shrinking grid over the mean and a + b. Returns
    None if all samples fail or all pass.
    """
    import numpy as np  # here: most scores need neither
    from scipy.special import betaln, expit

    if len(set(itertools.chain(*passed.values()))) == 1:
        return None
    counts = Counter((sum(p), len(p)) for p in passed.values())
    ends = [(-20, 20), (-10, 14)]  # log-odds of the mean, ln(a + b)
    for _ in range(5):
        odds, size = np.meshgrid(*(np.linspace(low, high, 101) for low, high in ends))
        a, b = np.exp(size) * expit(odds), np.exp(size) * expit(-odds)
        likely = sum(m * (betaln(a + c, b + n - c) - betaln(a, b)) for (c, n), m in counts.items())
        near = likely >= likely.max() - Z95**2 / 2
        steps = [(high - low) / 50 for low, high in ends]
        ends = [(x[near].min() - d, x[near].max() + d) for x, d in zip((odds, size), steps)]
    best = likely.argmax()
    found = {"a": a.flat[best], "b": b.flat[best]}
    for k in KS:
        rate = predicted(a, b, k)
        found[f"pass@{k}"] = [rate.flat[best], rate[near].min(), rate[near].max()]
    return found


def predicted(a, b, k):
    """Return pass@k = E[1 - (1 - p)^k] for p ~ Beta(a, b): 1 - B(a, b + k) / B(a, b)."""
    import numpy as np
    from scipy.special import betaln

    return -np.expm1(betaln(a, b + k) - betaln(a, b))


def curve(passed: dict[str, list[bool]]) -> dict:
    """Return pass@k for k in CURVE, its fit and, as a check, a fit to the first FEW samples only.

    Returns {} for one sample per problem, which cannot separate luck from easy problems.
    """
    fewest = min(map(len, passed.values()))
    if fewest == 1:
        return {}
    first = {t: p[:FEW] for t, p in passed.items()}
    few = {f"fit_of_{FEW}": fit(first)} if fewest > FEW else {}
    return {"pass_at": measured(passed, CURVE), "fit": fit(passed), **few}


def score(passed: dict[str, list[bool]]) -> dict:
    """Return pass@k for k in KS, up to the fewest samples of any problem, from {task_id: passed?}.

    "intervals" holds each Wilson interval over problems, "ci95" the one of pass@1. With several
    samples per problem it is too wide, never too narrow: an estimate in [0, 1] varies at most like
    a coin flip with the same mean.
    """
    n, fewest = len(passed), min(map(len, passed.values()))
    rates = {f"pass@{k}": rate for k, rate in measured(passed, KS).items()}
    intervals = {name: list(wilson(rate, n)) for name, rate in rates.items()}
    about = {"problems": n, "samples_per_problem": fewest}
    return {**rates, "ci95": intervals["pass@1"], "intervals": intervals, **about}


def by_task(samples: Iterable[dict]) -> dict[str, list[bool]]:
    """Group samples by problem: {task_id: passed?}."""
    passed = {}
    for sample in samples:
        passed.setdefault(sample["task_id"], []).append(sample["passed"])
    return passed


def rates(samples: Iterable[dict]) -> dict[str, float]:
    """Return {task_id: fraction of its samples that passed}."""
    return {task_id: sum(p) / len(p) for task_id, p in by_task(samples).items()}


def parse_folders(cls, field: str):
    """Parse the command line; leading folders need no --`field`."""
    folders = list(itertools.takewhile(lambda a: not a.startswith("-"), sys.argv[1:]))
    return parse(cls, [f"--{field}={f}" for f in folders] + sys.argv[1 + len(folders) :])


def mean(rates: list[float]) -> dict | None:
    """Return {"pass@1", "ci95", "problems"} of per-problem rates, or None without problems."""
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
