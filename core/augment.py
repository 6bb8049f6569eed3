"""Random crops and flips of training images, the same for an image and for a target that is an image.

They act on preprocessed batches: mirrored borders commute with any preprocessing per channel, black ones are
preprocessed themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.data import Batch
from edgepack.errors import InputError

if TYPE_CHECKING:
    from edgepack.task import Input

Array = np.ndarray[Any, Any]

WORDS = ("crop", "pad", "flip")
BORDER = 8  # an image of the input's own size is enlarged by 1 / BORDER on each side before it is cropped


def words_of(augment: str) -> tuple[str, ...]:
    """``"crop-flip"`` → its words. Raises ValueError for a word that is none."""
    words = tuple(word for word in augment.split("-") if word)
    for word in words:
        if word not in WORDS:
            raise ValueError(f"augment is made of {', '.join(WORDS)}, such as 'crop-flip'; {word!r} is none of them")
    if {"crop", "pad"} <= set(words):
        raise ValueError("augment: 'crop' has mirrored borders and 'pad' black ones: take one of them")
    return words


def augmented(batch: Batch, words: Sequence[str], inputs: Sequence[Input], random: np.random.Generator) -> Batch:
    """The batch with every sample cropped and flipped at random.

    ``crop``: a window of the input's height and width, from the image where it is larger, else from the image with
    mirrored borders. ``pad``: the same with black borders (0 before preprocessing), as torchvision's
    ``RandomCrop(padding=…)`` makes them. ``flip``: left and right change places, in half of the samples.

    Raises:
        InputError: an input is no image, images are smaller than the window, or it is open how targets lie.
    """
    if not words:
        return batch
    places = {item.name: _place(item) for item in inputs}
    sizes = {(batch.inputs[name].shape[h], batch.inputs[name].shape[w]) for name, (h, w) in places.items()}
    if len(sizes) > 1:
        raise InputError(f"augment: the inputs are images of several sizes, {sorted(sizes)}", "leave augment out")
    (size,) = sizes
    cropped, black = bool({"crop", "pad"} & set(words)), "pad" in words
    window = _window(inputs[0]) if cropped else size
    border = _border(size, window) if cropped else (0, 0)
    count = len(batch)
    tops, lefts = (random.integers(0, side + 2 * more - part + 1, count)
                   for side, more, part in zip(size, border, window, strict=True))  # fmt: skip
    flips = random.random(count) < 0.5 if "flip" in words else np.zeros(count, bool)

    def moved(array: Array, axes: tuple[int, int], scale: int = 1, around: Array | None = None) -> Array:
        wide = _widened(array, axes, tuple(scale * more for more in border), around)
        rows = [_cut(wide[i], axes, (scale * int(tops[i]), scale * int(lefts[i])), window, scale) for i in range(count)]
        return np.stack([np.flip(row, axes[1] - 1) if flip else row for row, flip in zip(rows, flips, strict=True)])

    targets, scale = batch.targets, _scale(batch.targets, size)
    if targets is not None and scale is not None:
        if black and any(border):
            raise InputError("augment: 'pad' leaves open what targets that are images show in the borders",
                             "take crop, whose borders are mirrored")  # fmt: skip
        targets = moved(targets, (targets.ndim - 2, targets.ndim - 1), scale)
    around = {item.name: _black(item) if black else None for item in inputs}
    moves = {name: moved(batch.inputs[name], axes, around=around[name]) for name, axes in places.items()}
    return replace(batch, inputs=moves, targets=targets)


def _place(item: Input) -> tuple[int, int]:
    """Axes of height and width."""
    height, width = item.axis("H"), item.axis("W")
    if height is None or width is None or item.axis("N") != 0:
        raise InputError(f"augment: input {item.name!r} {list(item.shape)} is no image", "leave augment out")
    return height, width


def _window(item: Input) -> tuple[int, int]:
    height, width = _place(item)
    return item.shape[height], item.shape[width]


def _border(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    if any(side < part for side, part in zip(size, window, strict=True)):
        raise InputError(f"augment: an image of {size[0]}x{size[1]} is smaller than the input, {window[0]}x{window[1]}",
                         "give the task's input a smaller shape: it is the size of the crops")  # fmt: skip
    height, width = (0 if side > part else max(1, side // BORDER) for side, part in zip(size, window, strict=True))
    return (height, width) if size == window else (0, 0)


def _scale(targets: Array | None, size: tuple[int, int]) -> int | None:
    """How many times larger than the images targets are that are images themselves; None if they are none."""
    if targets is None or targets.ndim < 3:
        return None
    height, width = targets.shape[-2:]
    if targets.ndim > 4 or height % size[0] or height // size[0] != width / size[1]:
        raise InputError(f"augment: targets of shape {targets.shape} do not lie on images of {size[0]}x{size[1]}",
                         "leave augment out")  # fmt: skip
    return int(height // size[0])


def _black(item: Input) -> Array:
    """One black pixel as the network takes it: (1, C, 1, 1) in the order of the input's axes."""
    shape = [size if letter == "C" else 1 for size, letter in zip(item.shape, item.layout or "", strict=True)]
    return item.apply(np.zeros(shape, np.float32))


def _widened(array: Array, axes: tuple[int, int], border: tuple[int, ...], around: Array | None) -> Array:
    """With borders of ``around``, or mirrored."""
    if not any(border):
        return array
    widths = [(0, 0)] * array.ndim
    for axis, more in zip(axes, border, strict=True):
        widths[axis] = (more, more)
    if around is None:
        return np.pad(array, widths, mode="symmetric")
    wide = np.empty([size + sum(more) for size, more in zip(array.shape, widths, strict=True)], array.dtype)
    wide[...] = around
    inside = tuple(slice(first, first + size) for (first, _), size in zip(widths, array.shape, strict=True))
    wide[inside] = array
    return wide


def _cut(image: Array, axes: tuple[int, int], start: tuple[int, int], window: tuple[int, int], scale: int) -> Array:
    index = [slice(None)] * image.ndim
    for axis, first, part in zip(axes, start, window, strict=True):
        index[axis - 1] = slice(first, first + scale * part)
    return image[tuple(index)]
