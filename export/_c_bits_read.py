"""Layers of ±1 in a captured graph: comparisons, their signs, sums of them, and comparisons of those again.

::

    x ≥ threshold → ±1 → padding → convolution with ±1 → scale, bias, norm, activation → ≥ threshold → ±1 …
    pack_bits ─────────────────→ sign_bits or tree_bits ───────────────────────────────────────────────→ …

What stands between a sum of signs and the next comparison acts on each channel alone, so whether the comparison holds
depends on one whole number. Which numbers these are is found by asking PyTorch for all of them: no rounding is guessed.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.export._alignment import word
from edgepack.export._c_bits import WORD, Layer, Limits, around, bits_of, limits_of, weight_signs
from edgepack.export._c_graph import Array, View, channels_last
from edgepack.export._c_layers import Window, as_image, image_result, window
from edgepack.export._c_read import Lazy, Reader, as_array, bound, handles

if TYPE_CHECKING:
    from torch.fx import Node

Given = Mapping[str, Any]
COMPARISONS = {"ge": (False, False), "lt": (False, True), "gt": (True, False), "le": (True, True)}  # strict, opposite
NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
CHANNELWISE = frozenset({
    *NORMS, "mul", "add", "sub", "div", "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu",
    "neg", "sigmoid", "tanh",
})  # fmt: skip
Ends = tuple[tuple[int, int], tuple[int, int]]  # rows, columns
NONE: Ends = ((0, 0), (0, 0))


@dataclass(eq=False)
class Reached(Lazy):
    """Whether values reach a threshold (or exceed it, if ``strict``), or do not, if ``opposite``."""

    node: Node
    source: View | Sums
    threshold: Any
    strict: bool
    opposite: bool

    def read(self, reader: Reader, node: Node, given: Given) -> Any:
        if word(node) != "where" or given["condition"] is not self:
            return None
        high, low = (_single(given[name]) for name in ("self", "other"))
        if high is None or low is None:
            return None
        return Signs(node, self, *((low, high) if self.opposite else (high, low)))

    def floats(self, reader: Reader) -> View:
        raise reader.refused(self.node, "a result that is no choice between two numbers")

    def least(self) -> Array:
        """The smallest float32 that reaches the threshold."""
        limit = _numbers(self.threshold).astype(np.float32)
        return np.nextafter(limit, np.float32(np.inf)) if self.strict else limit


@dataclass(eq=False)
class Signs(Lazy):
    """``high`` where a threshold is reached, ``low`` elsewhere; between ``ends`` of ``value``, once it is padded."""

    node: Node
    reached: Reached
    high: float
    low: float
    ends: Ends = NONE
    value: float | None = None
    known: dict[Any, View] = field(default_factory=dict)

    def read(self, reader: Reader, node: Node, given: Given) -> Any:
        kind = word(node)
        if self.high != -self.low or self.high == 0:
            return None
        if kind == "pad" and given["mode"] == "constant":
            return self._padded(node, given["pad"], float(given["value"] or 0.0))
        if kind not in ("conv1d", "conv2d", "linear") or given["input"] is not self:
            return None
        return sums(reader, node, self, given)

    @property
    def size(self) -> float:
        return abs(self.high)

    def _padded(self, node: Node, pad: Sequence[int], value: float) -> Signs | None:
        sides = [(pad[place], pad[place + 1]) for place in range(0, len(pad), 2)]
        rank = len(node.meta["val"].shape) - 2
        known = self.ends == NONE or self.value == value
        if len(sides) > rank or rank > 2 or value not in (-self.size, 0.0) or not known or min(pad) < 0:
            return None
        return replace(self, node=node, ends=_more(self.ends, [*sides, (0, 0)][1::-1]), value=value)

    def floats(self, reader: Reader) -> View:
        if "floats" not in self.known:
            source, node = reader.view(self.reached.source), self.reached.node
            limit = self.reached.least()
            shape = limit.reshape((1,) * (len(source.sizes) - limit.ndim) + limit.shape)
            least = reader.constant(shape, source).expanded(source.shape)
            target = View.new("float32", source.shape, source.order)
            reader.emit("signs_f32", node, [source, least], target, high=self.high, low=self.low)
            self.known["floats"] = target
        view = self.known["floats"]
        ends = [(0, 0), (0, 0), *self.ends[2 - (len(view.sizes) - 2) :]]
        return view if self.value is None else reader.padded(view, ends, self.value, self.node)

    def packed(self, reader: Reader, groups: int, ends: Ends, linear: bool) -> View:
        """The bits as an image of words between zeros; computed once."""
        key = (groups, ends, linear)
        if key not in self.known:
            source, turned = self.reached.source, self.high < self.low
            limits = source.limits(reader, self.reached, turned, groups, linear) if isinstance(source, Sums) else None
            if isinstance(source, Sums) and limits is not None:
                whole, inner = _framed(reader, self.node, source.size, (source.layer.outputs, 1), ends)
                source.emit(reader, self.node, inner, limits=limits)
            else:
                whole = self._from_floats(reader, groups, ends, linear)
            self.known[key] = whole
        return self.known[key]

    def _from_floats(self, reader: Reader, groups: int, ends: Ends, linear: bool) -> View:
        view, least, turned = reader.view(self.reached.source), self.reached.least(), self.high < self.low
        if not _by_channel(least.shape, len(view.sizes), linear):
            view, least, turned = replace(self, ends=NONE).floats(reader), np.zeros(1, np.float32), False
        image = reader.image(_pixels(reader, self.node, view) if linear else as_image(view), self.node)
        batch, channels, height, width = image.shape
        whole, inner = _framed(reader, self.node, (batch, height, width), (channels, groups), ends)
        each = channels // groups
        threshold = np.full((groups, -(-each // WORD) * WORD), np.inf, np.float32)
        threshold[:, :each] = np.broadcast_to(least.reshape(-1), (channels,)).reshape(groups, each)
        turn = bits_of(np.full((groups, each), turned)).reshape(-1)
        reader.emit("pack_bits", self.node, [image], inner, threshold=threshold, turn=turn, groups=groups)
        return whole


@dataclass(eq=False)
class Sums(Lazy):
    """Sums of signs, and functions of each channel of them.

    Attributes:
        node: whose result this is; ``base`` is the layer's own, ``chain`` all since, in order.
        image, size: batch, rows and columns of what is read and of the result.
        linear: whether channels are the last axis.
    """

    node: Node
    base: Node
    signs: Signs
    layer: Layer
    image: tuple[int, int]
    size: tuple[int, int, int]
    linear: bool
    chain: tuple[Node, ...] = ()
    view: View | None = None

    def read(self, reader: Reader, node: Node, given: Given) -> Any:
        kind = word(node).removesuffix("_")
        if len(self.node.users) > 1 or not self._alone(reader, node):
            return None
        if kind in COMPARISONS and given["self"] is self:
            return Reached(node, self, given["other"], *COMPARISONS[kind])
        plain = given.get("alpha", 1) == 1 and given.get("rounding_mode") is None
        same = node.meta["val"].shape == self.node.meta["val"].shape
        return replace(self, node=node, chain=(*self.chain, node)) if kind in CHANNELWISE and same and plain else None

    def _alone(self, reader: Reader, node: Node) -> bool:
        """Whether all else that an operator reads is known, and the same at every place of a channel."""
        rank, norm = len(self.node.meta["val"].shape), word(node) in NORMS
        for source in node.all_input_nodes:
            value = reader.values.get(source)
            if value is self:
                continue
            if value is None or isinstance(value, (View, Lazy)) or not hasattr(value, "shape"):
                return False
            if not norm and not _by_channel(tuple(value.shape), rank, self.linear):
                return False
        return not (norm and self.linear and rank > 2)

    def limits(self, reader: Reader, reached: Reached, turned: bool, groups: int, linear: bool) -> Limits | None:
        """Which sums reach a threshold; None where bits cannot be written for the next layer, or not by a limit."""
        layer = self.layer
        single = layer.groups == groups == 1
        whole = layer.outputs // layer.groups % WORD == 0 and layer.outputs // groups % WORD == 0
        if linear != self.linear or not (single or whole):
            return None
        return limits_of(layer, lambda values: self._reach(reader, values, reached), turned)

    def _reach(self, reader: Reader, values: Array, reached: Reached) -> Array:
        """Whether sums reach a threshold, as PyTorch computes it; (candidates, channels) → bool of that shape."""
        import torch

        rank = len(self.node.meta["val"].shape)
        ones = (1,) * (rank - 2)
        value: Any = torch.from_numpy(values).reshape(
            (-1, *ones, values.shape[1]) if self.linear else (*values.shape, *ones)
        )
        before = self.base
        with torch.no_grad():
            for node in self.chain:
                known = ChainMap({before: value}, reader.values)
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: known[source])  # noqa: B023
                target: Any = node.target
                value, before = target(*args, **kwargs), node
            found = value > reached.threshold if reached.strict else value >= reached.threshold
        array: Array = found.reshape(values.shape).numpy()
        return array

    def emit(self, reader: Reader, node: Node, target: View, **options: Any) -> None:
        layer = self.layer
        slide = layer.window
        ends = ((slide.before[0], slide.behind[0]), (slide.before[1], slide.behind[1]))
        packed = self.signs.packed(reader, layer.groups, ends, self.linear)
        kernel = "sign_bits" if "limits" in options else "conv_bits"
        options |= {"layer": layer, "around": around(layer, self.image, self.size[1:]), "window": slide}
        reader.emit(kernel, node, [packed], target, **options)

    def floats(self, reader: Reader) -> View:
        if self.view is None:
            self.view = self._floats(reader)
        return self.view

    def _floats(self, reader: Reader) -> View:
        """Scale and shift in one with the sums, then one function after the other."""
        scale, shift = self.layer.scale.astype(np.float64), self.layer.bias.astype(np.float64)
        rest, last = list(self.chain), self.base
        while rest and (found := _affine(rest[0], last, reader, len(scale))) is not None:
            scale, shift, last = scale * found[0], shift * found[0] + found[1], rest.pop(0)
        made: Any
        if self.linear:
            made = View.new("float32", tuple(last.meta["val"].shape))
            wide = _pixels(reader, last, made)
        else:
            wide, made = image_result(reader, last, "float32")
        self.emit(reader, last, wide, scale=scale.astype(np.float32), shift=shift.astype(np.float32))
        for node in rest:
            made, last = reader.handler(node)(reader, node, bound(node, ChainMap({last: made}, reader.values))), node
        view: View = made
        return view


@handles(*COMPARISONS)
def _compare(reader: Reader, node: Node, given: Given) -> Reached:
    if not isinstance(given["self"], View) or isinstance(given["other"], (View, Lazy)):
        raise reader.refused(node, "a computed threshold")
    return Reached(node, given["self"], given["other"], *COMPARISONS[word(node).removesuffix("_")])


def sums(reader: Reader, node: Node, signs: Signs, given: Given) -> Sums | None:
    """A layer that adds signs; None where weights are not ± one number per output, or padding is of two kinds."""
    if isinstance(given["weight"], (View, Lazy)) or isinstance(given["bias"], (View, Lazy)):
        return None
    weight, shape = as_array(given["weight"]), tuple(node.meta["val"].shape)
    linear = word(node) == "linear"
    if linear:
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        slide, image, size, groups = Window((1, 1)), (1, rows), (1, 1, rows), 1
        weight = weight[:, :, None, None]
    else:
        slide, groups = window(given, weight.shape[2:], weight.ndim - 2), given["groups"]
        weight = weight.reshape(*weight.shape[:2], *slide.size)
        source = tuple(signs.reached.node.meta["val"].shape)
        image, size = ((1, *source[2:])[-2:], (shape[0], *(1, *shape[2:])[-2:]))
    own = any((*slide.before, *slide.behind))
    mixed = own and signs.ends != NONE and signs.value != 0
    found = weight_signs(weight)
    if found is None or mixed or (linear and signs.ends != NONE):
        return None
    (top, bottom), (left, right) = _more(signs.ends, list(zip(slide.before, slide.behind, strict=True)))
    slide = replace(slide, before=(top, left), behind=(bottom, right))
    bias = np.zeros(len(weight), np.float32) if given["bias"] is None else as_array(given["bias"])
    layer = Layer(found[0], found[1] * np.float32(signs.size), bias, slide, groups, own or signs.value == 0)
    return Sums(node, node, signs, layer, image, size, linear)


def _affine(node: Node, before: Node, reader: Reader, channels: int) -> tuple[Array, Array] | None:
    """Factor and shift per channel of a function; None where it is another."""
    given, kind = bound(node, ChainMap({before: None}, reader.values)), word(node).removesuffix("_")
    one, none = np.ones(channels), np.zeros(channels)
    if kind in NORMS:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (None if given[n] is None else _numbers(given[n]) for n in names)
        factor = (one if weight is None else weight) / np.sqrt(variance + given["eps"])
        return factor, (none if bias is None else bias) - mean * factor
    if kind not in ("mul", "add", "sub", "div"):
        return None
    first = given["self"] is None
    other = np.broadcast_to(_numbers(given["other" if first else "self"]).reshape(-1), (channels,))
    found = {"mul": (other, none), "add": (one, other), "sub": (one, -other) if first else (-one, other)}
    if kind == "div":
        return (1 / other, none) if first else None
    return found[kind]


def _framed(
    reader: Reader, node: Node, size: tuple[int, int, int], channels: tuple[int, int], ends: Ends
) -> tuple[View, View]:
    """Fresh memory for bits: all of it, and the part between zeros. ``channels``: how many, in how many groups."""
    words = channels[1] * -(-(channels[0] // channels[1]) // WORD)
    sides = [(0, 0), (0, 0), *ends]
    shape = [length + sum(side) for length, side in zip((size[0], words, *size[1:]), sides, strict=True)]
    whole = inner = View.new("uint32", shape, channels_last(4))
    if ends != NONE:
        reader.emit("border", node, [], whole, value=0, ends=sides)
        for axis in (2, 3):
            inner = inner.sliced(axis, sides[axis][0], sides[axis][0] + size[axis - 1])
    return whole, inner


def _pixels(reader: Reader, node: Node, view: View) -> View:
    """What a linear layer reads or gives, as an image of one row."""
    rows = int(np.prod(view.shape[:-1], dtype=np.int64))
    return reader.reshape(view, (1, 1, rows, view.shape[-1]), node).permuted((0, 3, 1, 2))


def _by_channel(shape: Sequence[int], rank: int, linear: bool) -> bool:
    """Whether a value of this shape is the same at every place of a channel."""
    wide = (1,) * (rank - len(shape)) + tuple(shape)
    return all(size == 1 or place == (rank - 1 if linear else 1) for place, size in enumerate(wide))


def _more(ends: Ends, sides: Sequence[tuple[int, int]]) -> Ends:
    (top, bottom), (left, right) = ((a + c, b + d) for (a, b), (c, d) in zip(ends, sides, strict=True))
    return (top, bottom), (left, right)


def _single(value: Any) -> float | None:
    """A known number; None for several, or one that is computed."""
    if isinstance(value, (View, Lazy)):
        return None
    found = _numbers(value)
    return float(found) if found.size == 1 else None


def _numbers(value: Any) -> Array:
    found: Array = np.asarray(value if isinstance(value, (int, float)) else as_array(value), np.float64)
    return found
