"""Intervals and tests: how sure is a score, and how sure is a difference between two scores?

Proportions get Wilson's interval: it holds for few questions and near 0% and 100%, where the normal one fails (Brown,
Cai, DasGupta 2001; for evaluations Bowyer et al. 2025, arXiv 2503.01747). Everything else is a ratio of two sums over
questions: bits per byte is a sum of bits over a sum of bytes, a mean is a sum of values over a sum of ones. Its
interval is the normal one by linearization (Cochran 1977, Sampling Techniques, section 6.4) with Student's t.

Two checkpoints are compared on the questions that both answered (Miller 2024, arXiv 2411.00640, section 4): the noise
of easy and hard questions cancels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, false_discovery_control, norm, t

LEVEL = 0.95
Interval = tuple[float, float]


class Difference(NamedTuple):
    """A difference B - A with its interval and the p-value of "there is none"."""

    value: float
    low: float
    high: float
    p: float


def wilson(successes: int, n: int) -> Interval:
    """Return Wilson's 95% interval of a proportion (Wilson 1927)."""
    interval = binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def ratio_interval(numerators: Sequence[float], weights: Sequence[float]) -> tuple[float, float, float] | None:
    """Return sum(numerators) / sum(weights) and its 95% interval; None for one question, or if nothing varies.

    Args:
        numerators: One number per question.
        weights: One positive number per question; all 1 for a mean.
    """
    if len(numerators) < 2:
        return None
    ratio = sum(numerators) / sum(weights)
    half = _half_width(_residuals(numerators, weights))
    return (ratio, ratio - half, ratio + half) if half > 1e-12 * abs(ratio) else None


def compare_proportions(both: int, only_a: int, only_b: int, neither: int) -> Difference:
    """Compare two checkpoints on the same questions that are right or wrong.

    The p-value is McNemar's exact one: of the questions that only one of the two answers, each should have half. The
    interval is Newcombe's (1998, Statistics in Medicine 17:2635, method 10), made of both Wilson intervals.

    Args:
        both: Questions that both answer.
        only_a, only_b: Questions that only one of the two answers.
        neither: Questions that none answers.
    """
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    product = both * neither - only_a * only_b
    if product > 0:  # Newcombe's correction for continuity
        product = max(product - n / 2, 0)
    spread = math.sqrt(right_a * (n - right_a) * right_b * (n - right_b))
    low, high = combine(
        (right_a / n, *wilson(right_a, n)), (right_b / n, *wilson(right_b, n)), product / spread if spread else 0.0
    )
    p = binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    return Difference((right_b - right_a) / n, low, high, float(p))


def compare_ratios(
    numerators_a: Sequence[float],
    weights_a: Sequence[float],
    numerators_b: Sequence[float],
    weights_b: Sequence[float],
) -> Difference | None:
    """Compare two ratios of sums over the same questions, in the same order; None for a single question.

    The paired t test of the linearized values. tests/eval/test_intervals.py compares it with scipy's bootstrap.
    """
    if len(numerators_a) < 2:
        return None
    value = sum(numerators_b) / sum(weights_b) - sum(numerators_a) / sum(weights_a)
    residuals = _residuals(numerators_b, weights_b) - _residuals(numerators_a, weights_a)
    half = _half_width(residuals)
    n = len(residuals)
    if half == 0:
        return Difference(value, value, value, float(value == 0))
    statistic = abs(value) / (half / t.ppf((1 + LEVEL) / 2, n - 1))
    return Difference(value, value - half, value + half, float(2 * t.sf(statistic, n - 1)))


def compare_unpaired(a: tuple[float, float, float], b: tuple[float, float, float]) -> Difference:
    """Compare two scores of which only the intervals are known, as if of different questions.

    This is careful: on the same questions, the true interval is usually narrower. The interval is that of Zou and
    Donner (2008, Statistics in Medicine 27:1693); the p-value is the normal one of an interval of that width.

    Args:
        a, b: Value, low, high.
    """
    low, high = combine(a, b)
    value = b[0] - a[0]
    half = value - low if value > 0 else high - value  # the side where 0 is
    p = 2 * norm.sf(abs(value) / half * norm.ppf((1 + LEVEL) / 2)) if half else float(value == 0)
    return Difference(value, low, high, float(p))


def combine(a: tuple[float, float, float], b: tuple[float, float, float], correlation: float = 0.0) -> Interval:
    """Return the interval of B - A from value, low and high of each, and the correlation of the two."""
    low_a, high_a, low_b, high_b = a[0] - a[1], a[2] - a[0], b[0] - b[1], b[2] - b[0]
    below = low_b**2 - 2 * correlation * low_b * high_a + high_a**2
    above = high_b**2 - 2 * correlation * high_b * low_a + low_a**2
    return b[0] - a[0] - math.sqrt(max(below, 0)), b[0] - a[0] + math.sqrt(max(above, 0))


def adjust(p_values: Sequence[float]) -> list[float]:
    """Return p-values for many tests together (Benjamini and Hochberg 1995).

    Of the tests that stay below 0.05, about 5% at most are expected to be wrong.
    """
    return false_discovery_control(p_values).tolist() if len(p_values) else []


def _residuals(numerators: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    """Return how far each question moves the ratio of sums from its value, times the number of questions."""
    values, sizes = np.asarray(numerators, float), np.asarray(weights, float)
    return (values - values.sum() / sizes.sum() * sizes) / sizes.mean()


def _half_width(residuals: np.ndarray) -> float:
    n = len(residuals)
    return float(t.ppf((1 + LEVEL) / 2, n - 1) * residuals.std(ddof=1) / math.sqrt(n))
