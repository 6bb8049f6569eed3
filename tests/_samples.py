"""Arrays as the data of a task."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgepack.data import Batch


class Samples:
    """The rows of one array, for the input ``x``."""

    labels: tuple[str, ...] = ()

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = {"x": self.values[start : start + size]}
            yield Batch(part, part, None)
