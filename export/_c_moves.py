"""Operators that only move values: other sizes, other orders of axes, parts, joins, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.export._alignment import word
from edgepack.export._c_graph import Array, View
from edgepack.export._c_read import SPEAKERS, Reader, handles, wrapped

if TYPE_CHECKING:
    from torch.fx import Node


@handles("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as")
def _view(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    return reader.reshape(given["self"], tuple(node.meta["val"].shape), node)


@handles("contiguous", "clone", "alias", "detach", "dropout", "lift_fresh_copy", "feature_dropout")
def _same(reader: Reader, node: Node, given: Mapping[str, Any]) -> Any:
    return next(value for value in given.values() if isinstance(value, View))


@handles("to", "_to_copy", "type_as")
def _to(reader: Reader, node: Node, given: Mapping[str, Any]) -> Any:
    source: View = given["self"]
    target = str(node.meta["val"].dtype).removeprefix("torch.")
    if target == source.dtype:
        return source
    if source.dtype == "int8":
        return SPEAKERS["to"](reader, node, given)
    if (source.dtype, target) != ("uint8", "float32"):
        raise reader.refused(node, f"a conversion from {source.dtype} to {target}")
    return reader.emit("cast", node, [source], View.new("float32", source.shape, source.order))


@handles("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes")
def _permute(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    view: View = given["self"]
    rank = len(view.sizes)
    if word(node) == "permute":
        return view.permuted([wrapped(axis, rank) for axis in given["dims"]])
    if word(node) == "movedim":
        raise reader.refused(node)
    axes = list(range(rank))
    one, two = (wrapped(given.get(name, default), rank) for name, default in _swap(given, rank))
    axes[one], axes[two] = axes[two], axes[one]
    return view.permuted(axes)


def _swap(given: Mapping[str, Any], rank: int) -> tuple[tuple[str, int], tuple[str, int]]:
    names = ("axis0", "axis1") if "axis0" in given else ("dim0", "dim1")
    return (names[0], 0), (names[1], rank - 1)


@handles("squeeze", "unsqueeze")
def _squeeze(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    view: View = given["self"]
    if word(node).startswith("unsqueeze"):
        return view.with_axis(wrapped(given["dim"], len(view.sizes) + 1))
    asked = given.get("dim", range(len(view.sizes)))
    axes = [wrapped(axis, len(view.sizes)) for axis in ([asked] if isinstance(asked, int) else asked)]
    for axis in sorted(axes, reverse=True):
        view = view.without(axis) if view.shape[axis] == 1 else view
    return view


@handles("slice", "select", "narrow")
def _slice(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    view: View = given["self"]
    axis = wrapped(given["dim"], len(view.sizes))
    size = view.shape[axis]
    if word(node) == "select":
        return view.sliced(axis, (place := wrapped(given["index"], size)), place + 1).without(axis)
    if word(node) == "narrow":
        return view.sliced(axis, given["start"], given["start"] + given["length"])
    start, stop, step = slice(given["start"], given["end"], given["step"]).indices(size)
    return view.sliced(axis, start, max(start, stop), step)


@handles("expand", "expand_as")
def _expand(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    view: View = given["self"]
    return view.expanded(tuple(node.meta["val"].shape))


@handles("split", "split_with_sizes", "chunk", "unbind")
def _split(reader: Reader, node: Node, given: Mapping[str, Any]) -> list[View]:
    view: View = given["self"]
    axis, start, parts = wrapped(given["dim"], len(view.sizes)), 0, []
    if word(node) == "unbind":
        return [view.sliced(axis, place, place + 1).without(axis) for place in range(view.shape[axis])]
    for value in node.meta["val"]:
        size = int(value.shape[axis])
        parts.append(view.sliced(axis, start, start + size))
        start += size
    return parts


@handles("cat", "concat", "stack")
def _cat(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    shape = tuple(node.meta["val"].shape)
    views = [reader.view(value) for value in given["tensors"]]
    axis = wrapped(given["dim"], len(shape))
    if word(node) == "stack":
        views = [view.with_axis(axis) for view in views]
    views = [view for view in views if view.count]
    made = View.new(views[0].dtype, shape, views[0].order)
    start = 0
    for view in views:
        reader.copy(view, made.sliced(axis, start, start + view.shape[axis]), node)
        start += view.shape[axis]
    return made


@handles("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def _pad(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    view: View = given["self"]
    pairs = list(zip(given.get("pad", given.get("padding")), given.get("pad", given.get("padding"))[1:], strict=False))
    ends = [(0, 0)] * (len(view.sizes) - len(pairs[::2])) + pairs[::2][::-1]
    mode = {"c": "constant"}.get(word(node)[0], given.get("mode", word(node)[:7].replace("replica", "replicate")))
    if mode == "constant":
        return reader.padded(view, ends, float(given.get("value") or 0.0), node)
    if not mode.startswith(("reflect", "replicate")):
        raise reader.refused(node, f"mode {mode!r}")
    return _mirrored(reader, view, ends, mode, node)


def _mirrored(reader: Reader, view: View, ends: Sequence[tuple[int, int]], mode: str, node: Node) -> View:
    """Padding with values of the edges: one axis after the other by a table of places."""
    for axis, pair in enumerate(ends):
        if pair == (0, 0):
            continue
        places = np.pad(np.arange(view.shape[axis]), pair, "edge" if mode.startswith("replicate") else "reflect")
        view = gathered(reader, view, axis, places, node)
    return view


def gathered(reader: Reader, view: View, axis: int, places: Array, node: Node) -> View:
    """Slices along an axis in another order, copied run by run."""
    shape = [len(places) if place == axis else size for place, size in enumerate(view.shape)]
    made = View.new(view.dtype, shape, view.order)
    start = 0
    for stop in range(1, len(places) + 1):
        if stop == len(places) or places[stop] != places[stop - 1] + 1:
            first = int(places[start])
            target = made.sliced(axis, start, stop)
            reader.copy(view.sliced(axis, first, first + stop - start), target, node)
            start = stop
    return made


@handles("flip", "roll")
def _reorder(reader: Reader, node: Node, given: Mapping[str, Any]) -> View:
    view: View = given["self"]
    shifts = given.get("shifts", [0] * len(given["dims"]))
    for axis, shift in zip(given["dims"], shifts, strict=True):
        axis = wrapped(axis, len(view.sizes))
        places = np.arange(view.shape[axis])
        places = places[::-1] if word(node) == "flip" else np.roll(places, shift)
        view = gathered(reader, view, axis, places, node)
    return view
