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


def regroup(ov: Any, model: Any) -> None:
    """Weights with a scale per group of columns, in the form in which the engine knows them.

    ::

        (rows · groups, columns) · scales → (rows, all columns)
        becomes   (rows, groups, columns) · scales → (rows, all columns)
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape" or (found := _factors(node.input_value(0).get_node())) is None:
            continue
        integers, scale = (np.asarray(one.data) for one in found)
        rows = node.get_output_shape(0)[0]
        stored = ov.op.Constant(integers.reshape(rows, -1, integers.shape[1]).copy(), shared_memory=False)
        scales = ov.op.Constant(scale.reshape(rows, -1, 1).copy(), shared_memory=False)
        wide = ov.opset1.multiply(ov.opset1.convert(stored, "f32"), scales)
        node.output(0).replace(ov.opset1.reshape(wide, node.input_value(1), False).output(0))


def _factors(product: Any) -> tuple[Any, Any] | None:
    """The constants of integers · scales with a scale per row, None where a node is something else."""
    if product.get_type_name() != "Multiply":
        return None
    wide, scale = (product.input_value(place).get_node() for place in (0, 1))
    integers = wide.input_value(0).get_node() if wide.get_type_name() == "Convert" else wide
    if [one.get_type_name() for one in (integers, scale)] != ["Constant", "Constant"]:
        return None
    shape = list(integers.get_output_shape(0))
    return (integers, scale) if len(shape) == 2 and list(scale.get_output_shape(0)) == [shape[0], 1] else None


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
