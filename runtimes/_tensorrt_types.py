"""The types of a strongly typed network: the same ONNX graph, computing in another number format.

The file of an artifact computes in float32. Weights stored in 16 bits stand behind a Cast there; here they become
plain constants of the wanted type, so that every weight is a weight to TensorRT's parser.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import require

if TYPE_CHECKING:
    import onnx

HALF_MAX = 65504.0
FLOAT32_PREFIX = "float32_"
FLOAT32_INPUTS = {"Resize": (1, 2)}  # region and scales, float32 by ONNX's definition


def typed(data: bytes, compute: str) -> bytes:
    """An ONNX model whose network computes in ``compute``; its inputs and outputs stay as they are.

    Raises:
        MissingExtra: the package onnx is not installed.
    """
    onnx = require("onnx", "tensorrt-run")
    model = onnx.load_model_from_string(data)
    graph = model.graph
    _fold_casts(graph)
    if compute == "float16":
        _keep_float32(graph)
        _retype(graph)
        _cast_ends(graph)
    return bytes(model.SerializeToString(deterministic=True))


def _fold_casts(graph: onnx.GraphProto) -> None:
    """16-bit constant → Cast to float32 becomes a float32 constant."""
    from onnx import TensorProto, numpy_helper

    halves = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    folded = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in halves and _to_float(node)]
    for node in folded:
        wide = numpy_helper.to_array(halves[node.input[0]]).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(wide, node.output[0]))
        graph.node.remove(node)
    _drop_unread(graph)


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _to_float(node: onnx.NodeProto) -> bool:
    from onnx import TensorProto

    return any(attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in node.attribute)


def _keep_float32(graph: onnx.GraphProto) -> None:
    """Give inputs that stay float32 constants of their own."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for number, node in enumerate(graph.node):
        for index in FLOAT32_INPUTS.get(node.op_type, ()):
            if index < len(node.input) and node.input[index] in stored:
                copy = type(stored[node.input[index]]).FromString(stored[node.input[index]].SerializeToString())
                copy.name = f"{FLOAT32_PREFIX}{number}_{index}"
                graph.initializer.append(copy)
                node.input[index] = copy.name
    _drop_unread(graph)


def _retype(graph: onnx.GraphProto) -> None:
    from onnx import TensorProto

    exempt = {n.input[i] for n in graph.node for i in FLOAT32_INPUTS.get(n.op_type, ()) if i < len(n.input)}
    for tensor in _tensors(graph):
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in exempt - {""}:
            tensor.CopyFrom(_half(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            names = (node.op_type, attribute.name)
            if names in (("Cast", "to"), ("EyeLike", "dtype")) and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Stored tensors, in the graph and in attributes; Constant nodes of plain numbers become tensors."""
    from onnx import AttributeProto, numpy_helper

    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                value = np.asarray(attribute.f if attribute.name == "value_float" else list(attribute.floats))
                tensor = numpy_helper.from_array(value.astype(np.float32))
                attribute.Clear()
                attribute.name, attribute.type = "value", AttributeProto.TENSOR
                attribute.t.CopyFrom(tensor)
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t


def _half(tensor: onnx.TensorProto) -> Any:
    """A float32 tensor in 16 bits; finite values beyond the range become the largest there is."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    clipped = np.where(np.isfinite(values), np.clip(values, -HALF_MAX, HALF_MAX), values)
    return numpy_helper.from_array(clipped.astype(np.float16), tensor.name)


def _cast_ends(graph: onnx.GraphProto) -> None:
    """float32 inputs and outputs are cast where the network begins and ends."""
    from onnx import TensorProto, helper

    stored = {tensor.name for tensor in graph.initializer}
    first, last, names = [], [], {}
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in stored:
            names[value.name] = f"{value.name}_typed"
            first.append(helper.make_node("Cast", [value.name], [names[value.name]], to=TensorProto.FLOAT16))
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in names:
            names[value.name] = f"{value.name}_typed"
            last.append(helper.make_node("Cast", [names[value.name]], [value.name], to=TensorProto.FLOAT))
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    copies = [type(node).FromString(node.SerializeToString()) for node in graph.node]
    graph.ClearField("node")
    graph.node.extend([*first, *copies, *last])
