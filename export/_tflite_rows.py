"""Rows of a matrix by their places, as an operator that litert-torch turns into one gather.

Its own forms of ``gather`` and ``index_select`` turn negative places around and look for places out of bounds, with
operators that XNNPACK lacks. Places that a top-k found are neither.
"""

from __future__ import annotations

import functools
from typing import Any

from edgepack.errors import require


@functools.cache
def rows() -> Any:
    """(N, C), (K,) → (K, C); the operator, registered with PyTorch and litert-torch once."""
    import torch

    def rows(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return values.index_select(0, places)

    schema = "(Tensor values, Tensor places) -> Tensor"
    torch.library.custom_op("edgepack::rows", rows, mutates_args=(), schema=schema).register_fake(rows)
    found = torch.ops.edgepack.rows.default
    _lower(found)
    return found


def _lower(operator: Any) -> None:
    jax = require("jax", "tflite")
    lowerings = require("litert_torch.backend.lowerings._jax_lowerings.lowerings", "tflite")

    def gather(values: Any, places: Any) -> Any:
        numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
        sizes, mode = (1, values.shape[1]), jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
        return jax.lax.gather(values, places.astype("int32")[:, None], numbers, sizes, mode=mode)

    lowerings.lower_by_jax(operator)(gather)
