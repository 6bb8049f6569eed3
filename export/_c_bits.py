"""Layers of ±1 as arrays: packed weights, what padding with zeros adds, and which sums reach a threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgepack.export._c_graph import Array
from edgepack.export._c_layers import Window

WORD = 32  # channels of a word
BLOCK = 16  # outputs whose weights stand together


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution with ±1 times a number per output.

    Attributes:
        signs: bool (outputs, inputs per group, rows, columns), true for +1.
        scale, bias: float32 (outputs,).
        window: with the padding, of which ``zeros`` says whether it is 0 rather than −1.
    """

    signs: Array
    scale: Array
    bias: Array
    window: Window
    groups: int
    zeros: bool = False

    @property
    def outputs(self) -> int:
        return len(self.signs)

    @property
    def places(self) -> int:
        return int(self.signs[0].size)


@dataclass(frozen=True, eq=False)
class Limits:
    """Results as bits: 1 where 2 · differing − around ≤ ``limit``, the opposite where ``turn``; per output."""

    limit: Array
    turn: Array


def weight_signs(weight: Array) -> tuple[Array, Array] | None:
    """Signs and size of weights that are ± one number per output; None for others."""
    size = np.abs(weight).reshape(len(weight), -1)
    same = bool((size == size[:, :1]).all() and (size > 0).all())
    return (weight > 0, size[:, 0].astype(np.float32)) if same else None


def bits_of(flags: Array) -> Array:
    """Flags along the last axis as words of 32, the first in the lowest bit; uint32."""
    missing = -flags.shape[-1] % WORD
    whole = np.pad(flags, [(0, 0)] * (flags.ndim - 1) + [(0, missing)])
    octets = np.packbits(whole, axis=-1, bitorder="little")
    words: Array = np.ascontiguousarray(octets).view("<u4").astype(np.uint32)
    return words


def packed_weight(layer: Layer) -> Array:
    """Weights with words of inputs; uint32 (outputs, words per group, rows, columns)."""
    return bits_of(layer.signs.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def rows_of(values: Array, groups: int, fill: float = 0) -> Array:
    """One value per output (last axis), each group filled up to whole blocks."""
    outputs = values.shape[-1] // groups
    found = np.full((*values.shape[:-1], groups, -(-outputs // BLOCK) * BLOCK), fill, values.dtype)
    found[..., :outputs] = values.reshape(*values.shape[:-1], groups, outputs)
    return found.reshape(*values.shape[:-1], -1)


def limits_of(layer: Layer, reach: Callable[[Array], Array], turned: bool) -> Limits | None:
    """Limits of the sums at which something holds; None where that is not the same as being beyond one number.

    Args:
        reach: float32 (candidates, outputs) → bool of that shape.
        turned: whether bits say that it does not hold.
    """
    twice = np.arange(2 * layer.places + 1)
    sums = (layer.places - twice).astype(np.float32)[:, None]
    holds = reach(sums * layer.scale + layer.bias)
    first, count = holds[0], holds.sum(0)
    limit = np.where(first, count, len(twice) - count) - 1
    if not (((twice[:, None] <= limit) == first) == holds).all():
        return None
    return Limits(limit.astype(np.int32), ~first ^ turned)


@dataclass(frozen=True, eq=False)
class Around:
    """What zeros in the padding add to sums in which they are −1.

    Attributes:
        sums: int32 (classes of rows, classes of columns, outputs); the first of each is within the image.
        rows, columns: the class of each row and column of results; int32.
    """

    sums: Array
    rows: Array
    columns: Array


def around(layer: Layer, image: tuple[int, int], size: tuple[int, int]) -> Around | None:
    """For an image and results of these rows and columns; None where nothing is padded with zeros."""
    slide = layer.window
    if not layer.zeros or not any((*slide.before, *slide.behind)):
        return None
    weights = np.where(layer.signs, 1, -1).sum(1).astype(np.int32)
    outside, classes = [], []
    for axis in (0, 1):
        taps = np.arange(slide.size[axis]) * slide.dilation[axis] - slide.before[axis]
        places = np.arange(size[axis])[:, None] * slide.stride[axis] + taps
        beyond = list(map(tuple, ((places < 0) | (places >= image[axis])).tolist()))
        kinds = list(dict.fromkeys([(False,) * slide.size[axis], *beyond]))
        outside.append(np.array(kinds))
        classes.append(np.array([kinds.index(kind) for kind in beyond], np.int32))
    either = outside[0][:, None, :, None] | outside[1][None, :, None, :]
    sums = np.einsum("rcij,oij->rco", either.astype(np.int32), weights)
    return Around(sums.astype(np.int32), *classes)
