"""Planned weights as they are found again among a file's floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LIKENESS = 1e-3  # of a step; how far a float weight of the file may be from its integer


@dataclass(frozen=True)
class Weight:
    """A planned weight, output channels first, as PyTorch has it.

    Attributes:
        form: of the activations it meets: ``static``, ``dynamic`` or ``float``.
        readers: operators that read it.
    """

    name: str
    integers: Array
    scale: Array
    form: str = "static"
    readers: int = 1

    def stored(self, values: Array, axis: int) -> tuple[Array, Array] | None:
        """Integers and scales of a weight of the file if it is this one, up to a factor per channel."""
        if values.size != self.integers.size or values.shape[axis] != self.integers.shape[0]:
            return None
        last = np.moveaxis(self.integers, 1, -1) if self.integers.ndim > 1 else self.integers
        whole = (np.moveaxis(last, 0, -1) if axis else last).reshape(values.shape)
        tall = [-1 if place == axis else 1 for place in range(values.ndim)]
        if np.array_equal(whole * self.scale.astype(np.float32).reshape(tall), values):
            return whole, self.scale
        return _rescaled(whole, values, axis)


def _rescaled(whole: Array, values: Array, axis: int) -> tuple[Array, Array] | None:
    rows, floats = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (whole, values))
    place = np.abs(rows.astype(np.int16)).argmax(1)[:, None]
    top, bottom = np.take_along_axis(floats, place, 1), np.take_along_axis(rows, place, 1).astype(np.float64)
    factor = np.divide(top, bottom, out=np.ones_like(bottom), where=bottom != 0)
    if (factor == 0).any() or np.abs(floats / factor - rows).max(initial=0.0) > LIKENESS:
        return None
    sign = np.moveaxis(np.sign(factor).astype(np.int8).reshape(-1, *[1] * (whole.ndim - 1)), 0, axis)
    return whole * sign, np.abs(factor[:, 0]).astype(np.float32)
