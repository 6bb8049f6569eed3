"""Tiny Core ML packages of one operator each, in float and in the forms that the format has.

Weights are bytes with one scale per channel or for all; activations pass through pairs of quantize and dequantize, so
inputs and results are floats that lie on their grids.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from edgepack._probe_models import Array, Case, Form, Operator, Written, evaluate
from edgepack._probe_tflite import STEP, grid_of, rounded
from edgepack.errors import require
from edgepack.silence import silence

WEIGHTED: dict[str, Form] = {
    "s8s8": Form(signed=True),
    "s8s8 per tensor": Form(signed=True, channels=False),
    "s8s8 off centre": Form(signed=True, zero=-42),
    "w8": Form(signed=None),
    "w8 per tensor": Form(signed=None, channels=False),
    "w4": Form(signed=None, bits=4),
}
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
BARE: dict[str, Form] = {"s8": Form(signed=True), "s8 off centre": Form(signed=True, zero=-42)}


def forms(operator: Operator) -> dict[str, Form]:
    """The forms an operator is tried in."""
    return WEIGHTED if operator.weight else BARE


def written(case: Case, form: Form | None) -> Written:
    """The package with what it is fed and must answer."""
    exact = copy(case)
    if case.weight is not None and form is not None:
        scale, whole = rounded(case, form)
        exact.weight = whole * scale
    zero = 0 if form is None or form.signed is None else form.zero
    inputs = {
        name: ((array.astype(np.int32) - zero) * np.float32(STEP)).astype(np.float32)
        for name, array in case.inputs(Form(signed=True)).items()
    }
    result = evaluate(exact.float_model(), inputs)["y"]
    grid = None if form is None or form.signed is None else grid_of(case.operator, result, form)
    if grid is not None:
        result = (np.clip(np.rint(result / grid[0]) + grid[1], -128, 127) - grid[1]) * np.float32(grid[0])
    return Written("coreml", _package(case, form, grid), inputs, {"y": result.astype(np.float32)})


def _package(case: Case, form: Form | None, grid: tuple[float, int] | None) -> dict[str, bytes]:
    with silence(), tempfile.TemporaryDirectory() as folder:
        ct = require("coremltools", "coreml")
        target = ct.target.iOS18 if form is not None and form.bits == 4 else ct.target.iOS17
        package = Path(folder) / "model.mlpackage"
        ct.convert(
            _program(case, form, grid, target), convert_to="mlprogram", minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True,
            package_dir=str(package),
        )  # fmt: skip
        paths = [path for path in sorted(package.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {WEIGHTS: b"", **files}  # the package names the folder, empty or not


def _program(case: Case, form: Form | None, grid: tuple[float, int] | None, target: Any) -> Any:
    mb = require("coremltools.converters.mil", "coreml").Builder
    operator = case.operator
    specs = [mb.TensorSpec(shape=shape) for shape in operator.shapes]
    own = None if grid is None or form is None else (STEP, form.zero)

    def body(*read: Any) -> Any:
        values = [_rounded(mb, value, own) for value in read]
        weight = _weight(mb, case, form)
        result = BUILT[operator.kind](mb, operator, [*values, *([] if weight is None else [weight])], case.bias)
        return mb.identity(x=_rounded(mb, result, grid), name="y")

    if len(specs) == 1:

        @mb.program(input_specs=specs, opset_version=target)  # type: ignore[untyped-decorator]
        def one(x: Any) -> Any:
            return body(x)

        return one

    @mb.program(input_specs=specs, opset_version=target)  # type: ignore[untyped-decorator]
    def two(x: Any, z: Any) -> Any:
        return body(x, z)

    return two


def _rounded(mb: Any, value: Any, grid: tuple[float, int] | None) -> Any:
    if grid is None:
        return value
    how = {"scale": np.float32(grid[0]), "zero_point": np.int8(grid[1])}
    return mb.dequantize(input=mb.quantize(input=value, output_dtype="int8", **how), **how)


def _weight(mb: Any, case: Case, form: Form | None) -> Any:
    if case.weight is None or form is None:
        return case.weight
    scale, whole = rounded(case, form)
    if form.bits == 4:
        types = require("coremltools.converters.mil.mil", "coreml").types
        narrow = types.nptype_from_builtin(types.string_to_builtin("int4"))
        return mb.constexpr_blockwise_shift_scale(data=whole.astype(narrow), scale=scale)
    flat = scale.reshape(-1)
    one = flat.size == 1
    return mb.constexpr_affine_dequantize(
        quantized_data=whole, scale=flat[0] if one else flat,
        zero_point=np.int8(0) if one else np.zeros(flat.size, np.int8), axis=case.operator.axis,
    )  # fmt: skip


def _conv(mb: Any, operator: Operator, read: list[Any], bias: Array | None) -> Any:
    given = operator.attributes
    pads = given.get("pads", [0, 0, 0, 0])
    return mb.conv(
        x=read[0], weight=read[1], bias=bias, strides=given.get("strides", [1, 1]), pad_type="custom",
        pad=[pads[0], pads[2], pads[1], pads[3]], groups=given.get("group", 1),
    )  # fmt: skip


def _pool(name: str) -> Callable[..., Any]:
    def built(mb: Any, operator: Operator, read: list[Any], bias: Array | None) -> Any:
        return getattr(mb, name)(x=read[0], kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")

    return built


def _plain(name: str, **options: Any) -> Callable[..., Any]:
    def built(mb: Any, operator: Operator, read: list[Any], bias: Array | None) -> Any:
        return getattr(mb, name)(**dict(zip("xy", read, strict=False)), **options)

    return built


BUILT: dict[str, Callable[..., Any]] = {
    "Conv": _conv,
    "ConvTranspose": lambda mb, operator, read, bias: mb.conv_transpose(
        x=read[0], weight=read[1], strides=operator.attributes["strides"], pad_type="valid"
    ),
    "Gemm": lambda mb, operator, read, bias: mb.linear(x=read[0], weight=read[1], bias=bias),
    "MatMul": _plain("matmul"),
    "Add": _plain("add"),
    "Mul": _plain("mul"),
    "Concat": lambda mb, operator, read, bias: mb.concat(values=read, axis=1),
    "AveragePool": _pool("avg_pool"),
    "MaxPool": _pool("max_pool"),
    "GlobalAveragePool": _plain("reduce_mean", axes=[2, 3], keep_dims=True),
    "Relu": _plain("relu"),
    "LeakyRelu": _plain("leaky_relu", alpha=0.1),
    "HardSwish": lambda mb, operator, read, bias: mb.mul(
        x=read[0], y=mb.sigmoid_hard(x=read[0], alpha=1 / 6, beta=0.5)
    ),
    "Sigmoid": _plain("sigmoid"),
    "Gelu": _plain("gelu", mode="EXACT"),
    "Softmax": _plain("softmax", axis=-1),
}
