"""Fewer steps and less memory: what can be computed in one, written where it is needed, or in place.

::

    convolution → sum → activation          one step
    value → copy into a part of a larger    written there at once (padding, concatenation, the caller's outputs)
    value → function of each element        over the value itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgepack.export._c_graph import Buffer, Network, Step, View, channels_last, planar

FILLS = ("fill", "border")
PLANES = ("sparse_f32", "window_f32")
CONVOLUTIONS = ("conv_f32", "depthwise_f32", *PLANES, "conv_bits")
IMAGES = ("conv_f32", "depthwise_f32", "conv_s8", "depthwise_s8", "max_pool_f32", "max_pool_s8", "avg_pool_f32",
          "avg_pool_s8", "adaptive_pool_f32", "nearest_f32", "nearest_s8", "bilinear_f32",
          "conv_bits", "pack_bits")  # fmt: skip
IN_PLACE = ("unary_f32", "binary_f32", "sum_s8", "table_s8", "product_s8")


def fuse(network: Network) -> None:
    """Change a network in place."""
    for step in list(network.steps):
        if step.kernel in CONVOLUTIONS:
            while _joined(network, step):
                pass
    for step in list(network.steps):
        if step.kernel == "copy" and _placed(network, step):
            network.steps.remove(step)
    for step in network.steps:
        if step.kernel in IN_PLACE:
            _over_input(network, step)


def _joined(network: Network, conv: Step) -> bool:
    """Let a convolution compute its only reader too."""
    readers = network.readers(conv.output.buffer)
    if len(readers) != 1 or conv.output.buffer.place != "arena" or "numbers" in conv.options:
        return False
    (reader,) = readers
    same = [view for view in reader.inputs if view.buffer is conv.output.buffer]
    if len(same) != 1 or not _same_memory(same[0], reader.output, conv.output):
        return False
    if reader.kernel == "unary_f32":
        if reader.options["function"] == "leaky" and not 0 <= reader.options["numbers"][0] <= 1:
            return False
        if reader.options["function"] not in ("clip", "leaky"):
            return False
        conv.options.update(reader.options)
    elif reader.kernel == "binary_f32" and reader.options["operator"] == "add" and len(conv.inputs) == 1:
        other = next(view for view in reader.inputs if view is not same[0])
        added = _alike(other, reader.output, conv)
        if added is None:
            return False
        conv.inputs.append(added)
    else:
        return False
    conv.output = replace(conv.output, buffer=reader.output.buffer)
    conv.name = reader.name
    network.steps.remove(conv)
    network.steps[network.steps.index(reader)] = conv
    return True


def _same_memory(source: View, target: View, whole: View) -> bool:
    """Whether a step's input is all of a buffer and its output lies in the same order."""
    listed = source.in_order(target.order)
    if source.shape != target.shape or source.count != whole.count:
        return False
    if not (listed.dense() and target.dense()):  # planes may have gaps between them
        return (listed.strides, source.offset, source.buffer.size) == (target.strides, 0, target.buffer.size)
    return whole.count == whole.buffer.size and target.count == target.buffer.size


def _alike(other: View, like: View, conv: Step) -> View | None:
    """A summand as the convolution sees its output; None where the kernels cannot walk it."""
    wide = conv.output
    if other.dtype != like.dtype or other.shape != like.shape or other.buffer.constant is not None:
        return None
    if conv.kernel in PLANES:
        return other.in_order(wide.order) if planar(other) else None
    if other.in_order(like.order).dense():
        return replace(wide, buffer=other.buffer, offset=other.offset)
    listed = other.in_order(channels_last(len(other.sizes)))
    if len(other.sizes) != 4 or listed.strides[-1] != 1 or wide.order != listed.order:
        return None
    return listed if all(step or size == 1 for step, size in zip(listed.strides, listed.sizes, strict=True)) else None


def _placed(network: Network, copy: Step) -> bool:
    """Let those who write what is copied write it to its place."""
    (source,), target = copy.inputs, copy.output
    buffer = source.buffer
    if buffer.place != "arena" or buffer.constant is not None or source.dtype != target.dtype:
        return False
    if not source.in_order(tuple(source.order)).dense() or source.count != buffer.size:
        return False
    moved: list[tuple[Step, int, View]] = []  # step, input (or −1 for the output), view
    for step in network.steps:
        for place, view in enumerate((*step.inputs, step.output)):
            if view.buffer is not buffer or step is copy:
                continue
            place = -1 if place == len(step.inputs) else place
            changed = mapped(view, source, target.in_order(source.order))
            if changed is None or not _walkable(step, place, changed):
                return False
            moved.append((step, place, changed))
    for step, place, view in moved:
        if place < 0:
            step.output = view
        else:
            step.inputs[place] = view
    _fill_first(network, target.buffer)
    return True


def mapped(view: View, source: View, target: View) -> View | None:
    """A view of ``source``'s buffer as one of ``target``'s, which holds the same; None where strides cannot say it."""
    if target.dense() and source.dense():
        return replace(view, buffer=target.buffer, offset=view.offset - source.offset + target.offset)
    listed = zip(source.sizes, source.strides, target.strides, strict=True)
    axes = sorted((axis for axis in listed if axis[0] > 1), key=lambda axis: -axis[1])
    rest, offset, places = view.offset - source.offset, target.offset, []
    for _, stride, wanted in axes:
        place, rest = divmod(rest, stride)
        places.append(place)
        offset += place * wanted
    strides = []
    for size, step in zip(view.sizes, view.strides, strict=True):
        found = 1 if size == 1 else 0 if step == 0 else _stride(size, step, axes, places)
        if found is None:
            return None
        strides.append(found)
    return None if rest else replace(view, buffer=target.buffer, strides=tuple(strides), offset=offset)


def _stride(size: int, step: int, axes: Sequence[tuple[int, int, int]], places: Sequence[int]) -> int | None:
    for (length, stride, wanted), place in zip(axes, places, strict=True):
        if step % stride == 0 and place + step // stride * (size - 1) < length:
            return step // stride * wanted
    return None


def _walkable(step: Step, place: int, view: View) -> bool:
    """Whether a kernel takes a view with these strides."""
    if step.kernel in FILLS:
        return False
    if step.kernel in PLANES:
        return planar(view) and (place < 0 or view.buffer.place == "arena")  # reads whole vectors
    if step.kernel not in IMAGES:
        return True
    listed = view.in_order(channels_last(4))
    return listed.sizes[-1] == 1 or listed.strides[-1] == 1


def _fill_first(network: Network, buffer: Buffer) -> None:
    """Fill a buffer before anything else is written to it."""
    fills = [step for step in network.writers(buffer) if step.kernel in FILLS]
    for fill in fills:
        network.steps.remove(fill)
        first = min(network.steps.index(step) for step in network.writers(buffer))
        network.steps.insert(first, fill)


def _over_input(network: Network, step: Step) -> None:
    """Write a result over an input that nobody reads any more."""
    position = network.steps.index(step)
    for view in step.inputs:
        buffer, old = view.buffer, step.output.buffer
        if buffer.place != "arena" or old.place != "arena" or buffer.constant is not None or buffer is old:
            continue
        fits = view.sizes == step.output.sizes and view.order == step.output.order and view.dense()
        if not fits or not step.output.dense() or view.count != buffer.size or old.size != buffer.size:
            continue
        if buffer.dtype != old.dtype or network.steps.index(network.readers(buffer)[-1]) > position:
            continue
        if len(network.writers(old)) > 1 or any(other is not view and other.buffer is buffer for other in step.inputs):
            continue
        for other in network.steps:
            other.inputs = [replace(v, buffer=buffer) if v.buffer is old else v for v in other.inputs]
            if other.output.buffer is old:
                other.output = replace(other.output, buffer=buffer)
        return
