"""Intervals and verdicts, in NumPy alone: Student's t, Welch on log floors, LoadGen's tail bounds, proportions.

A ratio is the latency of this over the latency of the other, so below 1 is faster. The unit of its interval is the
engine instance: blocks and runs of one instance share that instance's own offset and are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgepack.measurement import Latency

Floats = NDArray[np.floating[Any]] | Sequence[float]

FLOOR_QUANTILE = 0.10
TAIL_RISK = 0.01
NORMAL_975 = 1.959963984540054


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval on the logarithmic scale: 0.01 is ± 1 %. Infinite when nothing is known."""
        return math.inf if self.low <= 0 or math.isinf(self.high) else 0.5 * math.log(self.high / self.low)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function I_x(a, b), by its continued fraction with Lentz's method."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction, numerator, denominator = 1.0, 1.0, 0.0
    for step in range(1, 100_000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1.0 / (1.0 + term * denominator)
        numerator = 1.0 + term / numerator
        fraction *= numerator * denominator
        if abs(numerator * denominator - 1.0) < 1e-15:
            break
    return math.exp(log_front) / (a * fraction)


def t_cdf(value: float, df: float) -> float:
    """Student's t distribution function; ``df`` may be fractional."""
    tail = 0.5 * incomplete_beta(df / 2, 0.5, df / (df + value * value))
    return 1.0 - tail if value > 0 else tail


def t_quantile(df: float, probability: float = 0.975) -> float:
    """Student's t quantile for any positive, also fractional, number of degrees of freedom.

    Raises:
        ValueError: ``df`` is not positive or ``probability`` not inside (0, 1).
    """
    if not df > 0 or not 0 < probability < 1:
        raise ValueError(f"t_quantile needs df > 0 and 0 < probability < 1, not {df} and {probability}")
    if probability < 0.5:
        return -t_quantile(df, 1 - probability)
    if df > 1e7:
        df = 1e7  # differs from the normal distribution by less than 1e-6 from here on
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        low, high = high, high * 2
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return 0.5 * (low + high)


def mean_interval(values: Floats) -> Interval:
    """Mean with its Student interval; unbounded for a single value."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(mean, mean - half, mean + half)


def welch(a: Floats, b: Floats) -> Interval:
    """mean(a) − mean(b) with Welch's interval; unbounded when either side holds fewer than two values."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    difference = float(a.mean() - b.mean())
    if min(a.size, b.size) < 2:
        return Interval(difference, -math.inf, math.inf)
    one, other = float(a.var(ddof=1)) / a.size, float(b.var(ddof=1)) / b.size
    if one + other == 0:
        return Interval(difference, difference, difference)
    share = one / (one + other)
    df = 1 / (share**2 / (a.size - 1) + (1 - share) ** 2 / (b.size - 1))
    half = t_quantile(df) * math.sqrt(one + other)
    return Interval(difference, difference - half, difference + half)


def floor(block_medians: Floats) -> float:
    """The latency of an instance when nothing disturbs it: the 10 % quantile of its block medians."""
    return float(np.quantile(np.asarray(block_medians, dtype=np.float64), FLOOR_QUANTILE))


def floor_ratio(floors: Floats, against: Floats) -> Interval:
    """Ratio of geometric means of floors (one per engine instance) with Welch's interval on their logarithms."""
    logs = welch(np.log(np.asarray(floors, dtype=np.float64)), np.log(np.asarray(against, dtype=np.float64)))
    return Interval(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))


def verdict(interval: Interval, tolerance: float) -> str:
    """``faster``, ``slower``, ``same`` or ``cannot tell``: where the whole interval lies against 1 ± tolerance."""
    if interval.high < 1 - tolerance:
        return "faster"
    if interval.low > 1 + tolerance:
        return "slower"
    if interval.low >= 1 - tolerance and interval.high <= 1 + tolerance:
        return "same"
    return "cannot tell"


def tail_bound(samples: Floats, percentile: float) -> float | None:
    """A latency that at least ``percentile`` of all inferences keep, with 99 % confidence; None if too few samples.

    MLPerf LoadGen's early-stopping estimate: the t-th largest sample, t as large as the binomial distribution allows.
    It needs 64 samples for p90 and 662 for p99, and approaches the plain percentile from above.
    """
    values = np.sort(np.asarray(samples, dtype=np.float64))
    over = 1 - percentile

    def risk(t: int) -> float:
        """Chance that at most t of the samples lie above the true percentile."""
        return 1.0 - incomplete_beta(t + 1, values.size - t, over)

    if values.size < 2 or risk(1) > TAIL_RISK:
        return None
    low, high = 1, values.size - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if risk(middle) <= TAIL_RISK else (low, middle - 1)
    return float(values[values.size - low])


def latency(samples_ms: Floats) -> Latency:
    """Summary of single inferences in milliseconds; the tails are None where there are not enough samples."""
    values = np.asarray(samples_ms, dtype=np.float64)
    return Latency(
        p50=float(np.median(values)),
        p90=tail_bound(values, 0.90),
        p99=tail_bound(values, 0.99),
        mean=float(values.mean()),
        min=float(values.min()),
        n=int(values.size),
    )


def wilson(successes: int, count: int) -> Interval:
    """A proportion with Wilson's score interval.

    Raises:
        ValueError: not 0 ≤ successes ≤ count, or count is 0.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"a proportion needs 0 <= successes <= count and count >= 1, not {successes} of {count}")
    share, z2 = successes / count, NORMAL_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_975 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(
    rows: NDArray[Any], statistic: Callable[[NDArray[Any]], float], resamples: int = 1000, seed: int = 0
) -> Interval:
    """A statistic of independent rows (first axis) with its percentile bootstrap interval."""
    random = np.random.default_rng(seed)
    drawn = [statistic(rows[random.integers(0, len(rows), len(rows))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(statistic(rows)), float(low), float(high))


def geometric_mean(values: Floats) -> float:
    return float(np.exp(np.log(np.asarray(values, dtype=np.float64)).mean()))
