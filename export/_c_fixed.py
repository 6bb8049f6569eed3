"""Requantization in integers: value · ratio as (value · multiplier) >> shift, halves rounded up.

The scheme is that of TFLite's integer kernels in their single-rounding form (Jacob et al., "Quantization and training
of neural networks for efficient integer-arithmetic-only inference", arXiv:1712.05877): a multiplier of 31 bits and one
rounding shift of the 64-bit product.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgepack.export._c_graph import Array

BITS, MOST = 31, 62  # of a multiplier; the largest shift
SUM_BITS = 20  # of multipliers in sums of two values, which are computed in 32 bits
LOW, HIGH = -128, 127


def fixed(ratio: Array | float, bits: int = BITS) -> tuple[Array, Array]:
    """Multipliers of at most ``bits`` bits and their shifts, int64, for positive ratios."""
    exact = np.atleast_1d(np.asarray(ratio, np.float64))
    _, exponent = np.frexp(exact)
    shift = np.clip(bits - exponent, 1, MOST)
    multiplier = np.rint(np.ldexp(exact, shift))
    wide = multiplier >= 2.0**bits
    multiplier, shift = np.where(wide, np.rint(multiplier / 2), multiplier), shift - wide
    return multiplier.astype(np.int64), shift.astype(np.int64)


def scaled(values: Array, multiplier: Array, shift: Array) -> Array:
    """What the kernels compute, for int64 values."""
    result: Array = (values * multiplier + (np.int64(1) << (shift - 1))) >> shift
    return result


def table(function: Callable[[Array], Array], source: tuple[float, int], target: tuple[float, int]) -> Array:
    """A function of 8-bit values as a table of 256, from −128 on; grids are (step, zero)."""
    values = (np.arange(LOW, HIGH + 1) - source[1]) * np.float64(source[0])
    found: Array = np.clip(np.rint(function(values) / target[0]) + target[1], LOW, HIGH).astype(np.int8)
    return found
