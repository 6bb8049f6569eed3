"""Weights looked up in tables: value = table[code], one table for consecutive output channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import InputError
from edgepack.export._dialects import _assign

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

Array = np.ndarray[Any, Any]


def codes_of(values: Array, tables: Array, name: str) -> Array:
    """Where each value stands in all tables laid one after the other, int64 in the shape of ``values``.

    Args:
        tables: (tables, entries), ascending.

    Raises:
        InputError: a value is in none of its table's places.
    """
    rows = values.reshape(len(tables), -1)
    places = np.stack([np.searchsorted(table, row).clip(0, tables.shape[1] - 1)
                       for table, row in zip(tables, rows, strict=True)])  # fmt: skip
    if not np.array_equal(np.take_along_axis(tables, places, 1), rows):
        raise InputError(f"the weight {name} is not of the values in the table that the plan gives", "compress again")
    codes: Array = places + tables.shape[1] * np.arange(len(tables))[:, None]
    return codes.reshape(values.shape)


def looked_up(module: GraphModule, reader: Node, name: str, codes: Array, tables: Array) -> Node:
    """A weight as what its codes find in its tables, before the operator that reads it."""
    import torch

    held = []
    with module.graph.inserting_before(reader):
        for suffix, array in (("tables", tables), ("codes", codes)):
            _assign(module, f"{name}_{suffix}", torch.from_numpy(np.ascontiguousarray(array)))
            held.append(module.graph.get_attr(f"{name}_{suffix}"))
        return module.graph.call_function(torch.ops.aten.take.default, tuple(held))
