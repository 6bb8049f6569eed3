"""Tiny ONNX models of one operator each, in float and in every 8- and 4-bit form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]
OPSET = 21
BLOCK = 32  # columns that share a scale of a 4-bit weight


@dataclass(frozen=True)
class Operator:
    """What is tried.

    Attributes:
        kind: type in ONNX.
        shapes: of what it reads.
        weight: shape of its weight, empty for operators without.
        axis: of a weight's output channels.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    weight: tuple[int, ...] = ()
    axis: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """How numbers are stored.

    Attributes:
        signed: activations are −128…127; None where they are float.
        bits: of weights.
        channels: one scale per output channel of a weight, else one for all.
        dynamic: activations are rounded at run time.
        zero: the integer that stands for 0 in what is read, of signed ones.
        left: in float, between integers.
    """

    signed: bool | None = False
    bits: int = 8
    channels: bool = True
    dynamic: bool = False
    zero: int = 0
    left: bool = False


MAP, TOKENS = (1, 32, 28, 28), (1, 64, 192)
PADDED = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
OPERATORS: dict[str, Operator] = {
    "conv": Operator("Conv", (MAP,), (32, 32, 3, 3), attributes=PADDED),
    "conv of an image": Operator("Conv", ((1, 3, 56, 56),), (16, 3, 3, 3), attributes={**PADDED, "strides": [2, 2]}),
    "conv 1×1": Operator("Conv", (MAP,), (64, 32, 1, 1)),
    "conv depthwise": Operator("Conv", (MAP,), (32, 1, 3, 3), attributes={**PADDED, "group": 32}),
    "conv_transpose": Operator("ConvTranspose", (MAP,), (32, 16, 2, 2), 1, {"strides": [2, 2]}),
    "linear": Operator("Gemm", ((1, 512),), (512, 512), attributes={"alpha": 1.0, "beta": 1.0, "transB": 1}),
    "matmul": Operator("MatMul", (TOKENS,), (192, 192), 1),
    "product": Operator("MatMul", ((3, 64, 64), (3, 64, 64))),
    "add": Operator("Add", (MAP, MAP)),
    "mul": Operator("Mul", (MAP, MAP)),
    "cat": Operator("Concat", (MAP, MAP), attributes={"axis": 1}),
    "avg_pool": Operator("AveragePool", (MAP,), attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    "mean": Operator("GlobalAveragePool", (MAP,)),
    "max_pool": Operator("MaxPool", (MAP,), attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    "relu": Operator("Relu", (MAP,)),
    "leaky_relu": Operator("LeakyRelu", (MAP,), attributes={"alpha": 0.1}),
    "hardswish": Operator("HardSwish", (MAP,)),
    "sigmoid": Operator("Sigmoid", (MAP,)),
    "gelu": Operator("Gelu", (TOKENS,)),
    "softmax": Operator("Softmax", ((3, 64, 64),)),
}
WEIGHTED: dict[str, Form] = {
    "u8s8": Form(),
    "u8s8 per tensor": Form(channels=False),
    "s8s8": Form(signed=True),
    "d8": Form(dynamic=True),
    "w8": Form(signed=None),
    "w4": Form(signed=None, bits=4),
}
BARE: dict[str, Form] = {"u8": Form(), "s8": Form(signed=True)}


def forms(operator: Operator) -> dict[str, Form]:
    """The forms an operator is tried in."""
    if not operator.weight:
        return BARE
    products = operator.kind in ("Gemm", "MatMul")
    plain = operator.kind != "ConvTranspose"
    return {
        name: form
        for name, form in WEIGHTED.items()
        if (form.bits == 8 or products) and (not form.dynamic or plain)
    }  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A model, what it is fed, and what it must answer.

    Attributes:
        files: name → content.
        steps: what integer answers are the rounding of, from their zero; None where halves are rounded as answered.
        zero: of integer answers.
    """

    format: str
    files: dict[str, bytes]
    inputs: dict[str, Array]
    answers: dict[str, Array]
    steps: Array | None = None
    zero: int = 0


def written(case: Case, form: Form | None) -> Written:
    """An ONNX model, judged by the reference implementation of the format."""
    model = case.float_model() if form is None else case.model(form)
    inputs = case.inputs(form)
    return Written("onnx", {"model.onnx": model.SerializeToString()}, inputs, evaluate(model, inputs))


@dataclass(eq=False)
class Case:
    """One operator with its numbers; all of its models compute the same up to rounding."""

    operator: Operator
    weight: Array | None = field(init=False)
    bias: Array | None = field(init=False)
    result: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        numbers = np.random.default_rng(0)
        shape, axis = self.operator.weight, self.operator.axis
        self.weight = numbers.uniform(-1, 1, shape).astype(np.float32) if shape else None
        biased = shape and self.operator.kind in ("Conv", "Gemm")
        self.bias = numbers.uniform(-1, 1, shape[axis]).astype(np.float32) if biased else None
        self.result = evaluate(self.float_model(), self.inputs(None))["y"]

    def inputs(self, form: Form | None) -> dict[str, Array]:
        """What a model of this form is fed: integers for static ones."""
        numbers = np.random.default_rng(1)
        found: dict[str, Array] = {}
        for name, shape in zip("xz", self.operator.shapes, strict=False):
            whole = numbers.integers(0, 256, shape)
            step, zero = _step(False)
            exact = ((whole - zero) * step).astype(np.float32)
            if form is None or form.signed is None or form.dynamic:
                found[name] = exact
            else:
                found[name] = (whole - 128).astype(np.int8) if form.signed else whole.astype(np.uint8)
        return found

    def float_model(self) -> onnx.ModelProto:
        return _Graph(self, None).model()

    def model(self, form: Form) -> onnx.ModelProto:
        return _Graph(self, form).model()


def evaluate(model: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """What a model must compute, by the reference implementation of the format."""
    from onnx.reference import ReferenceEvaluator

    found: Any = ReferenceEvaluator(model).run(["y"], inputs)
    return {"y": np.asarray(found[0])}


def _step(signed: bool) -> tuple[float, int]:
    return 1 / 64, 0 if signed else 128


@dataclass(eq=False)
class _Graph:
    """Writes one model."""

    case: Case
    form: Form | None
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def model(self) -> onnx.ModelProto:
        from onnx import TensorProto, helper

        operator, form, result = self.case.operator, self.form, self.case.result
        kind = TensorProto.FLOAT
        if form is not None and form.signed is not None and not form.dynamic:
            kind = TensorProto.INT8 if form.signed else TensorProto.UINT8
        names = list("xz")[: len(operator.shapes)]
        if form is not None and form.dynamic:
            self._dynamic()
        else:
            read = [self._read(name) for name in names]
            weights = list(self._weights())
            self._node(operator.kind, [*read, *weights], "y" if kind == TensorProto.FLOAT else "f")
            if kind != TensorProto.FLOAT and result is not None:
                low, high = min(float(result.min()), 0.0), max(float(result.max()), 1e-6)
                step = np.float32((high - low) / 255)
                zero = round(-low / step) - (128 if form and form.signed else 0)
                self._round("f", step, zero)
        inputs = [helper.make_tensor_value_info(n, kind, s) for n, s in zip(names, operator.shapes, strict=True)]
        outputs = [helper.make_tensor_value_info("y", kind, None if result is None else result.shape)]
        graph = helper.make_graph(self.nodes, "probe", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        return model

    def _node(self, kind: str, inputs: list[str], output: str | list[str], **attributes: Any) -> str:
        from onnx import helper

        outputs = [output] if isinstance(output, str) else output
        given = self.case.operator.attributes if kind == self.case.operator.kind and not attributes else attributes
        self.nodes.append(helper.make_node(kind, inputs, outputs, f"{kind}_{len(self.nodes)}", **given))
        return outputs[0]

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _kind(self) -> Any:
        return np.int8 if self.form is not None and self.form.signed else np.uint8

    def _read(self, name: str) -> str:
        if self.form is None or self.form.signed is None:
            return name
        step, zero = _step(self.form.signed)
        parts = self._constant(f"{name}_step", np.float32(step)), self._constant(f"{name}_zero", self._kind()(zero))
        return self._node("DequantizeLinear", [name, *parts], f"{name}_value", axis=1)

    def _round(self, name: str, step: np.float32, zero: int) -> None:
        parts = self._constant("y_step", step), self._constant("y_zero", self._kind()(zero))
        self._node("QuantizeLinear", [name, *parts], "y", axis=1)

    def _weights(self) -> Iterator[str]:
        weight, form = self.case.weight, self.form
        if weight is None:
            return
        if form is None:
            yield self._constant("w", weight)
        elif form.bits == 4:
            yield self._four_bits(weight)
        else:
            whole, scale = self._whole(weight)
            zero = self._constant("w_zero", np.zeros(scale.shape, np.int8))  # Gemm is an integer one only with it
            parts = self._constant("w_whole", whole), self._constant("w_scale", scale), zero
            yield self._node("DequantizeLinear", list(parts), "w", axis=self.case.operator.axis)
        if self.case.bias is not None:
            yield self._bias(self.case.bias)

    def _bias(self, bias: Array) -> str:
        if self.form is None or self.form.signed is None:
            return self._constant("b", bias)
        assert self.case.weight is not None
        steps = np.broadcast_to(self._whole(self.case.weight)[1] * np.float32(_step(False)[0]), bias.shape)
        whole = np.rint(bias / steps).astype(np.int32)
        parts = self._constant("b_whole", whole), self._constant("b_scale", np.ascontiguousarray(steps))
        return self._node("DequantizeLinear", list(parts), "b", axis=0)

    def _whole(self, weight: Array) -> tuple[Array, Array]:
        axis = self.case.operator.axis
        others = tuple(index for index in range(weight.ndim) if index != axis)
        by_channel = self.form is not None and self.form.channels
        largest = np.abs(weight).max(others if by_channel else None)
        scale = np.float32(largest / 127)
        shaped = scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)]) if by_channel else scale
        return np.rint(weight / shaped).astype(np.int8), np.asarray(scale, np.float32)

    def _four_bits(self, weight: Array) -> str:
        from onnx import TensorProto, helper

        along = 1 - self.case.operator.axis
        blocks = np.abs(weight).reshape(
            (-1, BLOCK, weight.shape[1]) if along == 0 else (weight.shape[0], -1, BLOCK)
        ).max(1 if along == 0 else 2)  # fmt: skip
        scale = (blocks / 7).astype(np.float32)
        whole = np.rint(weight / np.repeat(scale, BLOCK, along)).astype(np.int8)
        packed = (whole.reshape(-1, 2)[:, 0] & 15 | whole.reshape(-1, 2)[:, 1] << 4).astype(np.uint8)
        self.constants.append(helper.make_tensor("w_whole", TensorProto.INT4, weight.shape, packed.tobytes(), raw=True))
        scaled = self._constant("w_scale", scale)
        return self._node("DequantizeLinear", ["w_whole", scaled], "w", axis=along, block_size=BLOCK)

    def _dynamic(self) -> None:
        """``DynamicQuantizeLinear`` → integer product → scaled; the bias in float."""
        operator = self.case.operator
        assert self.case.weight is not None
        whole, scale = self._whole(self.case.weight)
        self._node("DynamicQuantizeLinear", ["x"], ["x_whole", "x_step", "x_zero"])
        weight = self._constant("w_whole", np.ascontiguousarray(whole.T) if operator.kind == "Gemm" else whole)
        zero = self._constant("w_zero", np.int8(0))
        integer = "ConvInteger" if operator.kind == "Conv" else "MatMulInteger"
        shape = (1, -1, 1, 1) if operator.kind == "Conv" else (-1,)
        attributes = operator.attributes if operator.kind == "Conv" else {}
        self._node(integer, ["x_whole", weight, "x_zero", zero], "sum", **attributes)
        self._node("Cast", ["sum"], "sum_float", to=1)
        self._node("Mul", ["x_step", self._constant("w_scale", scale.reshape(shape))], "both")
        self._node("Mul", ["sum_float", "both"], "y" if self.case.bias is None else "f")
        if self.case.bias is not None:
            self._node("Add", ["f", self._constant("b", self.case.bias.reshape(shape))], "y")
