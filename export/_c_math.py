"""Element by element, along axes, and softmax: operators of a captured graph → steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.export._alignment import word
from edgepack.export._c_graph import View
from edgepack.export._c_layers import Window
from edgepack.export._c_read import Reader, handles, wrapped

if TYPE_CHECKING:
    from torch.fx import Node

Given = Mapping[str, Any]
PLAIN = frozenset({
    "relu", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", "sqrt", "rsqrt", "exp", "log", "abs", "neg",
    "square", "reciprocal", "sin", "cos", "mish", "erf", "softsign",
})  # fmt: skip
INFINITE = float("inf")


def unary(reader: Reader, node: Node, source: View, function: str, *numbers: float) -> View:
    """One function of each value, with up to two numbers."""
    low, high = (*numbers, 0.0, 0.0)[:2]
    target = View.new("float32", source.shape, source.order)
    return reader.emit("unary_f32", node, [source], target, function=function, numbers=(float(low), float(high)))


@handles(*PLAIN)
def _plain(reader: Reader, node: Node, given: Given) -> View:
    name = word(node).removesuffix("_")
    if name == "relu":
        return unary(reader, node, given["self"], "clip", 0.0, INFINITE)
    return unary(reader, node, given["self"], name)


@handles("hardtanh", "relu6", "clamp", "clamp_min", "clamp_max", "clip")
def _clip(reader: Reader, node: Node, given: Given) -> View:
    if word(node).startswith("relu6"):
        return unary(reader, node, given["self"], "clip", 0.0, 6.0)
    ends = (given.get("min_val", given.get("min")), given.get("max_val", given.get("max")))
    if any(isinstance(end, View) for end in ends):
        raise reader.refused(node, "computed limits")
    low, high = (limit if end is None else float(end) for end, limit in zip(ends, (-INFINITE, INFINITE), strict=True))
    return unary(reader, node, given["self"], "clip", low, high)


@handles("leaky_relu", "elu", "softplus", "gelu")
def _curved(reader: Reader, node: Node, given: Given) -> View:
    name = word(node).removesuffix("_")
    if name == "leaky_relu":
        return unary(reader, node, given["self"], "leaky", given["negative_slope"])
    if name == "elu":
        if given["scale"] != 1 or given["input_scale"] != 1:
            raise reader.refused(node, "a scale")
        return unary(reader, node, given["self"], "elu", given["alpha"])
    if name == "softplus":
        return unary(reader, node, given["self"], "softplus", given["beta"], given["threshold"])
    return unary(reader, node, given["self"], "gelu_tanh" if given["approximate"] == "tanh" else "gelu")


@handles("pow")
def _power(reader: Reader, node: Node, given: Given) -> View:
    exponent = given["exponent"]
    if isinstance(exponent, View) or not isinstance(given["self"], View):
        raise reader.refused(node, "a computed exponent")
    if float(exponent) == 2:
        return unary(reader, node, given["self"], "square")
    return unary(reader, node, given["self"], "power", float(exponent))


@handles("prelu")
def _prelu(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["self"]
    if isinstance(given["weight"], View):
        raise reader.refused(node, "computed slopes")
    shape = (1, -1, *[1] * (len(source.sizes) - 2)) if len(source.sizes) > 1 else (-1,)
    slopes = reader.constant(given["weight"].detach().numpy().reshape(shape), source).expanded(source.shape)
    return reader.emit(
        "binary_f32", node, [source, slopes], View.new("float32", source.shape, source.order), operator="prelu"
    )


@handles("add", "sub", "mul", "div", "maximum", "minimum", "rsub")
def _binary(reader: Reader, node: Node, given: Given) -> View:
    name = word(node).removesuffix("_")
    if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
        raise reader.refused(node, "alpha or a rounding mode")
    shape = tuple(node.meta["val"].shape)
    like = next(
        value for value in (given["self"], given["other"]) if isinstance(value, View) and len(value.sizes) == len(shape)
    )
    views = [reader.view(value, like).expanded(shape) for value in (given["self"], given["other"])]
    if any(view.dtype != "float32" for view in views):
        raise reader.refused(node, "integers")
    if name == "rsub":
        views.reverse()
    largest = next((view for view in views if view.count == like.count and 0 not in view.strides), views[0])
    return reader.emit(
        "binary_f32", node, views, View.new("float32", shape, largest.order), operator=name.removeprefix("r")
    )


@handles("mean", "sum", "amax", "amin", "var", "std")
def _reduce(reader: Reader, node: Node, given: Given) -> View:
    source, name = given["self"], word(node)
    if source.dtype != "float32":
        raise reader.refused(node, "integers")
    axes = reduced_axes(given, len(source.sizes))
    if name not in ("var", "std"):
        return _kept(reduced(reader, node, source, name, axes), axes, given)
    correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
    count = int(np.prod([source.shape[axis] for axis in axes]))
    mean = reduced(reader, node, source, "mean", axes).expanded(source.shape)
    apart = reader.emit(
        "binary_f32", node, [source, mean], View.new("float32", source.shape, source.order), operator="sub"
    )
    found = reduced(reader, node, unary(reader, node, apart, "square"), "mean", axes)
    factor = count / max(count - (1 if correction is None else correction), 0) if count > 1 else float("nan")
    if factor != 1:
        found = unary(reader, node, found, "scale", factor)
    return _kept(unary(reader, node, found, "sqrt") if name == "std" else found, axes, given)


def reduced_axes(given: Given, rank: int) -> list[int]:
    asked = given.get("dim")
    asked = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    return sorted(wrapped(axis, rank) for axis in asked)


def reduced(reader: Reader, node: Node, source: View, name: str, axes: Sequence[int]) -> View:
    """Sums, means or extremes over axes, which stay with size one."""
    if name == "mean" and len(source.sizes) == 4 and list(axes) == [2, 3]:
        rows, columns = source.shape[2:]
        made = View.new("float32", (*source.shape[:2], 1, 1), (0, 2, 3, 1))
        image = reader.image(source, node)
        slide = Window((rows, columns), (rows, columns))
        return reader.emit("avg_pool_f32", node, [image], made, window=slide, counts=rows * columns)
    shape = [1 if axis in axes else size for axis, size in enumerate(source.shape)]
    made = View.new("float32", shape, source.order)
    return reader.emit("reduce_f32", node, [source], made, function=name, axes=list(axes))


def _kept(view: View, axes: Sequence[int], given: Given) -> View:
    if not given.get("keepdim", False):
        for axis in sorted(axes, reverse=True):
            view = view.without(axis)
    return view


@handles("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["self"]
    target = View.new("float32", source.shape, source.order)
    axis = wrapped(given["dim"], len(source.sizes))
    return reader.emit("softmax_f32", node, [source], target, axis=axis, log="log" in word(node))
