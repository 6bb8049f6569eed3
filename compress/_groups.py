"""Groups of columns that share a scale: where a weight can have them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from edgepack.compress._graph import argument
from edgepack.compress._grid import group_scale, top, weight_scale

BITS = 4  # of weights that may have groups


def scale_of(node: fx.Node, weight: Tensor, floor: Tensor | float, bits: int, size: int | None) -> Tensor:
    """Scales (rows, groups) where the rows of a weight of few bits can be cut into groups, else (rows,).

    Args:
        node: a convolution or linear layer, which reads the weight.
        floor: least scale of a row.
        size: columns of a group; None for no groups.
    """
    if size is None or bits != BITS or not _cuts(node, weight, size):
        return weight_scale(weight, floor, top(bits))
    return group_scale(weight, top(bits), size)


def grouped_words(scales: Mapping[str, Tensor], size: int | None) -> str:
    """How many layers have groups, as part of a sentence."""
    if size is None:
        return ""
    return f", {sum(scale.dim() > 1 for scale in scales.values())} with a scale per {size} columns"


def _cuts(node: fx.Node, weight: Tensor, size: int) -> bool:
    """Whether a row is a product over channels alone, in two or more whole groups."""
    columns = weight.shape[1]
    return argument(node, "groups") in (None, 1) and weight[0].numel() == columns > size and columns % size == 0
