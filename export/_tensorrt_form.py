"""An ONNX model in the form TensorRT wants, written and read again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.export._onnx_slim import slim, store_half
from edgepack.export._tensorrt_rules import check_rules

if TYPE_CHECKING:
    import onnx


def write(model: onnx.ModelProto, path: Path, half: bool) -> list[str]:
    """Bring a model into form, check TensorRT's rules, write it small. Returns notes for the user.

    Raises:
        Unsupported: TensorRT cannot build it; names operator, node and what to use instead.
    """
    from onnx import checker

    cast_first(model.graph)
    left_bytes = store_half(model.graph) if half else 0
    check_rules(model)  # while nodes still have names to point at
    slim(model)
    data = model.SerializeToString(deterministic=True)
    checker.check_model(data, full_check=True)
    path.write_bytes(data)
    return [f"{left_bytes} bytes of biases and constants stay float32"] if left_bytes else []


def cast_first(graph: onnx.GraphProto) -> None:
    """Cast uint8 inputs to float32 before anything else: TensorRT does nothing but cast uint8.

    Only where the network moves the pixels and then casts them, so that no value changes.
    """
    from onnx import TensorProto, helper

    for value in graph.input:
        if value.type.tensor_type.elem_type != TensorProto.UINT8 or not _only_moved(graph, value.name):
            continue
        wide = f"{value.name}_float"
        for node in graph.node:
            node.input[:] = [wide if name == value.name else name for name in node.input]
        _drop_casts(graph, {wide, *(n.output[0] for n in graph.node if n.op_type == "Transpose" and wide in n.input)})
        graph.node.insert(0, helper.make_node("Cast", [value.name], [wide], "cast_first", to=TensorProto.FLOAT))


def _only_moved(graph: onnx.GraphProto, pixels: str) -> bool:
    """Whether every reader is Shape, a Cast to float32, or a Transpose that only such a Cast reads."""
    for node in graph.node:
        if pixels in node.input and node.op_type != "Shape" and not _to_float(node):
            readers = [reader for reader in graph.node if node.output[0] in reader.input]
            if node.op_type != "Transpose" or not readers or not all(_to_float(reader) for reader in readers):
                return False
    return True


def _to_float(node: onnx.NodeProto) -> bool:
    from onnx import TensorProto

    return node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT for a in node.attribute)


def _drop_casts(graph: onnx.GraphProto, floats: set[str]) -> None:
    """Remove casts to float32 of what is float32 now, and the types noted for it."""
    dropped = [node for node in graph.node if _to_float(node) and node.input[0] in floats]
    names = {node.output[0]: node.input[0] for node in dropped}
    for node in dropped:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for value in [value for value in graph.value_info if value.name in floats]:
        graph.value_info.remove(value)
