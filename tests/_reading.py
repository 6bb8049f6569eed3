"""Open data, read all of it, or see how it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.data import Batch, open_data
from edgepack.errors import InputError
from edgepack.task import Input

RGB = Input("input", (1, 3, 6, 5), scale=255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GRAY = Input("input", (1, 1, 6, 5))


def all_of(data: Any, size: int = 3) -> Batch:
    """Every sample in one batch."""
    found = list(data.batches(size))
    assert all(len(batch) <= size for batch in found)
    assert sum(len(batch) for batch in found) == len(data)
    names = found[0].inputs
    targets = None if found[0].targets is None else np.concatenate([batch.targets for batch in found])
    return Batch(
        {name: np.concatenate([batch.inputs[name] for batch in found]) for name in names},
        {name: np.concatenate([batch.raw[name] for batch in found]) for name in names},
        targets,
    )


def refuse(spec: Any, inputs: Any, folder: Path, *texts: str, read: bool = False) -> None:
    def attempt() -> None:
        data = open_data(spec, inputs if isinstance(inputs, tuple) else (inputs,), folder)
        if read:
            all_of(data)

    with pytest.raises(InputError) as caught:
        attempt()
    for text in texts:
        assert text in str(caught.value)
