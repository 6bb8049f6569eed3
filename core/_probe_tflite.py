"""Tiny TFLite models of one operator each, in float and in the forms that the format has.

The numbers are those of the ONNX models, in channels last. What integers must be is the float operator's result on the
rounded numbers, rounded to the output's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepack._probe_models import Array, Case, Form, Operator, Written, evaluate
from edgepack.errors import require

WEIGHTED: dict[str, Form] = {
    "s8s8": Form(signed=True),
    "s8s8 per tensor": Form(signed=True, channels=False),
    "s8s8 off centre": Form(signed=True, zero=-42),
    "d8": Form(dynamic=True),
    "w8": Form(signed=None),
    "w4": Form(signed=None, bits=4),
}
BARE: dict[str, Form] = {"s8": Form(signed=True), "s8 off centre": Form(signed=True, zero=-42)}
LEFT = Form(signed=True, left=True)  # an operator without weights in float, between the same integers
STEP = 1 / 64
UNIT = (1 / 256, -128)  # the one grid of results between 0 and 1
SAME_GRID = ("Concat", "AveragePool", "MaxPool")
WORDS = {
    "Conv": "CONV_2D", "ConvTranspose": "TRANSPOSE_CONV", "Gemm": "FULLY_CONNECTED", "MatMul": "FULLY_CONNECTED",
    "Add": "ADD", "Mul": "MUL", "Concat": "CONCATENATION", "AveragePool": "AVERAGE_POOL_2D",
    "GlobalAveragePool": "MEAN", "MaxPool": "MAX_POOL_2D", "Relu": "RELU", "LeakyRelu": "LEAKY_RELU",
    "HardSwish": "HARD_SWISH", "Sigmoid": "LOGISTIC", "Gelu": "GELU", "Softmax": "SOFTMAX",
}  # fmt: skip
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "HARD_SWISH": 1}  # of integers; others 2
HYBRID_VERSIONS = {"CONV_2D": 5, "DEPTHWISE_CONV_2D": 6, "FULLY_CONNECTED": 12}


def forms(operator: Operator) -> dict[str, Form]:
    """The forms an operator is tried in."""
    if not operator.weight:
        return BARE
    packed, plain = operator.kind in ("Gemm", "MatMul"), operator.kind != "ConvTranspose"
    return {name: form for name, form in WEIGHTED.items() if (form.bits == 8 or packed) and (not form.dynamic or plain)}


def written(case: Case, form: Form | None) -> Written:
    """The model with what it is fed and must answer."""
    scale, whole = (None, None) if case.weight is None else rounded(case, form)
    rounded_case = copy(case)
    rounded_case.weight = case.weight if form is None or scale is None or whole is None else whole * scale
    integer = form is not None and form.signed is not None and not form.dynamic
    inputs, floats = {}, {}
    for name, array in case.inputs(Form(signed=True)).items():
        zero = form.zero if form is not None and integer else 0
        floats[name] = ((array.astype(np.int32) - zero) * np.float32(STEP)).astype(np.float32)
        inputs[name] = last(array if integer else floats[name])
    result = last(evaluate(rounded_case.float_model(), floats)["y"])
    grid = grid_of(case.operator, result, form) if integer else None
    if grid is None:
        return Written("tflite", {"model.tflite": _File(case, form, grid).model(inputs, result)}, inputs, {"y": result})
    steps, zero = result.astype(np.float64) / grid[0], grid[1]
    answer = np.clip(np.rint(steps) + zero, -128, 127).astype(np.int8)
    files = {"model.tflite": _File(case, form, grid).model(inputs, answer)}
    return Written("tflite", files, inputs, {"y": answer}, steps, zero)


def rounded(case: Case, form: Form | None) -> tuple[Array, Array]:
    """Scale, of the weight's rank, and integers."""
    assert case.weight is not None
    axis, most = case.operator.axis, 127 if form is None or form.bits == 8 else 7
    others = tuple(index for index in range(case.weight.ndim) if index != axis)
    whole_axes = others if form is None or form.channels else None
    scale = (np.abs(case.weight).max(whole_axes, keepdims=True) / most).astype(np.float32)
    return scale, np.rint(case.weight / scale).astype(np.int8)


def grid_of(operator: Operator, result: Array, form: Form | None) -> tuple[float, int]:
    """Step and zero of a result."""
    if operator.kind in SAME_GRID:
        return STEP, form.zero if form is not None else 0
    if operator.kind in ("Sigmoid", "Softmax"):
        return UNIT
    low, high = min(float(result.min()), 0.0), max(float(result.max()), 1e-6)
    step = float(np.float32((high - low) / 255))
    return step, int(np.clip(round(-low / step) - 128, -128, 127))


def last(array: Array) -> Array:
    """Channels last, for images."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if array.ndim == 4 else array


@dataclass(eq=False)
class _File:
    """Writes one model."""

    case: Case
    form: Form | None
    grid: tuple[float, int] | None
    tensors: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.schema = require("ai_edge_litert.schema_py_generated", "tflite-run")
        self.kinds = {
            "float32": self.schema.TensorType.FLOAT32, "int8": self.schema.TensorType.INT8,
            "int32": self.schema.TensorType.INT32, "int4": self.schema.TensorType.INT4,
        }  # fmt: skip
        self.buffers = [self.schema.BufferT()]

    def model(self, inputs: dict[str, Array], answer: Array) -> bytes:
        own = None if self.grid is None else (STEP, self.form.zero if self.form else 0)
        given = {name: self._tensor(array.shape, str(array.dtype), own) for name, array in inputs.items()}
        output = self._tensor(answer.shape, str(answer.dtype), self.grid)
        if self.form is not None and self.form.left:
            read = [self._float(tensor) for tensor in given.values()]
            result = self._tensor(answer.shape, "float32")
            self._compute(read, result)
            self._operator("QUANTIZE", [result], output, 1)
        else:
            self._compute(list(given.values()), output)
        return self._packed(given, output)

    def _compute(self, read: list[int], output: int) -> None:
        operator = self.case.operator
        word, options = WORDS[operator.kind], self._options()
        if operator.kind == "MatMul" and not operator.weight:
            word, options = "BATCH_MATMUL", ("BatchMatMulOptions", {})
        if operator.kind == "Conv" and operator.attributes.get("group", 1) > 1:
            word, options = "DEPTHWISE_CONV_2D", ("DepthwiseConv2DOptions", {**options[1], "depthMultiplier": 1})
        if operator.kind == "Conv" and "pads" in operator.attributes:
            read = [self._padded(read[0]), *read[1:]]
        if operator.weight:
            read = [*read, *self._weights(word)]
        if word == "TRANSPOSE_CONV":
            shape = np.array(self.tensors[output].shape, np.int32)
            read = [self._constant(shape), read[1], read[0]]
        if word == "MEAN":
            read = [*read, self._constant(np.array([1, 2], np.int32))]
        self._operator(word, read, output, self._version(word), *options)

    def _version(self, word: str) -> int:
        if self.form is not None and self.form.dynamic:
            return HYBRID_VERSIONS[word]
        return 1 if self.grid is None or (self.form and self.form.left) else VERSIONS.get(word, 2)

    def _options(self) -> tuple[str, dict[str, Any]]:
        given, schema = self.case.operator.attributes, self.schema
        strides = {"strideH": given.get("strides", [1, 1])[0], "strideW": given.get("strides", [1, 1])[1]}
        valid = {"padding": schema.Padding.VALID, **strides}
        window = {"filterHeight": 2, "filterWidth": 2}
        dynamic = self.form is not None and self.form.dynamic
        return {
            "Conv": ("Conv2DOptions", {**valid, "dilationHFactor": 1, "dilationWFactor": 1}),
            "ConvTranspose": ("TransposeConvOptions", valid),
            "Gemm": ("FullyConnectedOptions", {"asymmetricQuantizeInputs": dynamic}),
            "MatMul": ("FullyConnectedOptions", {"keepNumDims": True, "asymmetricQuantizeInputs": dynamic}),
            "Add": ("AddOptions", {}),
            "Mul": ("MulOptions", {}),
            "Concat": ("ConcatenationOptions", {"axis": 3}),
            "AveragePool": ("Pool2DOptions", {**valid, **window}),
            "MaxPool": ("Pool2DOptions", {**valid, **window}),
            "GlobalAveragePool": ("ReducerOptions", {"keepDims": True}),
            "LeakyRelu": ("LeakyReluOptions", {"alpha": given.get("alpha", 0.01)}),
            "HardSwish": ("HardSwishOptions", {}),
            "Gelu": ("GeluOptions", {"approximate": False}),
            "Softmax": ("SoftmaxOptions", {"beta": 1.0}),
        }.get(self.case.operator.kind, ("", {}))

    def _padded(self, source: int) -> int:
        """With a border of zeros."""
        shape = [size + 2 * (place in (1, 2)) for place, size in enumerate(self.tensors[source].shape)]
        padded = self._tensor(shape, "float32" if self.grid is None else "int8", self._grid(source))
        ends = np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32)
        self._operator("PAD", [source, self._constant(ends)], padded, 1 if self.grid is None else 2, "PadOptions", {})
        return padded

    def _weights(self, word: str) -> list[int]:
        weight, form, operator = self.case.weight, self.form, self.case.operator
        assert weight is not None
        scale, whole = rounded(self.case, form)
        order = _order(operator)
        axis = order.index(operator.axis)
        if form is None:
            stored = self._constant(weight.transpose(order))
        else:
            grid = (scale.reshape(-1), 0)
            stored = self._constant(whole.transpose(order), "int4" if form.bits == 4 else "int8", grid, axis)
            if form.signed is None:
                stored = self._float(stored, 6 if form.bits == 4 else 2)
        if self.case.bias is None and (self.grid is None or word == "TRANSPOSE_CONV"):
            return [stored]
        bias = np.zeros(operator.weight[operator.axis], np.float32) if self.case.bias is None else self.case.bias
        if self.grid is None:
            return [stored, self._constant(bias)]
        steps = np.broadcast_to(scale.reshape(-1) * np.float32(STEP), bias.shape)
        whole_bias = np.rint(bias / steps).astype(np.int32)
        return [stored, self._constant(whole_bias, "int32", (steps if form and form.channels else steps[:1], 0))]

    def _float(self, source: int, version: int = 2) -> int:
        result = self._tensor(self.tensors[source].shape, "float32")
        self._operator("DEQUANTIZE", [source], result, version, "DequantizeOptions", {})
        return result

    def _grid(self, tensor: int) -> tuple[float, int] | None:
        how = self.tensors[tensor].quantization
        return None if how is None else (float(how.scale[0]), int(how.zeroPoint[0]))

    def _tensor(
        self, shape: Sequence[int], kind: str, grid: tuple[Any, int] | None = None, buffer: int = 0, axis: int = 0
    ) -> int:
        tensor = self.schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = list(shape), self.kinds[kind], buffer
        if grid is not None:
            tensor.quantization = self.schema.QuantizationParametersT()
            tensor.quantization.scale = np.atleast_1d(np.asarray(grid[0], np.float32))
            tensor.quantization.zeroPoint = np.full(len(tensor.quantization.scale), grid[1], np.int64)
            tensor.quantization.quantizedDimension = axis
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _constant(self, values: Array, kind: str = "", grid: tuple[Any, int] | None = None, axis: int = 0) -> int:
        buffer, values = self.schema.BufferT(), np.ascontiguousarray(values)
        flat = values.reshape(-1)
        stored = (flat[::2] & 15 | flat[1::2] << 4).astype(np.uint8) if kind == "int4" else values
        buffer.data = np.frombuffer(stored.tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self._tensor(values.shape, kind or str(values.dtype), grid, len(self.buffers) - 1, axis)

    def _operator(
        self, word: str, inputs: list[int], output: int, version: int, options: str = "",
        values: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        made = self.schema.OperatorT()
        made.opcodeIndex = list({**self.codes, word: version}).index(word)
        self.codes[word] = max(version, self.codes.get(word, 1))
        made.inputs, made.outputs = inputs, [output]
        if options:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            made.builtinOptions = getattr(self.schema, f"{options}T")()
            for name, value in (values or {}).items():
                setattr(made.builtinOptions, name, value)
        self.operators.append(made)

    def _packed(self, given: dict[str, int], output: int) -> bytes:
        flatbuffers = require("flatbuffers", "tflite-run")
        schema, main, model = self.schema, self.schema.SubGraphT(), self.schema.ModelT()
        main.tensors, main.operators, main.inputs, main.outputs = (
            self.tensors, self.operators, list(given.values()), [output],
        )  # fmt: skip
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [main], self.buffers, []
        for word, version in self.codes.items():
            code = schema.OperatorCodeT()
            code.builtinCode, code.version = getattr(schema.BuiltinOperator, word), version
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            model.operatorCodes.append(code)
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [self._named(name, tensor) for name, tensor in given.items()]
        signature.outputs = [self._named("y", output)]
        model.signatureDefs = [signature]
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _named(self, name: str, tensor: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry


def _order(operator: Operator) -> tuple[int, ...]:
    """How TFLite orders the axes of a weight."""
    if operator.kind == "Conv":
        return (1, 2, 3, 0) if operator.attributes.get("group", 1) > 1 else (0, 2, 3, 1)
    if operator.kind == "ConvTranspose":
        return (1, 2, 3, 0)
    return (1, 0) if operator.kind == "MatMul" else (0, 1)
