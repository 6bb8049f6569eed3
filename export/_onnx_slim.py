"""Make an ONNX model small without changing what it computes: names, notes and doubles go, weights may take 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING

from edgepack.export._dialects import exact_half

if TYPE_CHECKING:
    import onnx

DIGITS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"


def slim(model: onnx.ModelProto) -> None:
    """Strip names of nodes, notes, inner shapes and unused operator sets; share equal weights; shorten inner names."""
    share_initializers(model.graph)
    for graph in _graphs(model.graph):
        graph.ClearField("value_info")
        graph.ClearField("doc_string")
        graph.ClearField("metadata_props")
        graph.ClearField("quantization_annotation")
        graph.name = "g"  # the checker wants one
        for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
        for node in graph.node:
            node.ClearField("name")
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    _drop_operator_sets(model)
    _shorten(model.graph)


def share_initializers(graph: onnx.GraphProto) -> None:
    """Keep one of several equal weights."""
    seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    kept = []
    outputs = {value.name for value in graph.output}
    for tensor in graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        if tensor.raw_data and tensor.name not in outputs and seen.setdefault(key, tensor.name) != tensor.name:
            renamed[tensor.name] = seen[key]
        else:
            kept.append(tensor)
    if not renamed:
        return
    # clear() would free the kept tensors too, so they are copied into a fresh list first.
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
    graph.ClearField("initializer")
    graph.initializer.extend(copies)
    _rename(graph, lambda name: renamed.get(name, name))


def store_half(graph: onnx.GraphProto) -> int:
    """Store float32 weights that lie on the 16-bit grid as float16 with a Cast. Returns the bytes left in float32."""
    from onnx import TensorProto, helper, numpy_helper

    casts, left_bytes = [], 0
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        half = exact_half(numpy_helper.to_array(tensor))
        if half is None:
            left_bytes += len(tensor.raw_data)
            continue
        name, stored = tensor.name, f"{tensor.name}_half"
        tensor.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = list(graph.node)
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend([*casts, *copies])
    return left_bytes


def _drop_operator_sets(model: onnx.ModelProto) -> None:
    used = {node.domain for graph in _graphs(model.graph) for node in graph.node}
    used |= {node.domain for function in model.functions for node in function.node}
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain not in used | {""}:
            del model.opset_import[index]


def _shorten(graph: onnx.GraphProto) -> None:
    fixed = {value.name for value in (*graph.input, *graph.output)}
    fresh = (name for name in _short_names() if name not in fixed)
    names: dict[str, str] = {name: name for name in ("", *fixed)}

    def short(name: str) -> str:
        if name not in names:
            names[name] = next(fresh)
        return names[name]

    _rename(graph, short)


def _short_names() -> Iterator[str]:
    for number in count():
        name = DIGITS[number % 53]
        number //= 53
        while number:
            name += DIGITS[number % len(DIGITS)]
            number //= len(DIGITS)
        yield name


def _rename(graph: onnx.GraphProto, new: Callable[[str], str]) -> None:
    """Rename every value; ONNX names are unique across nested graphs, so one mapping serves all."""
    for part in _graphs(graph):
        for named in (*part.initializer, *part.input, *part.output):
            named.name = new(named.name)
        for node in part.node:
            node.input[:] = [new(name) for name in node.input]
            node.output[:] = [new(name) for name in node.output]


def _graphs(graph: onnx.GraphProto) -> Iterable[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)
