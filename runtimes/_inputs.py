"""Check what a session is given, once per combination of shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepack.contracts import Arrays, TensorSpec
from edgepack.errors import InputError, nearest

REMEMBERED = 1024


class Gate:
    """Lets arrays through that fit an artifact's inputs; a combination seen before costs one look-up."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._names = {spec.name for spec in specs}
        self._seen: set[tuple[object, ...]] = set()

    def check(self, inputs: Arrays) -> None:
        """Raises InputError: an input is missing or unknown, or its dtype or shape does not fit."""
        try:
            signature = tuple([(name, array.dtype, array.shape) for name, array in inputs.items()])
        except AttributeError:
            self._refuse_values(inputs)
            raise
        if signature in self._seen:
            return
        self._check_names(inputs)
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self._specs:
            self._check_values(spec, inputs[spec.name], sizes)
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        self._seen.add(signature)

    def _refuse_values(self, inputs: Arrays) -> None:
        for name, value in inputs.items():
            if not isinstance(value, np.ndarray):
                raise InputError(f"input {name!r} is a {type(value).__name__}, expected a NumPy array")

    def _check_names(self, inputs: Arrays) -> None:
        for name in inputs:
            if name not in self._names:
                raise InputError(f"there is no input {name!r}", nearest(name, self._names))
        for spec in self._specs:
            if spec.name not in inputs:
                raise InputError(f"input {spec.name!r} is missing", f"inputs: {', '.join(s.name for s in self._specs)}")

    def _check_values(self, spec: TensorSpec, array: np.ndarray[Any, Any], sizes: dict[str, tuple[int, str]]) -> None:
        if array.dtype != np.dtype(spec.dtype):
            raise InputError(
                f"input {spec.name!r} is {array.dtype}, expected {spec.dtype}",
                f"array.astype({spec.dtype!r}) converts it",
            )
        expected = f"({', '.join(str(axis) for axis in spec.shape)})"
        if array.ndim != len(spec.shape):
            raise InputError(f"input {spec.name!r} has shape {array.shape}, expected {expected}")
        if array.size == 0:
            raise InputError(f"input {spec.name!r} is empty: shape {array.shape}")
        for size, axis in zip(array.shape, spec.shape, strict=True):
            if isinstance(axis, int) and size != axis:
                raise InputError(f"input {spec.name!r} has shape {array.shape}, expected {expected}")
            if isinstance(axis, str):
                other, name = sizes.setdefault(axis, (size, spec.name))
                if other != size:
                    raise InputError(
                        f"inputs {name!r} and {spec.name!r} differ in their axis {axis!r}: {other} and {size}"
                    )
