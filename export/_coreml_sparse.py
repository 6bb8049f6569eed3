"""Core ML's form of weights full of zeros: a bit for each weight, and the values of those that are not zero.

The engine unpacks them when it loads the model, or multiplies by them as they are where it can (A13 and later).
"""

from __future__ import annotations

from typing import Any

from edgepack.errors import require

SHARE = 0.5  # of zeros, from which on a weight is stored so
LEAST = 256  # numbers of a weight; smaller ones are not worth an operator
NOTHING = 1e-30  # smaller than any weight that is not zero


def store_sparse(model: Any) -> Any:
    """The same model, its zeros not stored."""
    optimize = require("coremltools.optimize.coreml", "coreml")
    how = optimize.OpThresholdPrunerConfig(threshold=NOTHING, minimum_sparsity_percentile=SHARE, weight_threshold=LEAST)
    return optimize.prune_weights(model, optimize.OptimizationConfig(global_config=how))
