"""Weights of 4 bits in OpenVINO: constants of type i4, two values in a byte.

The CPU engine takes them, and computes the layers that read them in float, also between rounded activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.export._packed import fits, nibbles, unpacked

NAME = "i4"


def pack(ov: Any, model: Any) -> None:
    """Store every weight that fits 4 bits in 4 bits, in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.i8 or not fits(node.data):
            continue
        data = nibbles(node.data)
        tensor = ov.Tensor(data, ov.Shape(list(node.data.shape)), ov.Type.i4)
        constant = ov.op.Constant(tensor, shared_memory=False)  # shared memory is gone before the file is written
        node.output(0).replace(constant.output(0))


def values(node: Any) -> np.ndarray[Any, Any]:
    """The values of a constant, one number each."""
    if node.get_element_type().to_string() != NAME:
        return np.asarray(node.data)
    return unpacked(np.asarray(node.data).view(np.uint8), node.get_output_shape(0))


def packed_values(ov: Any, path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """The values of a file's constants of 4 bits."""
    for node in ov.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() == NAME:
            yield values(node)
