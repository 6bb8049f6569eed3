"""Statistics against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from edgepack import statistics
from edgepack.statistics import Interval


@given(st.floats(0.3, 500), st.floats(0.3, 500), st.floats(0, 1))
def test_incomplete_beta_equals_scipy(a: float, b: float, x: float) -> None:
    assert statistics.incomplete_beta(a, b, x) == pytest.approx(float(special.betainc(a, b, x)), abs=1e-11)


@given(st.floats(0.5, 1e6), st.floats(0.01, 0.999))
def test_t_quantile_equals_scipy(df: float, probability: float) -> None:
    expected = float(stats.t.ppf(probability, df))
    assert statistics.t_quantile(df, probability) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_t_quantile_of_many_degrees_is_normal() -> None:
    assert statistics.t_quantile(1e12) == pytest.approx(statistics.NORMAL_975, abs=1e-6)


@pytest.mark.parametrize("df, probability", [(0, 0.975), (-1, 0.5), (math.nan, 0.5), (5, 0), (5, 1)])
def test_t_quantile_refuses_nonsense(df: float, probability: float) -> None:
    with pytest.raises(ValueError, match="t_quantile needs"):
        statistics.t_quantile(df, probability)


samples = st.lists(st.floats(-50, 50), min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-3)


@given(samples, samples)
def test_welch_equals_scipy(a: list[float], b: list[float]) -> None:
    ours = statistics.welch(a, b)
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6, abs=1e-6)


def test_welch_of_one_value_knows_nothing() -> None:
    assert statistics.welch([1.0], [2.0, 3.0]) == (-1.5, -math.inf, math.inf)
    assert statistics.floor_ratio([1.0], [1.0]).half_width == math.inf


def test_welch_of_constants_has_no_width() -> None:
    assert statistics.welch([3.0, 3.0], [1.0, 1.0]) == (2.0, 2.0, 2.0)


@given(samples)
def test_mean_interval_equals_scipy(values: list[float]) -> None:
    ours = statistics.mean_interval(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6, abs=1e-6)


def test_floor_ratio_below_one_is_faster() -> None:
    ratio = statistics.floor_ratio([0.9, 0.91, 0.89], [1.0, 1.01, 0.99])
    assert ratio.value == pytest.approx(0.9, abs=1e-4)
    assert ratio.low < 0.9 < ratio.high < 0.97
    assert statistics.verdict(ratio, 0.03) == "faster"
    assert ratio.half_width == pytest.approx(math.log(ratio.high / ratio.value))


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.90, 0.96, "faster"),
        (1.04, 1.20, "slower"),
        (0.98, 1.02, "same"),
        (0.97, 1.03, "same"),
        (0.96, 1.00, "cannot tell"),
        (1.00, 1.04, "cannot tell"),
        (0.90, 1.10, "cannot tell"),
        (0.0, math.inf, "cannot tell"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert statistics.verdict(Interval(1.0, low, high), 0.03) == expected


@pytest.mark.parametrize("percentile, least", [(0.90, 64), (0.99, 662)])
def test_tail_needs_loadgens_sample_counts(percentile: float, least: int) -> None:
    values = np.random.default_rng(0).random(least)
    assert statistics.tail_bound(values, percentile) is not None
    assert statistics.tail_bound(values[:-1], percentile) is None


@pytest.mark.parametrize("percentile", [0.90, 0.99])
@pytest.mark.parametrize("count", [700, 1000, 4321])
def test_tail_bound_is_the_binomial_one(percentile: float, count: int) -> None:
    values = np.arange(count, dtype=float)
    t = max(t for t in range(1, count) if stats.binom.cdf(t, count, 1 - percentile) <= 0.01)
    assert statistics.tail_bound(values, percentile) == count - t


def test_latency_leaves_unknown_tails_out() -> None:
    summary = statistics.latency([3.0, 1.0, 2.0])
    assert (summary.p50, summary.min, summary.mean, summary.n) == (2.0, 1.0, 2.0, 3)
    assert summary.p90 is None
    assert summary.p99 is None


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_equals_scipy(count: int, share: float) -> None:
    successes = round(count * share)
    theirs = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    ours = statistics.wilson(successes, count)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("successes, count", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_nonsense(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="proportion"):
        statistics.wilson(successes, count)


def test_bootstrap_covers_the_mean() -> None:
    rows = np.random.default_rng(1).normal(5.0, 1.0, 400)
    interval = statistics.bootstrap(rows, lambda v: float(v.mean()))
    expected = statistics.mean_interval(rows)
    assert interval.low == pytest.approx(expected.low, abs=0.02)
    assert interval.high == pytest.approx(expected.high, abs=0.02)
    assert statistics.bootstrap(rows, lambda v: float(v.mean())) == interval
