"""Two forms that torch.onnx does not write: products with activations rounded at run time, and 8-bit weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

    Array = np.ndarray[Any, Any]


def translations() -> dict[Any, Any]:
    """How torch.onnx is to write the operators of ranges found at run time."""
    import onnxscript
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operators

    op: Any = onnxscript.opset18
    operators = torch.ops.quantized_decomposed

    def ranged(x: Any, low: int, high: int, least: float, dtype: int) -> tuple[Any, Any]:
        _, step, zero = op.DynamicQuantizeLinear(x)
        return step, zero

    def rounded(x: Any, step: Any, zero: Any, low: int, high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, step, zero)

    def wide(x: Any, step: Any, zero: Any, low: int, high: int, dtype: int) -> Any:
        return op.DequantizeLinear(x, step, zero)

    return {
        operators.choose_qparams.tensor: ranged,
        operators.quantize_per_tensor.tensor: rounded,
        operators.dequantize_per_tensor.tensor: wide,
    }


def use_integer_products(model: onnx.ModelProto) -> None:
    """DynamicQuantizeLinear, QuantizeLinear, DequantizeLinear, MatMul → DynamicQuantizeLinear, MatMulInteger, Mul.

    ONNX Runtime computes these as one operator, DynamicQuantizeMatMul.
    """
    _Rewriting(model.graph).products()


def use_casts(model: onnx.ModelProto) -> None:
    """DequantizeLinear of a weight → Cast, Mul, which ONNX Runtime computes once, when it loads the file."""
    _Rewriting(model.graph).casts()


@dataclass(eq=False)
class _Rewriting:
    graph: onnx.GraphProto
    tensors: dict[str, onnx.TensorProto] = field(init=False)
    makers: dict[str, onnx.NodeProto] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def products(self) -> None:
        self._replace([(node, list(self._product(node))) for node in self.graph.node])

    def casts(self) -> None:
        self._replace([(node, list(self._cast(node))) for node in self.graph.node])

    def _product(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        from onnx import TensorProto, helper

        found = self._found_range(node)
        weight = None if found is None else self._weight(node)
        if found is None or weight is None:
            return
        values, scale = weight
        name = node.output[0]
        kept = [self._keep(f"{name}_{end}", array) for end, array in (("integers", values.T), ("scale", scale))]
        rounded, step, zero = found.output
        sums, floats, steps = (f"{name}_{end}" for end in ("sums", "floats", "steps"))
        bias = node.input[2] if len(node.input) > 2 else None
        yield helper.make_node("MatMulInteger", [rounded, kept[0], zero], [sums])
        yield helper.make_node("Cast", [sums], [floats], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [step, kept[1]], [steps])
        yield helper.make_node("Mul", [floats, steps], [name if bias is None else f"{name}_product"])
        if bias is not None:
            yield helper.make_node("Add", [f"{name}_product", bias], [name])

    def _found_range(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The operator that finds the range of what a product reads."""
        if node.op_type not in ("MatMul", "Gemm"):
            return None
        wide = self._maker(node.input[0], "DequantizeLinear")
        rounded = wide and self._maker(wide.input[0], "QuantizeLinear")
        return rounded and self._maker(rounded.input[1], "DynamicQuantizeLinear")

    def _weight(self, node: onnx.NodeProto) -> tuple[Array, Array] | None:
        """Integers, one row per output channel, and the scales of the rows."""
        turned = self._maker(node.input[1], "Transpose")
        wide = self._maker(turned.input[0] if turned is not None else node.input[1], "DequantizeLinear")
        return None if wide is None else self._stored(wide)

    def _stored(self, wide: onnx.NodeProto) -> tuple[Array, Array] | None:
        from onnx import TensorProto, numpy_helper

        tensor = self.tensors.get(wide.input[0])
        if tensor is None or tensor.data_type != TensorProto.INT8:
            return None
        return numpy_helper.to_array(tensor), numpy_helper.to_array(self.tensors[wide.input[1]])

    def _cast(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        from onnx import TensorProto, helper

        stored = self._stored(node) if node.op_type == "DequantizeLinear" else None
        if stored is None:
            return
        values, scale = stored
        name = node.output[0]
        steps = self._keep(f"{name}_steps", scale.reshape(-1, *[1] * (values.ndim - 1)))
        yield helper.make_node("Cast", [node.input[0]], [f"{name}_wide"], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{name}_wide", steps], [name])

    def _maker(self, name: str, kind: str) -> onnx.NodeProto | None:
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def _keep(self, name: str, array: Array) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _replace(self, written: list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]) -> None:
        """Put the new operators where the old ones stood, and take out what nothing reads any more."""
        nodes = [type(node).FromString(node.SerializeToString()) for old, new in written for node in (new or [old])]
        used = {value.name for value in self.graph.output}
        kept = []
        for node in reversed(nodes):
            if used.intersection(node.output):
                kept.append(node)
                used.update(node.input)
        tensors = [
            type(tensor).FromString(tensor.SerializeToString())
            for tensor in self.graph.initializer
            if tensor.name in used
        ]
        self.graph.ClearField("node")
        self.graph.ClearField("initializer")
        self.graph.node.extend(reversed(kept))
        self.graph.initializer.extend(tensors)
