"""How an axis of a tensor moves through operators that only rearrange, pad or copy values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from edgepack.compress._graph import argument, operator_of, shape

aten = torch.ops.aten
COPIES = (aten.contiguous, aten.clone, aten.alias, aten.detach, aten.detach_)
DROPOUTS = (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
RESHAPES = (
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.squeeze,
    aten.unsqueeze,
    aten.reshape_as,
    aten.view_as,
)


@dataclass(frozen=True)
class Step:
    """One operator between two layers.

    Attributes:
        axis: where the axis went.
        zeros: whether the operator adds zeros beside the values.
    """

    axis: int
    zeros: bool = False


def forward(node: fx.Node, axis: int) -> Step | None:
    """Where an axis of the operator's first argument is in its result; None if values are mixed or changed."""
    kind = operator_of(node)
    if kind in COPIES or (kind in DROPOUTS and argument(node, "train") is False):
        return Step(axis)
    if kind in RESHAPES:
        return _reshape(shape(node.all_input_nodes[0]), shape(node), axis)
    if kind is aten.permute:
        return _permute(argument(node, "dims"), axis)
    if kind is aten.transpose and isinstance(argument(node, "dim0"), int):
        dims = list(range(len(shape(node))))
        first, second = argument(node, "dim0"), argument(node, "dim1")
        dims[first], dims[second] = dims[second], dims[first]
        return _permute(dims, axis)
    return _pad(node, axis) if kind is aten.pad else None


def backward(node: fx.Node, axis: int) -> Step | None:
    """Where an axis of the operator's result was in its first argument."""
    if not node.all_input_nodes:
        return None
    for origin in range(len(shape(node.all_input_nodes[0]))):
        step = forward(node, origin)
        if step is not None and step.axis == axis:
            return Step(origin, step.zeros)
    return None


def _reshape(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> Step | None:
    """An axis survives when it keeps its size and what lies before it (row-major order)."""
    before = math.prod(old[:axis])
    same = [j for j in range(len(new)) if new[j] == old[axis] and math.prod(new[:j]) == before]
    return Step(same[-1]) if same else None


def _permute(dims: list[int], axis: int) -> Step:
    return Step([dim % len(dims) for dim in dims].index(axis))


def _pad(node: fx.Node, axis: int) -> Step | None:
    widths = argument(node, "pad")
    from_the_end = 2 * (len(shape(node)) - 1 - axis)
    if not all(isinstance(width, int) for width in widths) or any(widths[from_the_end : from_the_end + 2]):
        return None
    constant = argument(node, "mode") == "constant" and any(width > 0 for width in widths)
    if constant and (argument(node, "value") or 0.0) != 0.0:
        return None
    return Step(axis, zeros=constant)
