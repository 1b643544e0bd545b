import math
from itertools import combinations

import numpy as np
import pytest

from eval.scores import Z95, curve, fit, pass_at_k, score, wilson


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
    for p in (low, high):  # definition: testing p against frac is borderline
        assert (frac - p) ** 2 == pytest.approx(Z95**2 * p * (1 - p) / n, abs=1e-12)


def test_score_weighs_problems_alike():
    result = score({"a": [True] + [False] * 19, "b": [True] * 10})
    assert result["pass@1"] == pytest.approx((1 / 20 + 1) / 2)
    assert result["pass@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert (result["problems"], result["samples_per_problem"]) == (2, 10)
    assert "pass@100" not in result
    assert result["ci95"] == list(wilson(result["pass@1"], 2))


def problems(counts: dict[tuple[int, int], int]) -> dict[str, list[bool]]:
    """Make `counts` problems of each (passed, samples): {task_id: passed?}."""
    each = [pair for pair, times in counts.items() for _ in range(times)]
    return {str(i): [True] * c + [False] * (n - c) for i, (c, n) in enumerate(each)}


def test_fits_that_are_known():
    # Two samples determine a and b exactly: E[p] = .4 and E[2 p (1 - p)] = .2.
    found = fit(problems({(0, 2): 500, (1, 2): 200, (2, 2): 300}))
    assert [found["a"], found["b"]] == pytest.approx([2 / 7, 3 / 7], rel=0.01)
    assert found["pass@1"][0] == pytest.approx(0.4, abs=0.001)
    # Less spread than chance: one p for all, so the likelihood interval of 200 coin flips.
    found = fit(problems({(1, 2): 100}))
    spread = math.sqrt(1 - math.exp(-(Z95**2) / 200)) / 2
    assert found["pass@1"] == pytest.approx([0.5, 0.5 - spread, 0.5 + spread], abs=0.002)
    assert found["pass@10"][0] == pytest.approx(1 - 0.5**10, abs=1e-4)
    # Each problem always or never solved: more samples solve no more.
    found = fit(problems({(0, 20): 75, (20, 20): 25}))
    assert [found[f"pass@{k}"][0] for k in (1, 10, 100)] == pytest.approx([0.25] * 3, abs=0.002)
    assert fit(problems({(0, 20): 9})) is fit(problems({(7, 7): 9})) is None


@pytest.mark.parametrize(("a", "b"), [(0.1, 10), (0.02, 1), (0.8, 0.8), (50, 5000)])
def test_a_fit_of_few_samples_predicts(a, b):
    draws = np.random.default_rng(0)
    passed = {str(i): (draws.random(100) < p).tolist() for i, p in enumerate(draws.beta(a, b, 300))}
    found = curve(passed)
    few, at = found["fit_of_20"], found["pass_at"]
    assert sorted(at) == [1, 2, 5, 10, 20, 50, 100]
    assert few == fit({t: p[:20] for t, p in passed.items()})
    for k in (1, 10, 100):
        truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))
        (value, low, high), (_, few_low, few_high) = found["fit"][f"pass@{k}"], few[f"pass@{k}"]
        assert low < truth < high
        assert few_low < truth < few_high
        assert value == pytest.approx(at[k], rel=0.1)
    assert few["pass@1"][0] < few["pass@10"][0] < few["pass@100"][0]


def test_a_curve_goes_no_further_than_the_samples():
    assert curve({"a": [True], "b": [False] * 9}) == {}
    found = curve({"a": [True, False], "b": [False] * 30})
    assert (found["pass_at"], set(found)) == ({1: 0.25, 2: 0.5}, {"pass_at", "fit"})
