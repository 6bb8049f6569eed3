"""How large a rank should be: by energy, by what noise alone would give (EVBMF), in multiples that suit a processor."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import require

ROUNDING = 1e-10  # of the largest singular value; smaller ones are no signal
Floats = NDArray[np.float64]


def rank_by_energy(sizes: Floats, share: float) -> int:
    """Smallest rank whose singular values hold this share of the sum of all squares; at least 1."""
    squares = np.cumsum(np.asarray(sizes, np.float64) ** 2)
    if squares[-1] == 0:
        return 1
    return int(min(np.searchsorted(squares, share * squares[-1] * (1 - 1e-12)) + 1, len(squares)))


def rounded(rank: float, multiple: int, full: int) -> int:
    """The nearest multiple, at least one of them, at most ``full``."""
    return min(full, max(1, round(rank / multiple)) * multiple)


def rank_by_evbmf(sizes: Floats, rows: int, columns: int) -> tuple[int, float]:
    """Rank of a (rows, columns) matrix in Gaussian noise, and the noise's variance, from its singular values.

    The global optimum of empirical variational Bayesian matrix factorization (Nakajima, Sugiyama, Babacan, Tomioka,
    JMLR 14, 2013): a singular value stays where it is over √(M·σ²·x̲); σ² minimizes the free energy.
    """
    short, long = sorted((rows, columns))
    sizes = np.asarray(sizes, np.float64)[:short]
    total = float((sizes**2).sum())
    if total == 0 or short == 0:
        return 0, 0.0
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)
    tail = sizes[most:] ** 2
    high = total / (short * long)
    low = max(float(tail[0]) / (long * edge), float(tail.mean()) / long, (ROUNDING * sizes[0]) ** 2 / long)
    variance = high if low >= high else _least_energy(sizes, (low, high), (alpha, edge, long))
    return int((sizes > math.sqrt(long * variance * edge)).sum()), float(variance)


def _least_energy(sizes: Floats, ends: tuple[float, float], of: tuple[float, float, int]) -> float:
    """σ² of least free energy between the ends: the best of a fine grid, refined."""
    alpha, edge, long = of

    def energy(variance: float) -> float:
        x = sizes**2 / (long * variance)
        small, large = x[x <= edge], x[x > edge]
        shifted = large - (1 + alpha)
        t = 0.5 * (shifted + np.sqrt(np.maximum(shifted**2 - 4 * alpha, 0)))
        kept = large - t + np.log((t + 1) / large) + alpha * np.log(t / alpha + 1)
        return float((small - np.log(np.maximum(small, 1e-300))).sum() + kept.sum())

    grid = np.geomspace(*ends, 200)
    best = int(np.argmin([energy(value) for value in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = require("scipy.optimize", "factorize").minimize_scalar(
        energy, bounds=around, method="bounded", options={"xatol": 1e-12 * around[1]}
    )
    return float(found.x if found.fun <= energy(float(grid[best])) else grid[best])
