"""One choice for each layer: least loss within budgets, as an integer programme.

With x(l, b) = 1 where layer l takes choice b:

    minimise Σ loss(l, b)·x(l, b)    subject to    Σ_b x(l, b) = 1 for every l,    Σ cost(l, b)·x(l, b) ≤ limit

After Z. Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization" (arXiv:2011.10680), section 3.4; solved by HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepack.errors import require
from edgepack.silence import muted

Array = np.ndarray[Any, Any]
LARGEST_LOSS = 1e4  # the solver's absolute gap of 1e-6 is nothing beside it


def choose(loss: Array, costs: Sequence[Array], limits: Sequence[int]) -> Array | None:
    """Index of the choice of every layer, (layers,); None where no choice keeps to the limits.

    Args:
        loss: (layers, choices), not negative.
        costs: of each budget, whole numbers of the same shape.
        limits: of each budget.
    """
    optimize = require("scipy.optimize", "compress")
    layers, choices = loss.shape
    one_each = optimize.LinearConstraint(np.kron(np.eye(layers), np.ones(choices)), 1, 1)
    spent, allowed = np.stack([cost.ravel() for cost in costs]), np.array(limits, np.float64)
    scaled = loss.ravel() / (loss.max() or 1.0) * LARGEST_LOSS
    while (allowed >= 0).all():
        with muted(1):  # HiGHS prints names of its functions
            found = optimize.milp(
                scaled, integrality=np.ones(loss.size), bounds=optimize.Bounds(0, 1), options={"mip_rel_gap": 0.0},
                constraints=[one_each, optimize.LinearConstraint(spent, -np.inf, allowed)],
            )  # fmt: skip
        if found.x is None:
            return None
        chosen: Array = found.x.reshape(layers, choices).argmax(1)
        over = np.array([total(cost, chosen) for cost in costs]) - np.array(limits)
        if (over <= 0).all():
            return chosen
        allowed -= np.maximum(over, 0)  # the solver's own tolerance let it through
    return None


def total(values: Array, chosen: Array) -> Any:
    """Sum over layers of what each one's choice has."""
    return values[np.arange(len(chosen)), chosen].sum()
