"""Integer operators of a simulation → steps. ``_c_integer`` writes them as arithmetic, here they are read again.

Values that are wider than their memory are words about it, until a quantize operator ends the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.export._c_graph import Array, View, channels_last
from edgepack.export._c_layers import Window, as_image, convolve, image_result, linear, pooled, window
from edgepack.export._c_read import Phrase, Reader, as_array, handles, speaks

if TYPE_CHECKING:
    from torch.fx import Node

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Wide(Phrase):
    """Integers less their zero point."""

    view: View
    zero: int = 0


@dataclass(frozen=True)
class Total(Phrase):
    """Sums that wait for their rounding.

    Attributes:
        kind: ``conv``, ``linear``, ``pool``, ``sum``, ``product``.
        parts: what is summed.
        layer: arguments of the operator with weights or windows.
        multiplier, negative, shift: of the rounding, as far as it has been read.
    """

    kind: str
    parts: tuple[Wide, ...]
    layer: Given | None = None
    multiplier: Any = None
    negative: Any = None
    shift: Any = None
    factors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chosen(Phrase):
    """Multipliers by the sign of sums."""

    negative: Array
    positive: Array


@speaks("to")
def _to(reader: Reader, node: Node, given: Given) -> Any:
    source, dtype = given["self"], str(node.meta["val"].dtype).removeprefix("torch.")
    if isinstance(source, View):
        return Wide(source)
    return source.view if dtype == "int8" and isinstance(source, Wide) else source


@speaks("sub")
def _less(reader: Reader, node: Node, given: Given) -> Wide:
    wide: Wide = given["self"]
    return replace(wide, zero=wide.zero + int(given["other"]))


@speaks("conv1d", "conv2d")
def _conv(reader: Reader, node: Node, given: Given) -> Total:
    return Total("conv", (given["input"],), given)


@speaks("linear")
def _linear(reader: Reader, node: Node, given: Given) -> Total:
    return Total("linear", (given["input"],), {**given, "node": node})


@speaks("avg_pool2d")
def _pool(reader: Reader, node: Node, given: Given) -> Total:
    return Total("pool", (given["self"],), {**given, "node": node})


@speaks("max_pool1d", "max_pool2d", "upsample_nearest2d")
def _compare(reader: Reader, node: Node, given: Given) -> Wide:
    name = "input" if "input" in given else "self"
    return Wide(reader.handler(node)(reader, node, {**given, name: given[name].view}))


@speaks("lt")
def _below(reader: Reader, node: Node, given: Given) -> Total:
    total: Total = given["self"]
    return total


@speaks("where")
def _where(reader: Reader, node: Node, given: Given) -> Chosen:
    return Chosen(as_array(given["self"]), as_array(given["other"]))


@speaks("mul")
def _times(reader: Reader, node: Node, given: Given) -> Total:
    one: Any = given["self"]
    other = given["other"]
    if isinstance(one, Wide):
        if isinstance(other, Wide):
            return Total("product", (one, other))
        return Total("sum", (one,), factors=(int(other),))
    total: Total = one
    if isinstance(other, Chosen):
        return replace(total, multiplier=other.positive, negative=other.negative)
    return replace(total, multiplier=other if isinstance(other, int) else as_array(other))


@speaks("add")
def _plus(reader: Reader, node: Node, given: Given) -> Any:
    one, other = given["self"], given["other"]
    if isinstance(one, Wide):
        return replace(one, zero=one.zero - int(other))
    if isinstance(other, Total):
        return replace(one, parts=one.parts + other.parts, factors=one.factors + other.factors)
    return one  # half of the last place


@speaks("bitwise_right_shift")
def _shift(reader: Reader, node: Node, given: Given) -> Total:
    total: Total = given["self"]
    other = given["other"]
    return replace(total, shift=other if isinstance(other, int) else as_array(other))


@speaks("index")
def _index(reader: Reader, node: Node, given: Given) -> View:
    (places,) = given["indices"]
    view: View = places.view
    target = View.new("int8", view.shape, view.order)
    return reader.emit("table_s8", node, [view], target, table=as_array(given["self"]))


@handles("quantized_decomposed.quantize_per_tensor.default")
def _quantize(reader: Reader, node: Node, given: Given) -> View:
    source, zero, limits = given["input"], int(given["zero_point"]), (given["quant_min"], given["quant_max"])
    if isinstance(source, Total):
        return FORMS[source.kind](reader, node, source, (zero, *limits))
    target = View.new("int8", source.shape, source.order)
    inverse = float(np.float32(1.0 / given["scale"]))
    return reader.emit("quantize", node, [source], target, inverse=inverse, grid=(zero, *limits))


@handles("quantized_decomposed.dequantize_per_tensor.default")
def _dequantize(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["input"]
    target = View.new("float32", source.shape, source.order)
    return reader.emit("dequantize", node, [source], target, scale=given["scale"], zero=int(given["zero_point"]))


def _rounding(total: Total, grid: tuple[int, int, int], outputs: int) -> dict[str, Any]:
    """What kernels need to round sums, one value per output."""

    def spread(values: Any) -> Array | None:
        return None if values is None else np.broadcast_to(np.ravel(values), outputs).astype(np.int32)

    names = ("multiplier", "negative", "shift")
    return {"grid": grid, "zero": total.parts[0].zero, **{name: spread(getattr(total, name)) for name in names}}


def _emit_conv(reader: Reader, node: Node, total: Total, grid: tuple[int, int, int]) -> View:
    assert total.layer is not None
    given, (source,) = total.layer, total.parts
    weight = as_array(given["weight"]).astype(np.int8)
    slide = window(given, weight.shape[2:], weight.ndim - 2)
    weight = weight.reshape(*weight.shape[:2], *slide.size)
    padded = reader.padded(as_image(source.view), slide.ends, source.zero, node, channels_last(4))
    wide, made = image_result(reader, node, "int8")
    options = {"bias": as_array(given["bias"]).astype(np.int32), **_rounding(total, grid, len(weight))}
    image = reader.image(padded, node)
    convolve(reader, node, image, wide, weight=weight, window=slide, groups=given["groups"], **options)
    return made


def _emit_linear(reader: Reader, node: Node, total: Total, grid: tuple[int, int, int]) -> View:
    assert total.layer is not None
    weight = as_array(total.layer["weight"]).astype(np.int8)
    options = {"bias": as_array(total.layer["bias"]).astype(np.int32), **_rounding(total, grid, len(weight))}
    return linear(reader, node, total.parts[0].view, weight, **options)


def _emit_pool(reader: Reader, node: Node, total: Total, grid: tuple[int, int, int]) -> View:
    given = total.layer
    assert given is not None
    rows, columns = given["kernel_size"]
    slide = Window((rows, columns), tuple(given["stride"]))
    rounding = _rounding(total, grid, 1)
    return pooled(reader, given["node"], total.parts[0].view, slide, {**given, "divisor_override": 1}, **rounding)


def _emit_pair(reader: Reader, node: Node, total: Total, grid: tuple[int, int, int]) -> View:
    shape = tuple(node.meta["val"].shape)
    views = [part.view.expanded(shape) for part in total.parts]
    like = next((view for view in views if view.dense()), views[0])
    target = View.new("int8", shape, like.order)
    numbers = {"zeros": tuple(part.zero for part in total.parts), "grid": grid, "shift": int(np.ravel(total.shift)[0])}
    factors = total.factors or (int(total.multiplier), 0)
    return reader.emit(f"{total.kind}_s8", node, views, target, factors=factors, **numbers)


FORMS = {"conv": _emit_conv, "linear": _emit_linear, "pool": _emit_pool, "sum": _emit_pair, "product": _emit_pair}


@handles("_assert_tensor_metadata")
@speaks("_assert_tensor_metadata")
def _checked(reader: Reader, node: Node, given: Given) -> None:
    """What tracing adds about dtypes; nothing to compute."""
