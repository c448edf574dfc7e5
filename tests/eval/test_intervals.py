"""Intervals and tests of differences, compared with closed forms, published examples and scipy's bootstrap."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from buddygpt.eval.reporting.intervals import (
    adjust,
    compare_proportions,
    compare_ratios,
    compare_unpaired,
    ratio_interval,
    wilson,
)


def test_mcnemar_is_exact_and_the_interval_is_newcombes():
    found = compare_proportions(both=30, only_a=2, only_b=10, neither=8)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)  # 0, 1 or 2 of 12 coins
    (p1, l1, u1), (p2, l2, u2) = ((share, *closed_wilson(share, 50)) for share in (32 / 50, 40 / 50))
    phi = (30 * 8 - 2 * 10 - 25) / math.sqrt(32 * 18 * 40 * 10)
    low = 0.16 - math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    high = 0.16 + math.sqrt((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2)
    assert found[:3] == pytest.approx((0.16, low, high)) and low > 0


@pytest.mark.parametrize(("cells", "p"), [((5, 0, 0, 5), 1), ((0, 0, 5, 0), 2 / 2**5), ((94, 0, 6, 0), 2 / 2**6)])
def test_differences_at_the_edges(cells, p):
    found = compare_proportions(*cells)
    assert found.p == pytest.approx(p) and found.low <= found.value <= found.high
    assert found.low >= -1 and found.high <= 1 and (found.low < 0 or p < 1)


def test_scores_without_answers_are_compared_as_newcombe_published():
    a, b = (48 / 80, *wilson(48, 80)), (56 / 70, *wilson(56, 70))
    found = compare_unpaired(a, b)
    assert found[:3] == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)  # 1998, Statistics in Medicine 17:873, table II
    assert 0.001 < found.p < 0.02 and compare_unpaired(a, a).p == 1


def test_sums_over_sums_agree_with_the_bootstrap():
    random = np.random.default_rng(0)
    sizes = random.integers(20, 400, 120).astype(float)
    first = -sizes * random.gamma(20, 0.05, 120)
    second = first * 0.97 + random.normal(0, 8, 120)
    ratio, low, high = ratio_interval(first, sizes)
    assert ratio == pytest.approx(first.sum() / sizes.sum())
    assert (low, high) == pytest.approx(resampled(lambda a, b: a.sum(-1) / b.sum(-1), first, sizes), abs=0.01)

    found = compare_ratios(first, sizes, second, sizes)
    expected = resampled(lambda a, b, c: (c.sum(-1) - a.sum(-1)) / b.sum(-1), first, sizes, second)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.002)
    assert found.value == pytest.approx(second.sum() / sizes.sum() - ratio) and found.p < 1e-4
    assert found.high - found.low < (high - low) / 2  # the same texts are hard for both


def test_means_are_compared_by_the_t_test_by_hand():
    found = compare_ratios([1, 2, 3], [1, 1, 1], [2, 4, 3], [1, 1, 1])  # differences 1, 2, 0
    assert found.value == pytest.approx(1) and found.p == pytest.approx(2 * 0.11270, abs=1e-4)  # t = sqrt(3), 2 df
    assert found.high - 1 == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    same = compare_ratios([1, 2], [1, 1], [1, 2], [1, 1])
    assert same == (0, 0, 0, 1) and compare_ratios([1], [1], [2], [1]) is None and ratio_interval([1], [1]) is None


def test_many_tests_are_corrected_together():
    assert adjust([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.04, 0.04]) and adjust([]) == []


def closed_wilson(share, n, z=1.959964):
    center, half = share + z**2 / 2 / n, z * math.sqrt(share * (1 - share) / n + z**2 / 4 / n**2)
    return (center - half) / (1 + z**2 / n), (center + half) / (1 + z**2 / n)


def resampled(statistic, *columns):
    found = bootstrap(
        columns,
        lambda *args, axis: statistic(*args),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        random_state=0,
    )
    return tuple(found.confidence_interval)
