"""Layers of ±1 in ONNX as ``edgepack::BinaryConv``: weights of one bit, computed by XNOR and popcount.

::

    GreaterOrEqual → Where(1, −1) → Pad → Conv or Gemm with ±1      becomes      BinaryConv

A file without the operator is the reference: it computes the same whole numbers with floats, wherever ONNX is read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import counted
from edgepack.export._c_bits import BLOCK, bits_of, rows_of
from edgepack.export._c_pack import pack
from edgepack.operators import BINARY_CONV, DOMAIN

if TYPE_CHECKING:
    import onnx
    from edgepack.export._c_graph import Array

VERSION = 1
STRICT = {"GreaterOrEqual": False, "Greater": True}


def use_binary(model: onnx.ModelProto) -> list[str]:
    """Replace the layers of a model, in place; returns a note on what was left."""
    search = _Search(model.graph)
    made = {id(node): found for node in model.graph.node if (found := search.layer(node)) is not None}
    if not made:
        return ["binary = 'packed', but no layer computes with ±1 on signs"]
    nodes = []
    for node in model.graph.node:
        nodes += made.get(id(node), [type(node).FromString(node.SerializeToString())])
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(search.made)
    _drop_unused(model.graph)
    model.opset_import.add(domain=DOMAIN, version=VERSION)
    library = "edgepack's operator library, which its ONNX Runtime engine compiles where it loads the file"
    return [f"{library}, is needed by {counted(len(made), 'layer')}"]


@dataclass(eq=False)
class _Search:
    """Patterns in a graph.

    Attributes:
        made: new constants.
    """

    graph: onnx.GraphProto
    made: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writers = {name: node for node in self.graph.node for name in node.output}
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}

    def layer(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """What a convolution or product becomes; None for one that is not of ±1."""
        from onnx import helper

        weight = self._array(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if weight is None or not (np.abs(weight) == 1).all():
            return None
        values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        window = _window(values, weight) if node.op_type == "Conv" else _product(values, weight)
        if window is None:
            return None
        signs, pads = self._padding(self.writers.get(node.input[0]), window)
        found = self._compared(signs, window["inputs"]) if pads else None
        if found is None:
            return None
        return self._replaced(node, found, weight, {**window, **pads})

    def _array(self, name: str) -> Array | None:
        from onnx import numpy_helper

        tensor = self.tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def _padding(self, node: onnx.NodeProto | None, window: dict[str, int]) -> tuple[Any, dict[str, int]]:
        """The node before a Pad, and the padding of both; nothing where one pads with 0 and the other with −1."""
        sides = ("top", "left", "bottom", "right")
        own = {side: window.pop(side) for side in sides}
        if node is None or node.op_type != "Pad":
            return node, {**own, "zeros": int(any(own.values()))}
        ends = self._array(node.input[1])
        value = self._array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.float32(0)
        constant = {item.s for item in node.attribute if item.name == "mode"} <= {b"constant"}
        if (
            ends is None
            or value is None
            or not constant
            or len(node.input) > 3
            or value not in (-1, 0)
            or ends.min() < 0
        ):
            return None, {}
        half = len(ends) // 2
        if ends[:2].any() or ends[half : half + 2].any() or (any(own.values()) and value == -1 and ends.any()):
            return None, {}
        before, behind = ([*[0] * (4 - half), *part[2:]] for part in (ends[:half].tolist(), ends[half:].tolist()))
        both = dict(zip(sides, (*before, *behind), strict=True))
        return self.writers.get(node.input[0]), {
            **{side: own[side] + both[side] for side in sides}, "zeros": int(any(own.values()) or float(value) == 0)
        }  # fmt: skip

    def _compared(self, node: onnx.NodeProto | None, channels: int) -> tuple[str, Array] | None:
        """What is compared, and the least float of each channel that counts as +1."""
        if node is None or node.op_type != "Where":
            return None
        test, high, low = self.writers.get(node.input[0]), self._array(node.input[1]), self._array(node.input[2])
        if test is None or test.op_type not in STRICT or high is None or low is None:
            return None
        limit = self._array(test.input[1])
        if limit is None or high.size != 1 or low.size != 1 or (float(high.item()), float(low.item())) != (1.0, -1.0):
            return None
        limit = np.nextafter(limit, np.float32(np.inf)) if STRICT[test.op_type] else limit
        if limit.size not in (1, channels) or (limit.size > 1 and limit.ndim and channels not in limit.shape[:1]):
            return None
        return test.input[0], np.broadcast_to(limit.reshape(-1), (channels,)).astype(np.float32)

    def _replaced(
        self, node: onnx.NodeProto, found: tuple[str, Array], weight: Array, attributes: dict[str, int]
    ) -> list[onnx.NodeProto]:
        from onnx import helper, numpy_helper

        source, threshold = found
        result = node.output[0]
        names = [f"{result}_threshold", f"{result}_bits"]
        arrays = (threshold, packed(weight, attributes["groups"]))
        self.made += [numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)]
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
        sums = f"{result}_sums" if bias else result
        nodes = [helper.make_node(BINARY_CONV, [source, *names], [sums], domain=DOMAIN)]
        nodes[0].attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        if bias:
            values = self._array(bias)
            assert values is not None
            shaped = values.reshape(-1, *[1] * (weight.ndim - 2))
            self.made.append(numpy_helper.from_array(np.ascontiguousarray(shaped), f"{result}_bias"))
            nodes.append(helper.make_node("Add", [sums, f"{result}_bias"], [result]))
        return nodes


def packed(weight: Array, groups: int) -> Array:
    """±1 as bits in the operator's order; uint32 (groups, blocks, places, words, 16)."""
    rows, columns = (1, 1, *weight.shape[2:])[-2:]
    signs = weight.reshape(*weight.shape[:2], rows, columns) > 0
    words = bits_of(signs.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    whole = rows_of(words.transpose(1, 2, 3, 0), groups).transpose(3, 0, 1, 2)
    return pack(whole.astype(np.uint32), groups, rows * columns)


def _window(values: dict[str, Any], weight: Array) -> dict[str, int] | None:
    """Attributes of a convolution of one or two axes; None for others."""
    rank = weight.ndim - 2
    if rank not in (1, 2) or values.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    groups, pads = values.get("group", 1), values.get("pads", [0] * 2 * rank)

    def both(name: str) -> tuple[int, int]:
        sizes = values.get(name, [1] * rank)
        return (1, sizes[0]) if rank == 1 else (sizes[0], sizes[1])

    stride, dilation = both("strides"), both("dilations")
    before, behind = ((0, pads[0]), (0, pads[1])) if rank == 1 else (pads[:2], pads[2:])
    return {
        "inputs": weight.shape[1] * groups, "outputs": len(weight), "groups": groups,
        "rows": 1 if rank == 1 else weight.shape[2], "columns": weight.shape[-1],
        "stride_row": stride[0], "stride_column": stride[1],
        "dilation_row": dilation[0], "dilation_column": dilation[1],
        "top": before[0], "left": before[1], "bottom": behind[0], "right": behind[1],
    }  # fmt: skip


def _product(values: dict[str, Any], weight: Array) -> dict[str, int] | None:
    """Attributes of x · weightᵀ; None for other products."""
    if (
        values.get("transA", 0)
        or not values.get("transB", 0)
        or values.get("alpha", 1.0) != 1
        or values.get("beta", 1.0) != 1
    ):
        return None
    ones = dict.fromkeys(
        ("groups", "rows", "columns", "stride_row", "stride_column", "dilation_row", "dilation_column"), 1
    )
    return {"inputs": weight.shape[1], "outputs": len(weight), **ones, "top": 0, "left": 0, "bottom": 0, "right": 0}


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Nodes and constants that nothing reads any more."""
    while True:
        read = Counter(name for node in graph.node for name in node.input) + Counter(item.name for item in graph.output)
        idle = [node for node in graph.node if not any(read[name] for name in node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if not read[tensor.name]]:
        graph.initializer.remove(tensor)


assert BLOCK == 16  # as the operator has it
