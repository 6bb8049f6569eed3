"""Stacks of samples: arrays by input name, joined along each tensor's batch axis.

The batch axis is the one the interface names ``batch`` (recurrent state often has it second), else the one it says
samples are stacked along, usually the first, of which a static interface takes a fixed number of rows per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgepack.contracts import Arrays, TensorSpec

Array = np.ndarray[Any, Any]


def batch_axis(spec: TensorSpec) -> int:
    return spec.shape.index("batch") if "batch" in spec.shape else spec.stacked


def rows_per_call(spec: TensorSpec) -> int:
    """Rows along the batch axis that one sample takes."""
    first = spec.shape[batch_axis(spec)] if spec.shape else 1
    return first if isinstance(first, int) else 1


def has_dynamic_batch(specs: Sequence[TensorSpec]) -> bool:
    return all("batch" in spec.shape for spec in specs)


def count(specs: Sequence[TensorSpec], arrays: Arrays) -> int:
    """Number of samples in a stack."""
    spec = specs[0]
    return int(arrays[spec.name].shape[batch_axis(spec)]) // rows_per_call(spec)


def take(specs: Sequence[TensorSpec], arrays: Arrays, start: int, stop: int) -> dict[str, Array]:
    """Samples ``start`` to ``stop`` (exclusive), contiguous."""
    taken = {}
    for spec in specs:
        rows, axis = rows_per_call(spec), batch_axis(spec)
        index = [slice(None)] * arrays[spec.name].ndim
        index[axis] = slice(start * rows, stop * rows)
        taken[spec.name] = np.ascontiguousarray(arrays[spec.name][tuple(index)])
    return taken


def resized(arrays: Arrays, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The same stack in the fixed sizes of other specs: cut, or repeated from the start; the batch axis stays."""
    return {spec.name: _resized(arrays[spec.name], spec) for spec in specs}


def _resized(values: Array, spec: TensorSpec) -> Array:
    places = [
        np.arange(size) % values.shape[axis] if isinstance(size, int) and axis != batch_axis(spec) else slice(None)
        for axis, size in enumerate(spec.shape)
    ]
    for axis, place in enumerate(places):
        values = values[(slice(None),) * axis + (place,)]
    return np.ascontiguousarray(values)


def join(specs: Sequence[TensorSpec], stacks: Sequence[Arrays]) -> dict[str, Array]:
    """Stacks, one after the other."""
    return {spec.name: np.concatenate([stack[spec.name] for stack in stacks], axis=batch_axis(spec)) for spec in specs}


def in_batches(specs: Sequence[TensorSpec], arrays: Arrays, size: int) -> Iterator[dict[str, Array]]:
    """Batches of at most ``size`` samples; single samples for a static interface."""
    step = size if has_dynamic_batch(specs) else 1
    total = count(specs, arrays)
    for start in range(0, total, step):
        yield take(specs, arrays, start, min(start + step, total))


def compute(
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    arrays: Arrays,
    size: int = 64,
) -> dict[str, Array]:
    """Outputs of ``run`` for a whole stack, computed batch by batch."""
    return join(outputs, [run(batch) for batch in in_batches(inputs, arrays, size)])
