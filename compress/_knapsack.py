"""One form for each layer, the total error least, the totals of what they cost within limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import require


def choose(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[float]]], limits: Sequence[float]
) -> list[int] | None:
    """Index of the form of each layer, or None where no choice keeps the limits.

    A multiple-choice knapsack, solved exactly (HiGHS, by ``scipy.optimize.milp``).

    Args:
        errors: per layer and form, not below 0.
        costs: per limit, layer and form.
        limits: of the sums of the costs.
    """
    optimize = require("scipy.optimize", "factorize")
    counts = [len(forms) for forms in errors]
    if not counts:
        return [] if all(limit >= 0 for limit in limits) else None
    owner = np.repeat(np.arange(len(counts)), counts)
    one_each = optimize.LinearConstraint(owner[None] == np.arange(len(counts))[:, None], 1, 1)
    rows = [np.concatenate([np.asarray(forms, float) for forms in layers]) for layers in costs]
    within = [_scaled(row, limit) for row, limit in zip(rows, limits, strict=True)]
    constraints = [one_each, *(optimize.LinearConstraint(row[None], -np.inf, limit) for row, limit in within)]
    objective = np.concatenate([np.asarray(forms, float) for forms in errors])
    top = float(np.abs(objective).max()) or 1.0
    found = optimize.milp(objective / top, constraints=constraints, integrality=np.ones(len(owner)),
                          bounds=optimize.Bounds(0, 1), options={"mip_rel_gap": 1e-9})  # fmt: skip
    if found.x is None:
        return None
    taken = np.flatnonzero(found.x > 0.5)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return [int(index - starts[owner[index]]) for index in taken]


def _scaled(row: NDArray[np.float64], limit: float) -> tuple[NDArray[np.float64], float]:
    """The same inequality in numbers near 1, which the solver's tolerances are made for."""
    size = float(np.abs(row).max()) or 1.0
    return row / size, limit / size
