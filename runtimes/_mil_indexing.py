"""MIL operators that look elements up, write them by index, or order them. Indices below zero count from the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgepack.runtimes._mil_math import cast, tensor

MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "update": lambda old, new: new,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
}


def places(indices: Tensor | int, size: int) -> Tensor:
    """Indices as PyTorch takes them."""
    whole = tensor(indices).to(torch.int64)
    return torch.where(whole < 0, whole + size, whole)


def gather(
    x: Tensor, indices: Tensor | int, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    axis %= x.ndim
    where = places(indices, x.shape[axis])
    if batch_dims == 0:
        picked = x.index_select(axis, where.reshape(-1))
        return picked.reshape(*x.shape[:axis], *where.shape, *x.shape[axis + 1 :])
    outer = x.shape[:batch_dims]
    rows = [
        gather(row, at, axis - batch_dims)
        for row, at in zip(x.flatten(0, batch_dims - 1), where.flatten(0, batch_dims - 1), strict=True)
    ]
    return torch.stack(rows).reshape(*outer, *rows[0].shape)


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return torch.gather(x, axis, places(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last axis of ``indices`` holds a position in the first axes of ``x`` (after the batch axes)."""
    if batch_dims == 0:
        return x[_positions(x, indices)]
    outer = x.shape[:batch_dims]
    rows = [
        gather_nd(row, at)
        for row, at in zip(x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1), strict=True)
    ]
    return torch.stack(rows).reshape(*outer, *rows[0].shape)


def scatter(
    data: Tensor,
    indices: Tensor | int,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Slices of ``data`` at ``indices`` of one axis, changed one after the other."""
    axis %= data.ndim
    where = places(indices, data.shape[axis])
    result = data.movedim(axis, 0).clone()
    new = updates.reshape(*data.shape[:axis], -1, *data.shape[axis + 1 :]).movedim(axis, 0)
    for row, at in enumerate(where.reshape(-1).tolist()):
        result[at] = MODES[mode](result[at], new[row])
    return result.movedim(0, axis)


def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    result = data.movedim(axis, 0).clone()
    where = places(indices, data.shape[axis]).movedim(axis, 0)
    new = updates.movedim(axis, 0)
    for row, at in zip(new, where, strict=True):  # one by one: an index may repeat along the axis
        old = result.gather(0, at.unsqueeze(0)).squeeze(0)
        result.scatter_(0, at.unsqueeze(0), MODES[mode](old, row).unsqueeze(0))
    return result.movedim(0, axis)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    result = data.clone()
    depth = indices.shape[-1]
    rows = indices.reshape(-1, depth)
    new = updates.reshape(len(rows), *data.shape[depth:])
    for row, value in zip(rows, new, strict=True):
        at = _positions(data, row)
        result[at] = MODES[mode](result[at], value)
    return result


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    count = x.shape[axis] if k == -1 else k
    values, indices = values.narrow(axis, 0, count), indices.narrow(axis, 0, count)
    return (values, cast(indices, output_indices_dtype)) if return_indices else values


def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).to(torch.int32)


def one_hot(
    indices: Tensor, one_hot_vector_size: int, axis: int = -1, on_value: float = 1, off_value: float = 0
) -> Tensor:
    levels = torch.arange(one_hot_vector_size)
    hot = (indices.to(torch.int64).unsqueeze(-1) == levels).movedim(-1, axis)
    return torch.where(hot, tensor(on_value), tensor(off_value))


def range_1d(end: Tensor | int, start: Tensor | int, step: Tensor | int) -> Tensor:
    last, first, stride = (tensor(value) for value in (end, start, step))
    return torch.arange(first.item(), last.item(), stride.item(), dtype=last.dtype)


def _positions(x: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    return tuple(places(at, x.shape[axis]) for axis, at in enumerate(indices.unbind(-1)))


OPERATORS: dict[str, Callable[..., Any]] = {
    "argsort": argsort,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": lambda x: torch.nonzero(x).to(torch.int32),
    "one_hot": one_hot,
    "range_1d": range_1d,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "topk": topk,
}
