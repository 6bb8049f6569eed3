"""Which weights of an ONNX file NVIDIA's sparse tensor cores can take: two of every four input channels at most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
STEPS = ("DequantizeLinear", "Cast", "Identity")  # between a stored weight and the operator that multiplies by it


def sparse_weights(path: Path) -> tuple[int, int]:
    """How many weights hold the pattern 2:4 along their input channels, and how many there are."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(path.read_bytes()).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for node, name, axis in _weights(graph.node):
        while name not in stored and name in makers and makers[name].op_type in STEPS:
            name = makers[name].input[0]
        if name in stored:
            found.append(_holds(numpy_helper.to_array(stored[name]), _axis(node, axis)))
    return sum(found), len(found)


def _weights(nodes: Any) -> Iterator[tuple[Any, str, int]]:
    """Operator, its second factor and the axis of input channels there."""
    for node in nodes:
        if node.op_type == "Conv":
            yield node, node.input[1], 1
        elif node.op_type in ("Gemm", "MatMul"):
            yield node, node.input[1], -2


def _axis(node: Any, axis: int) -> int:
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if turned else axis


def _holds(weight: Array, axis: int) -> bool:
    """Whether of each four neighbours along an axis two are zero."""
    if weight.ndim < 2 or weight.shape[axis] % 4:
        return False
    groups = np.moveaxis(np.asarray(weight, np.float32), axis, -1).reshape(-1, 4)
    return bool((np.count_nonzero(groups, axis=1) <= 2).all())
