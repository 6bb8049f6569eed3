"""Convolutions, linear layers, pools, resizes and norms of a captured graph → steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.export._alignment import word
from edgepack.export._c_graph import Array, View, channels_last
from edgepack.export._c_read import Reader, as_array, handles

if TYPE_CHECKING:
    from torch.fx import Node

Given = Mapping[str, Any]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """How a kernel slides over an image, rows then columns."""

    size: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)
    behind: Pair = (0, 0)

    @property
    def padded(self) -> bool:
        return any((*self.before, *self.behind))

    @property
    def ends(self) -> list[Pair]:
        """Padding per axis of (N, C, H, W)."""
        return [(0, 0), (0, 0), (self.before[0], self.behind[0]), (self.before[1], self.behind[1])]


def pair(value: Any, rank: int, default: int = 1) -> Pair:
    """A size of one or two axes as rows and columns; one axis is columns."""
    values = [value] if isinstance(value, int) else list(value or [])
    values = values or [default]
    if rank == 1:
        return (0 if default == 0 else 1), values[0]
    return values[0], values[-1]


def window(given: Given, size: Sequence[int], rank: int) -> Window:
    """The window of a convolution with a kernel of this size."""
    kernel = (1, size[-1]) if rank == 1 else (size[-2], size[-1])
    dilation = pair(given["dilation"], rank)
    padding = given["padding"]
    if padding == "same":
        total = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
        before = (total[0] // 2, total[1] // 2)
        behind = (total[0] - before[0], total[1] - before[1])
    else:
        before = behind = (0, 0) if padding == "valid" else pair(padding, rank, 0)
    return Window(kernel, pair(given["stride"], rank), dilation, before, behind)


def as_image(view: View) -> View:
    """(N, C, L) as (N, C, 1, L)."""
    return view.with_axis(2) if len(view.sizes) == 3 else view


def image_result(reader: Reader, node: Node, dtype: str) -> tuple[View, View]:
    """Fresh memory for an operator's images: as four axes, and as the network has it."""
    shape = tuple(node.meta["val"].shape)
    made = View.new(dtype, shape, channels_last(len(shape)))
    return as_image(made), made


@handles("conv1d", "conv2d")
def _convolution(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["input"]
    if len(source.sizes) not in (3, 4) or isinstance(given["weight"], View):
        raise reader.refused(node, "computed weights or without a batch axis")
    weight = as_array(given["weight"])
    rank = weight.ndim - 2
    slide = window(given, weight.shape[2:], rank)
    weight = weight.reshape(*weight.shape[:2], *slide.size)
    padded = reader.padded(as_image(source), slide.ends, 0.0, node, channels_last(4))
    image = reader.image(padded, node)
    wide, made = image_result(reader, node, "float32")
    bias = None if given["bias"] is None else as_array(given["bias"])
    convolve(reader, node, image, wide, weight=weight, bias=bias, window=slide, groups=given["groups"])
    return made


def convolve(reader: Reader, node: Node, image: View, wide: View, **options: Any) -> None:
    """Emit a convolution of a padded image; one channel per group has a kernel of its own.

    Args:
        options: ``weight`` (O, I, rows, columns), ``bias`` (O,), ``window``, ``groups``, and what integers need.
    """
    weight, kind = options["weight"], "s8" if image.dtype == "int8" else "f32"
    depthwise = weight.shape[1] == 1 and options["groups"] == weight.shape[0] > 1
    reader.emit(f"depthwise_{kind}" if depthwise else f"conv_{kind}", node, [image], wide, **options)


@handles("linear")
def _linear(reader: Reader, node: Node, given: Given) -> View:
    if isinstance(given["weight"], View):
        raise reader.refused(node, "computed weights")
    bias = None if given["bias"] is None else as_array(given["bias"])
    return linear(reader, node, given["input"], as_array(given["weight"]), bias=bias)


def linear(reader: Reader, node: Node, source: View, weight: Array, **options: Any) -> View:
    """A linear layer as a convolution of one row of pixels."""
    shape = tuple(node.meta["val"].shape)
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    made = View.new("int8" if source.dtype == "int8" else "float32", shape)
    pixels = [reader.reshape(source, (1, 1, rows, weight.shape[1]), node), made.reshaped((1, 1, rows, shape[-1]))]
    image, wide = (view.permuted((0, 3, 1, 2)) for view in pixels)
    kernel = weight[:, :, None, None]
    convolve(reader, node, image, wide, weight=kernel, window=Window((1, 1)), groups=1, **options)
    return made


@handles("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d")
def _pool(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["self"]
    if len(source.sizes) not in (3, 4):
        raise reader.refused(node, "any number of axes but three or four")
    rank = len(source.sizes) - 2
    size = pair(given["kernel_size"], rank)
    stride = pair(given["stride"], rank) if given["stride"] else size
    padding = pair(given["padding"], rank, 0)
    slide = Window(size, stride, pair(given.get("dilation", 1), rank), padding)
    return pooled(reader, node, source, slide, given)


def pooled(reader: Reader, node: Node, source: View, slide: Window, given: Given, **options: Any) -> View:
    largest = word(node).startswith("max")
    kind = "s8" if source.dtype == "int8" else "f32"
    wide, made = image_result(reader, node, source.dtype)
    image = reader.image(as_image(source), node)
    counts = None if largest else divisors(image, wide, slide, given)
    reader.emit(
        f"{'max' if largest else 'avg'}_pool_{kind}", node, [image], wide, window=slide, counts=counts, **options
    )
    return made


def divisors(image: View, wide: View, slide: Window, given: Given) -> int:
    """What sums are divided by: a number, 0 for however many values a window holds, −1 for those in the padding too.

    Windows that go beyond the padding (``ceil_mode``) count their part inside it.
    """
    if given.get("divisor_override"):
        return int(given["divisor_override"])
    if not given.get("count_include_pad", True) and any(slide.before):
        return 0
    inside = all(
        (wide.shape[2 + axis] - 1) * slide.stride[axis] + slide.size[axis]
        <= image.shape[2 + axis] + 2 * slide.before[axis]
        for axis in (0, 1)
    )
    return slide.size[0] * slide.size[1] if inside else -1 if any(slide.before) else 0


@handles("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
def _adaptive(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["self"]
    if word(node).startswith("adaptive_max") or len(source.sizes) not in (3, 4):
        raise reader.refused(node)
    wide, made = image_result(reader, node, source.dtype)
    whole = as_image(source)
    if all(size % side == 0 for size, side in zip(whole.shape[2:], wide.shape[2:], strict=True)):
        height, width = (size // side for size, side in zip(whole.shape[2:], wide.shape[2:], strict=True))
        return pooled(reader, node, source, Window((height, width), (height, width)), {})
    image = reader.image(whole, node)
    reader.emit("adaptive_pool_f32", node, [image], wide)
    return made


@handles("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffle(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["self"]
    n, c, h, w = source.shape
    if word(node) == "channel_shuffle":
        groups = given["groups"]
        return blocks(reader, node, source, (n, groups, c // groups, h, w), (0, 2, 1, 3, 4))
    factor = given.get("upscale_factor", given.get("downscale_factor"))
    if word(node) == "pixel_shuffle":
        return blocks(reader, node, source, (n, c // factor**2, factor, factor, h, w), (0, 1, 4, 2, 5, 3))
    return blocks(reader, node, source, (n, c, h // factor, factor, w // factor, factor), (0, 1, 3, 5, 2, 4))


def blocks(reader: Reader, node: Node, source: View, sizes: Sequence[int], axes: Sequence[int]) -> View:
    """Axes split, put in another order and joined again, in one copy into images with channels last."""
    shape = tuple(node.meta["val"].shape)
    made = View.new(source.dtype, shape, channels_last(4))
    split = _split_axes(source, sizes)
    moved = split.permuted(axes)
    reader.copy(moved, _split_axes(made, [sizes[axis] for axis in axes]), node)
    return made


def _split_axes(view: View, sizes: Sequence[int]) -> View:
    """The axes of a view, some of them as several; their product stays."""
    places: list[tuple[int, int, int]] = []  # size, stride, axis of the result
    rest = list(enumerate(sizes))
    for axis in range(len(view.sizes)):
        left = view.shape[axis]
        part: list[tuple[int, int]] = []
        while left > 1 or (rest and rest[0][1] == 1 and not part):
            index, size = rest.pop(0)
            part.append((index, size))
            left //= size
        step = view.stride(axis)
        for index, size in reversed(part):
            places.append((size, step, index))
            step *= size
    places.sort(key=lambda place: place[2])
    listed = [place[:2] for place in places]
    return View(
        view.buffer, tuple(s for s, _ in listed), tuple(t for _, t in listed), tuple(range(len(sizes))), view.offset
    )


@handles("upsample_nearest2d", "upsample_nearest1d", "upsample_bilinear2d", "_upsample_nearest_exact2d")
def _resize(reader: Reader, node: Node, given: Given) -> View:
    source: View = given.get("input", given.get("self"))
    wide, made = image_result(reader, node, source.dtype)
    image = reader.image(as_image(source), node)
    factors = given.get("scale_factors") or [None, None]
    kind, steps = word(node), list(zip(image.shape[2:], wide.shape[2:], pair_of(factors), strict=True))
    if "nearest" in kind:
        exact = 0.5 if "exact" in kind else 0.0
        places = {name: _nearest(*step, exact) for name, step in zip(("rows", "columns"), steps, strict=True)}
        reader.emit(f"nearest_{'s8' if source.dtype == 'int8' else 'f32'}", node, [image], wide, **places)
        return made
    if source.dtype != "float32":
        raise reader.refused(node, "integers")
    rows, columns = (_linear_places(*step, given["align_corners"]) for step in steps)
    reader.emit("bilinear_f32", node, [image], wide, rows=rows, columns=columns)
    return made


def pair_of(factors: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Factors of rows and columns; a single one is of columns."""
    return (None, factors[0]) if len(factors) == 1 else (factors[0], factors[1])


def _nearest(size: int, wanted: int, factor: float | None, middle: float) -> Array:
    """Places that each row (or column) is read from, in float32 as PyTorch computes them."""
    scale = np.float32(1.0 / factor if factor else size / wanted)
    places = np.floor((np.arange(wanted, dtype=np.float32) + np.float32(middle)) * scale)
    found: Array = np.minimum(places.astype(np.int32), size - 1)
    return found


def _linear_places(size: int, wanted: int, factor: float | None, corners: bool) -> tuple[Array, Array]:
    """The first of two neighbours, and the weight of the second; at the end both are inside."""
    steps = np.arange(wanted, dtype=np.float32)
    if corners:
        exact = steps * np.float32((size - 1) / (wanted - 1) if wanted > 1 else 0.0)
    else:
        scale = np.float32(1.0 / factor if factor else size / wanted)
        exact = np.maximum((steps + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
    first = np.minimum(exact.astype(np.int32), max(size - 2, 0))
    return first, np.clip(exact - first, 0, 1 if size > 1 else 0).astype(np.float32)


@handles("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(reader: Reader, node: Node, given: Given) -> View:
    source: View = given["input"]
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (None if given[n] is None else as_array(given[n]).astype(np.float64) for n in names)
    if mean is None or variance is None:
        raise reader.refused(node, "statistics of the batch")
    factor = (1.0 if weight is None else weight) / np.sqrt(variance + given["eps"])
    shift = (0.0 if bias is None else bias) - mean * factor
    shape = (1, -1, *[1] * (len(source.sizes) - 2))
    for kind, array in (("mul", factor), ("add", shift)):
        other = reader.constant(array.astype(np.float32).reshape(shape), source)
        target = View.new("float32", source.shape, source.order)
        source = reader.emit("binary_f32", node, [source, other.expanded(source.shape)], target, operator=kind)
    return source
