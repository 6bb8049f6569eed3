"""The range of an activation from what was seen of it: a histogram in fixed memory, and four ways to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BINS = 2048
STEPS = 40  # ends tried on each side by mse
NARROWEST = 1 / np.pi**2  # of the whole range; between round ratios of two ranges, values fall halfway between steps
TAIL = 1e-4  # of the values, cut off on each side by percentile
LEVELS = 256
COARSEST = 128  # levels that entropy compares with


@dataclass(frozen=True)
class Histogram:
    """How often values fell into equal bins from ``low`` to ``high``, which are the smallest and largest seen."""

    low: float
    high: float
    counts: Array

    @property
    def centres(self) -> Array:
        width = (self.high - self.low) / len(self.counts)
        return self.low + width * (np.arange(len(self.counts)) + 0.5)


def with_zero(low: float, high: float) -> tuple[float, float]:
    """The range, with 0 in it: padding and cut-off negatives must be exact."""
    return min(low, 0.0), max(high, 0.0)


def minmax(seen: Histogram, slope: float = 1.0, levels: int = LEVELS) -> tuple[float, float]:
    """Everything that was seen."""
    return with_zero(seen.low, seen.high)


def percentile(seen: Histogram, slope: float = 1.0, levels: int = LEVELS) -> tuple[float, float]:
    """All but one in ten thousand values on each side."""
    total = seen.counts.sum()
    below = np.cumsum(seen.counts) / max(total, 1)
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    first = int(np.searchsorted(below, TAIL, side="right"))
    last = int(np.searchsorted(below, 1 - TAIL, side="left"))
    return with_zero(float(edges[first]), float(edges[min(last, len(seen.counts) - 1) + 1]))


def mse(seen: Histogram, slope: float = 1.0, levels: int = LEVELS) -> tuple[float, float]:
    """The range with the least squared error of rounding to so many levels, and of clipping.

    Errors of negative values count ``slope`` times, as they do behind a leaky ReLU.
    """
    low, high = with_zero(seen.low, seen.high)
    lows = low * _ratios() if low < 0 else np.zeros(1)
    highs = high * _ratios() if high > 0 else np.zeros(1)
    pairs = [(float(a), float(b)) for a in lows for b in highs if b > a]
    return min(pairs, key=lambda pair: squared_error(seen, pair[0], pair[1], slope, levels)) if pairs else (low, high)


def entropy(seen: Histogram, slope: float = 1.0, levels: int = LEVELS) -> tuple[float, float]:
    """The cut at which half as many levels of magnitude tell least apart from what was seen.

    By Kullback-Leibler divergence of the distributions, after S. Migacz, "8-bit inference with TensorRT" (GTC 2017).
    """
    low, high = with_zero(seen.low, seen.high)
    reach = max(-low, high)
    if reach == 0:
        return low, high
    counts, _ = np.histogram(np.abs(seen.centres), BINS, (0.0, reach), weights=seen.counts)
    coarse = min(COARSEST, levels // 2)
    cuts = np.arange(coarse, BINS + 1, 8)
    cut = min(cuts, key=lambda end: _divergence(counts, int(end), coarse))
    limit = (cut + 0.5) / BINS * reach
    return max(low, -limit), min(high, limit)


METHODS: dict[str, Callable[..., tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def squared_error(seen: Histogram, low: float, high: float, slope: float = 1.0, levels: int = LEVELS) -> float:
    """Mean squared error of the values seen when they are rounded to so many levels in a range."""
    values = seen.centres
    step = (high - low) / (levels - 1)
    zero = np.clip(np.rint(-low / step), 0, levels - 1)
    rounded = (np.clip(np.rint(values / step) + zero, 0, levels - 1) - zero) * step
    inside = step * step / 12  # values spread over a bin that is narrower than a step round as any others
    clipped = (values < -zero * step) | (values > (levels - 1 - zero) * step)
    error = np.where(clipped, np.square(values - rounded), inside)
    weights = seen.counts * np.where(values < 0, slope * slope, 1.0)
    return float((error * weights).sum() / max(seen.counts.sum(), 1))


def _ratios() -> Array:
    return np.linspace(1.0, NARROWEST, STEPS)


def _divergence(counts: Array, end: int, levels: int) -> float:
    kept = counts[:end].astype(np.float64)
    reference = kept.copy()
    reference[-1] += counts[end:].sum()
    owner = np.arange(end) * levels // end
    filled = kept > 0
    sums, members = np.bincount(owner, kept, levels), np.bincount(owner, filled, levels)
    coarse = np.where(filled, sums[owner] / np.maximum(members[owner], 1), 0.0)
    p, q = reference / max(reference.sum(), 1e-30), coarse / max(coarse.sum(), 1e-30)
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())
