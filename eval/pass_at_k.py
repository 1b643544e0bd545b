"""pass@k: the chance that at least one of k samples of a problem passes, and how sure we are."""

import math

KS = (1, 10, 100)  # as reported by Chen et al. 2021, arXiv 2107.03374
Z95 = 1.959964  # 97.5 % point of the normal distribution


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of pass@k from `passed` of `samples` independent samples.

    1 - C(samples - passed, k) / C(samples, k), as a product that neither overflows nor cancels
    (Chen et al. 2021, section 2.1).
    """
    assert 1 <= k <= samples
    assert 0 <= passed <= samples
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(samples - passed + 1, samples + 1))


def wilson(frac: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a mean `frac` of n values."""
    centre = frac + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(frac * (1 - frac) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def score(passed: dict[str, list[bool]]) -> dict:
    """pass@k for k in KS up to the fewest samples a problem has, from {task_id: samples passed?}.

    "intervals" has the Wilson interval of each over the problems, and "ci95" that of pass@1. With
    several samples a problem it is too wide, never too narrow: an estimate in [0, 1] varies at most
    as a coin of the same mean.
    """
    fewest = min(len(p) for p in passed.values())
    rates = {
        f"pass@{k}": math.fsum(pass_at_k(len(p), sum(p), k) for p in passed.values()) / len(passed)
        for k in KS
        if k <= fewest
    }
    return {
        **rates,
        "ci95": list(wilson(rates["pass@1"], len(passed))),
        "intervals": {name: list(wilson(rate, len(passed))) for name, rate in rates.items()},
        "problems": len(passed),
        "samples_per_problem": fewest,
    }
