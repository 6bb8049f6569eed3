"""Dynamic fixed point: a tensor is 16-bit integers with one exponent for all of them.

    value = integer · 2^exponent,    exponent = ⌊log2 of the largest magnitude⌋ − 14

Steps of two tensors then differ by a shift, so that sums of them are exact, and what a sum of products is multiplied by
is the scale of its weights, shifted. After D. Das et al., "Mixed Precision Training of Convolutional Neural Networks
using Integer Operations" (arXiv:1802.00930), with weights of 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepack.errors import Unsupported
from edgepack.export._integer_dialect import Dialect, Grid

Array = np.ndarray[Any, Any]
BITS = 16
LOW, HIGH = -(1 << (BITS - 1)), (1 << (BITS - 1)) - 1
SUM_BITS = 47  # of a sum that LiteRT multiplies by 15 bits in 64


@dataclass(frozen=True)
class FixedPoint(Dialect):
    """A dialect whose activations are in dynamic fixed point."""

    def grid(self, low: float, high: float, step: float | None = None, bits: int = BITS) -> Grid:
        return Grid(2.0 ** exponent(max(-low, high)), 0, LOW, HIGH)


def exponent(largest: float) -> int:
    """Of a tensor with this largest magnitude: the least with which that fits 16 bits."""
    if largest <= 0:
        return 0
    found = math.frexp(largest)[1] - 1 - (BITS - 2)
    return found + (round(math.ldexp(largest, -found)) > HIGH)


def largest_sum(integers: Array, bias: Array) -> int:
    """The largest magnitude that a sum of 16-bit integers times these weights, and a bias, can have.

    Args:
        integers: output channels first.
        bias: in units of the products.
    """
    rows = np.abs(integers.astype(np.int64)).reshape(len(integers), -1).sum(1)
    return int((rows * -LOW + np.abs(bias.astype(np.int64))).max(initial=0))


def hold_sums(sums: dict[str, int]) -> str:
    """That no sum overflows, as a sentence.

    Args:
        sums: weight → its largest sum.

    Raises:
        Unsupported: one can; names it.
    """
    for name, largest in sums.items():
        if largest >= 1 << SUM_BITS:
            raise Unsupported(
                f"sums of 16-bit values times {name} may take {largest.bit_length()} bits, engines have {SUM_BITS}",
                f"leave = [{name.removesuffix('.weight')!r}] in quantize",
            )
    widest = max(sums.values(), default=0).bit_length()
    short = sum(largest < 1 << 31 for largest in sums.values())
    return (f"no sum of products overflows: whatever is read, they take {widest} bits at most with the sign's "
            f"{widest + 1}, and LiteRT has {SUM_BITS + 1}; {short} of {len(sums)} layers would fit 32")  # fmt: skip
