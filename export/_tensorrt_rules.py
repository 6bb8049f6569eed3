"""What TensorRT's ONNX parser takes: operators, types, constants, ranks and quantization, checked on the model.

Beside the table of operators these are the limits that the parser's public documentation states and its importers
assert.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import Unsupported
from edgepack.export._tensorrt_operators import ELSEWHERE, FAMILIES, INSTEAD, OPERATORS

if TYPE_CHECKING:
    import onnx

MAX_RANK = 8
MAX_K = 3840
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

Reason = tuple[str, str]


def check_rules(model: onnx.ModelProto) -> None:
    """Refuse what TensorRT's parser would refuse, or would quietly compute differently.

    Raises:
        Unsupported: names the operator, its node and what to use instead.
    """
    view = _View(model)
    for what, instead in view.interface():
        raise Unsupported(f"tensorrt: {what}", instead)
    for node in model.graph.node:
        for rule in (_known, _typed, _ranked, _quantized, RULES.get(node.op_type, _nothing)):
            reason = rule(node, view)
            if reason is not None:
                where = f"{node.op_type} {node.name or ', '.join(node.output)!r}"
                raise Unsupported(f"tensorrt: {where}: {reason[0]}", reason[1])


class _View:
    """Types, ranks and constants of a model by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(model, data_prop=True).graph
        self.graph = model.graph
        self.types = {t.name: t.data_type for t in graph.initializer}
        self.ranks: dict[str, int] = {t.name: len(t.dims) for t in graph.initializer}
        self.inputs = {value.name for value in graph.input} - set(self.types)
        self.outputs = {value.name for value in graph.output}
        for value in (*graph.value_info, *graph.input, *graph.output):
            self.types.setdefault(value.name, value.type.tensor_type.elem_type)
            if value.type.tensor_type.HasField("shape"):
                self.ranks.setdefault(value.name, len(value.type.tensor_type.shape.dim))
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)

    @cached_property
    def _stored(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.graph.initializer}

    def type_name(self, name: str) -> str:
        from onnx import TensorProto

        return str(TensorProto.DataType.Name(self.types.get(name, 0)))

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The value of an initializer or Constant node."""
        from onnx import helper, numpy_helper

        if name in self._stored:
            return np.asarray(numpy_helper.to_array(self._stored[name]))
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "Constant":
            return None
        value = helper.get_attribute_value(maker.attribute[0])
        return np.asarray(numpy_helper.to_array(value) if hasattr(value, "data_type") else value)

    def interface(self) -> Iterator[Reason]:
        """What is wrong with stored tensors, inputs and outputs."""
        for tensor in self.graph.initializer:
            if self.type_name(tensor.name) not in _stored_types():
                yield (
                    f"the constant {tensor.name!r} is {self.type_name(tensor.name).lower()}",
                    _cast("float32 or int32"),
                )
        for value in self.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                if re.search(r"\bu\d+\b", dim.dim_param):
                    yield f"the size of output {value.name!r} depends on data", "give it a fixed size, such as top-k"


def _known(node: onnx.NodeProto, view: _View) -> Reason | None:
    if node.domain not in ("", "ai.onnx"):
        return f"TensorRT has no operators of {node.domain!r}", ELSEWHERE
    if node.op_type not in OPERATORS:
        return "TensorRT's ONNX parser does not have it", INSTEAD.get(node.op_type, ELSEWHERE)
    return None


def _typed(node: onnx.NodeProto, view: _View) -> Reason | None:
    allowed = [name for family in OPERATORS[node.op_type] for name in FAMILIES[family]]
    name = _typed_tensor(node)
    found = view.type_name(name)
    if found not in allowed:
        if found == "UINT8" and name in view.inputs:
            return f"it reads the uint8 input {name!r}, which only Cast may", "cast to float32 first"
        if found == "INT32" and node.op_type == "DequantizeLinear":
            return "it holds a bias of 32-bit integers", "leave the bias of a quantized layer in float32"
        return f"it computes in {found.lower()}; TensorRT has it for {', '.join(allowed).lower()}", _cast("float32")
    if node.op_type == "Cast":
        return _cast_types(node, view)
    wide = _beyond_int32(node, view)
    return (
        (f"the constant {wide!r} is beyond int32", "TensorRT's indices have 32 bits: use smaller values")
        if wide
        else None
    )


def _cast_types(node: onnx.NodeProto, view: _View) -> Reason | None:
    found = view.type_name(node.output[0])
    if found == "UINT8" and node.output[0] not in view.outputs:
        return "uint8 is for inputs and outputs only", _cast("int32")
    if found not in _stored_types() and found != "UINT8":
        return f"it casts to {found.lower()}, which TensorRT does not have", _cast("float32 or int32")
    return None


def _ranked(node: onnx.NodeProto, view: _View) -> Reason | None:
    for name in (*node.input, *node.output):
        if name and name not in view.ranks:
            return f"the number of axes of {name!r} is not known", "give the network inputs of a fixed number of axes"
        if name and view.ranks[name] > MAX_RANK:
            return f"{name!r} has {view.ranks[name]} axes, TensorRT at most {MAX_RANK}", "reshape to fewer axes"
    return None


def _quantized(node: onnx.NodeProto, view: _View) -> Reason | None:
    """8-bit tensors only between QuantizeLinear and DequantizeLinear."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _scaled(node, view)
    if any(view.type_name(name) == "INT8" for name in (*node.input, *node.output)):
        return "int8 tensors may stand only between QuantizeLinear and DequantizeLinear", "quantize at this place"
    return None


def _scaled(node: onnx.NodeProto, view: _View) -> Reason | None:
    symmetric = "quantize symmetrically: int8 with a zero point of 0"
    quantizes = node.op_type == "QuantizeLinear"
    if view.type_name(node.output[0] if quantizes else node.input[0]) != "INT8":
        return "TensorRT quantizes to int8 only", symmetric
    if len(node.input) > 2 and node.input[2]:
        zero_point = view.constant(node.input[2])
        if zero_point is None or zero_point.any():
            return "its zero point is not a constant 0", symmetric
    if quantizes and _splits(node, view):
        return "it stands between a convolution and its ReLU, which TensorRT computes in one", "quantize behind Relu"
    scale = view.constant(node.input[1])
    if scale is None or not (scale > 0).all():
        return "its scales are not positive constants", "compute the scales before the export"
    if scale.size == 1:
        return None
    if scale.ndim != 1:
        return "it has scales per block", "one scale per tensor, or per output channel of weights"
    return None if view.constant(node.input[0]) is None and quantizes else _channels(node, view)


def _splits(node: onnx.NodeProto, view: _View) -> bool:
    """Whether only a ReLU reads what is quantized here, and a weighted operator made it."""
    maker = view.makers.get(node.input[0])
    pairs = [reader for after in view.readers[node.output[0]] for reader in view.readers[after.output[0]]]
    weighted = maker is not None and maker.op_type in WEIGHTED
    return weighted and bool(pairs) and all(reader.op_type == "Relu" for reader in pairs)


def _channels(node: onnx.NodeProto, view: _View) -> Reason | None:
    """Scales per channel are for weights, along the axis of output channels."""
    source = view.makers.get(node.input[0])
    weights = node.input[0] if source is None or source.op_type != "QuantizeLinear" else source.input[0]
    if view.constant(weights) is None:
        return "it has scales per channel of activations", "one scale per tensor; per channel is for weights"
    axis = int(_attribute(node, "axis", 1)) % max(view.ranks[node.input[0]], 1)
    for reader in view.readers[node.output[0]]:
        wanted = _output_axis(reader, view.ranks[node.output[0]])
        if wanted is not None and axis != wanted:
            return f"its scales follow axis {axis}, not the output channels of {reader.op_type}", f"use axis = {wanted}"
    return None


def _output_axis(node: onnx.NodeProto, rank: int) -> int | None:
    if node.op_type in ("Conv", "ConvTranspose"):
        return 0 if node.op_type == "Conv" else 1
    if node.op_type == "Gemm":
        return 0 if _attribute(node, "transB", 0) else 1
    return rank - 1 if node.op_type == "MatMul" else None


def _pool(node: onnx.NodeProto, view: _View) -> Reason | None:
    if any(step != 1 for step in _attribute(node, "dilations", [])):
        return "TensorRT pools without dilation only", "a smaller stride, or a dilated convolution"
    if len(node.output) > 1 and node.output[1]:
        return "TensorRT does not return the indices of the maxima", "drop the indices; upsample with Resize"
    return None


def _convolution(node: onnx.NodeProto, view: _View) -> Reason | None:
    spatial = view.ranks[node.input[0]] - 2
    if not 1 <= spatial <= 3:
        return f"it has {spatial} spatial axes, TensorRT 1 to 3", ELSEWHERE
    if not all(_fixed(name, view) for name in node.input[1:] if name):
        return _needs_constant("weights")
    return _bias(node, view)


def _bias(node: onnx.NodeProto, view: _View) -> Reason | None:
    maker = view.makers.get(node.input[2]) if len(node.input) > 2 else None
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    return "its bias is quantized", "leave the bias of a quantized layer in float32"


def _resize(node: onnx.NodeProto, view: _View) -> Reason | None:
    where = _word(node, "coordinate_transformation_mode", "half_pixel")
    nearest = _word(node, "nearest_mode", "round_prefer_floor")
    if where not in ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"):
        return f"TensorRT does not have the coordinates {where!r}", "half_pixel, asymmetric or align_corners"
    if where == "tf_half_pixel_for_nn" and nearest != "round_prefer_floor":
        return f"TensorRT does not round {nearest!r} with {where!r}", "round_prefer_floor"
    if _attribute(node, "antialias", 0):
        return "TensorRT does not antialias", "antialias = False, or average pooling before it"
    if _word(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "TensorRT stretches only", "give the output size itself"
    return None


def _top_k(node: onnx.NodeProto, view: _View) -> Reason | None:
    k = view.constant(node.input[1])
    if k is None:
        return _needs_constant("k")
    if int(k.ravel()[0]) > MAX_K:
        return f"k is {int(k.ravel()[0])}, TensorRT takes at most {MAX_K}", "select in two steps, or in the application"
    if not _attribute(node, "sorted", 1):
        return "TensorRT sorts what it selects", "sorted = True"
    return None


def _constant_input(index: int, what: str) -> Callable[[Any, _View], Reason | None]:
    def rule(node: onnx.NodeProto, view: _View) -> Reason | None:
        present = len(node.input) > index and node.input[index]
        return None if not present or view.constant(node.input[index]) is not None else _needs_constant(what)

    return rule


def _attribute_is(name: str, usual: Any, what: str, instead: str) -> Callable[[Any, _View], Reason | None]:
    def rule(node: onnx.NodeProto, view: _View) -> Reason | None:
        value = _attribute(node, name, usual)
        value = value.decode() if isinstance(value, bytes) else value
        return None if value == usual else (what, instead)

    return rule


def _first_output(node: onnx.NodeProto, view: _View) -> Reason | None:
    return ("TensorRT has its first output only", ELSEWHERE) if any(node.output[1:]) else None


def _grid_sample(node: onnx.NodeProto, view: _View) -> Reason | None:
    rank = view.ranks[node.input[0]]
    return None if rank == 4 else (f"its input has {rank} axes, TensorRT samples images (4 axes)", ELSEWHERE)


def _lp(node: onnx.NodeProto, view: _View) -> Reason | None:
    if _attribute(node, "p", 2) not in (1, 2):
        return f"p is {_attribute(node, 'p', 2)}, TensorRT has 1 and 2", "p = 1 or 2"
    return _pool(node, view) if node.op_type == "LpPool" else None


def _recurrent(node: onnx.NodeProto, view: _View) -> Reason | None:
    if _attribute(node, "layout", 0) or _attribute(node, "input_forget", 0):
        return "TensorRT has neither batch-first layout nor coupled gates", "layout = 0 and input_forget = 0"
    words = list(_attribute(node, "activations", []))
    if words[: len(words) // 2] != words[len(words) // 2 :] and _word(node, "direction", "") == "bidirectional":
        return "both directions must have the same activations", "use the same activations"
    return None


def _nothing(node: onnx.NodeProto, view: _View) -> Reason | None:
    return None


_AXES = _constant_input(1, "axes")
RULES: dict[str, Callable[[Any, _View], Reason | None]] = {
    **dict.fromkeys(("AveragePool", "MaxPool"), _pool),
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    "Gemm": _bias,
    **dict.fromkeys(("LpPool", "LpNormalization"), _lp),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys(("Squeeze", "Unsqueeze", *(name for name in OPERATORS if name.startswith("Reduce"))), _AXES),
    "BatchNormalization": _attribute_is(
        "training_mode", 0, "it is in training mode", "module.eval() before the export"
    ),
    "CumSum": _constant_input(1, "axis"),
    "Dropout": _constant_input(2, "training mode"),
    "GridSample": _grid_sample,
    "LayerNormalization": _first_output,
    "OneHot": _constant_input(1, "depth"),
    "Pad": _constant_input(3, "axes"),
    "Resize": _resize,
    "ScatterElements": _attribute_is("reduction", "none", "TensorRT scatters without reduction", "add after a scatter"),
    "ScatterND": _attribute_is("reduction", "none", "TensorRT scatters without reduction", "add after a scatter"),
    "Slice": _constant_input(3, "axes"),
    "TopK": _top_k,
}


def _typed_tensor(node: onnx.NodeProto) -> str:
    """The tensor whose type the support matrix is about."""
    if node.op_type in ("Constant", "ConstantOfShape", "EyeLike"):
        return str(node.output[0])
    return str(node.input[1 if node.op_type == "Where" else 0])


def _fixed(name: str, view: _View) -> bool:
    """A constant, or one behind operators that only change its type."""
    maker = view.makers.get(name)
    while maker is not None and maker.op_type in ("Cast", "DequantizeLinear", "QuantizeLinear", "Identity"):
        name = maker.input[0]
        maker = view.makers.get(name)
    return view.constant(name) is not None


def _beyond_int32(node: onnx.NodeProto, view: _View) -> str | None:
    if node.op_type == "Slice":  # its ends are clamped to the axis by definition
        return None
    for name in node.input:
        if view.type_name(name) == "INT64" and (value := view.constant(name)) is not None and value.size:
            info = np.iinfo(np.int32)
            if value.min() < info.min or value.max() > info.max:
                return str(name)
    return None


def _stored_types() -> tuple[str, ...]:
    return tuple(name for family in "fibq" for name in FAMILIES[family])


def _attribute(node: onnx.NodeProto, name: str, usual: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), usual)


def _word(node: onnx.NodeProto, name: str, usual: str) -> str:
    value = _attribute(node, name, usual)
    return value.decode() if isinstance(value, bytes) else str(value)


def _cast(kind: str) -> str:
    return f"cast to {kind} in the network"


def _needs_constant(what: str) -> Reason:
    return f"TensorRT wants its {what} constant", f"compute the {what} before the export"
