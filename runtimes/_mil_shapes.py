"""MIL operators that only move elements: shapes, slices, joins, padding, blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgepack.runtimes._mil_math import ints, tensor


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps the size of the same axis, −1 takes what is left."""
    x = tensor(x)
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(ints(shape))])


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    x, places = tensor(x), ints(axes)
    rank = x.ndim + len(places)
    for axis in sorted(place % rank for place in places):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    joined = [tensor(value) for value in values]
    if interleave:
        return torch.stack(joined, axis % joined[0].ndim + 1).flatten(axis % joined[0].ndim, axis % joined[0].ndim + 1)
    return torch.cat([value.reshape(-1) if value.ndim == 0 else value for value in joined], axis)


def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Tensor | None = None) -> list[Tensor]:
    if split_sizes is not None:
        return list(torch.split(x, ints(split_sizes), axis))
    return list(torch.split(x, x.shape[axis] // int(num_splits or 1), axis))


def slices(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> tuple[list[range], list[int]]:
    """The positions taken on each axis, and the axes that go."""
    rank = x.ndim
    steps = [1] * rank if stride is None else ints(stride)
    open_begin, open_end, single = (
        [False] * rank if mask is None else [bool(item) for item in mask.tolist()]
        for mask in (begin_mask, end_mask, squeeze_mask)
    )
    taken = []
    for axis, (first, last, step) in enumerate(zip(ints(begin), ints(end), steps, strict=True)):
        size = x.shape[axis]
        if single[axis]:
            taken.append(range(first % size, first % size + 1))
        else:
            bounds = slice(None if open_begin[axis] else first, None if open_end[axis] else last, step)
            taken.append(range(*bounds.indices(size)))
    return taken, [axis for axis in range(rank) if single[axis]]


def slice_by_index(x: Tensor, begin: Tensor, end: Tensor, **options: Tensor | None) -> Tensor:
    taken, dropped = slices(x, begin, end, **options)
    for axis, places in enumerate(taken):
        if len(places) != x.shape[axis] or places.step < 0:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x.squeeze(dropped) if dropped else x


def slice_update(x: Tensor, update: Tensor, begin: Tensor, end: Tensor, **options: Tensor | None) -> Tensor:
    taken, dropped = slices(x, begin, end, **options)
    for axis in dropped:
        update = update.unsqueeze(axis)
    result = x.clone()
    result[torch.meshgrid(*(torch.tensor(places) for places in taken), indexing="ij")] = update
    return result


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (first, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        first %= max(x.shape[axis], 1)
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Amounts before and after each of the last axes; other modes repeat or mirror the input."""
    flat = ints(pad)
    amounts = list(zip(flat[::2], flat[1::2], strict=True))
    if mode == "constant":
        return F.pad(x, [amount for both in reversed(amounts) for amount in both], value=constant_val)
    for axis, (before, after) in enumerate(amounts, start=x.ndim - len(amounts)):
        if before or after:
            last = x.shape[axis] - 1
            places = torch.arange(-before, x.shape[axis] + after)
            mirrored = last - (last - places.abs()).abs()
            x = x.index_select(axis, mirrored if mode == "reflect" else places.clamp(0, last))
    return x


def crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return F.pad(x, [-left, -right, -top, -bottom])


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Blocks are the outer part of the channels (PyTorch's pixel_shuffle has them inside)."""
    n, c, h, w = x.shape
    parts = x.reshape(n, block_size, block_size, c // block_size**2, h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block_size, w * block_size)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block_size, w // block_size)


def space_to_batch(x: Tensor, block_shape: Tensor, paddings: Tensor) -> Tensor:
    high, wide = ints(block_shape)
    x = pad(x, paddings)
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // high, high, w // wide, wide)
    return parts.permute(3, 5, 0, 1, 2, 4).reshape(-1, c, h // high, w // wide)


def batch_to_space(x: Tensor, block_shape: Tensor, crops: Tensor) -> Tensor:
    high, wide = ints(block_shape)
    n, c, h, w = x.shape
    parts = x.reshape(high, wide, n // (high * wide), c, h, w).permute(2, 3, 4, 0, 5, 1)
    top, bottom, left, right = ints(crops)
    return F.pad(parts.reshape(-1, c, h * high, w * wide), [-left, -right, -top, -bottom])


def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    axis %= x.ndim
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(list(range(x.ndim)) if axes is None else ints(axes))


def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    result = x.clone()
    for row, length in enumerate(ints(lengths)):
        whole, turned = x.select(batch_axis, row), result.select(batch_axis, row)
        axis = seq_axis - (seq_axis > batch_axis)
        turned.narrow(axis, 0, length).copy_(whole.narrow(axis, 0, length).flip(axis))
    return result


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    rows, columns = x.shape[-2:]
    x = x.tril(columns if upper < 0 else upper)
    return x.triu(-(rows if lower < 0 else lower))


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    rows = 1
    for size in x.shape[: axis % x.ndim if axis < 0 else axis]:
        rows *= size
    return x.reshape(rows, -1)


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def fill(shape: Tensor, value: float = 0.0) -> Tensor:
    return tensor(value).expand(ints(shape)).clone()


OPERATORS: dict[str, Callable[..., Any]] = {
    "band_part": band_part,
    "batch_to_space": batch_to_space,
    "concat": concat,
    "crop": crop,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": lambda ref_tensor, value=0.0: tensor(value).expand(ref_tensor.shape).clone(),
    "flatten2d": flatten2d,
    "pad": pad,
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, upscale_factor),
    "pixel_unshuffle": lambda x, downscale_factor: F.pixel_unshuffle(x, downscale_factor),
    "reshape": reshape,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda values, axis: torch.stack([tensor(value) for value in values], axis),
    "tile": lambda x, reps: x.repeat(ints(reps)),
    "transpose": lambda x, perm: x.permute(ints(perm)),
}
