import math
from itertools import combinations

import pytest

from eval.scores import Z95, pass_at_k, score, wilson


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            outcomes = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(combinations(outcomes, k))
                want = sum(map(any, subsets)) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(want, abs=1e-12)
    # exact integers; as floats the binomials would overflow
    want = 1 - math.comb(99_900, 1000) / math.comb(100_000, 1000)
    assert pass_at_k(100_000, 100, 1000) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("passed", "n"), [(0, 10), (10, 10), (1, 164), (83, 164), (5, 5)])
def test_wilson_ends_are_z_deviations_from_the_mean(passed, n):
    frac = passed / n
    low, high = wilson(frac, n)
    assert 0 <= low <= frac + 1e-9
    assert frac - 1e-9 <= high <= 1
    for p in (low, high):  # the interval's definition: a test of p against frac is on the edge
        assert (frac - p) ** 2 == pytest.approx(Z95**2 * p * (1 - p) / n, abs=1e-12)


def test_score_weighs_problems_alike():
    result = score({"a": [True] + [False] * 19, "b": [True] * 10})
    assert result["pass@1"] == pytest.approx((1 / 20 + 1) / 2)
    assert result["pass@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert (result["problems"], result["samples_per_problem"]) == (2, 10)
    assert "pass@100" not in result
    assert result["ci95"] == list(wilson(result["pass@1"], 2))
