"""Ready-made things a pass may ask of its training: masks that stay, and weights that lie on a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def masked(parameter: nn.Parameter, mask: Tensor) -> Callable[[], None]:
    """A projection: what the mask (0 or 1, of the parameter's shape) leaves out is 0 after each step."""
    kept = mask.to(parameter.dtype)

    def project() -> None:
        parameter.mul_(kept)

    return project


class Grid(nn.Module):
    """Rounds a weight to ``scale × integer`` in ``-largest … largest``; gradients pass where nothing is clipped.

    The straight-through estimate: the optimizer moves the weight before rounding, so that small steps add up.

    Attributes:
        scale: one value, or one for each output channel in a form that multiplies the weight.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, largest: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.largest = largest

    def forward(self, weight: Tensor) -> Tensor:
        inside = (weight / self.scale).clamp(-self.largest, self.largest)
        return (inside + (inside.round() - inside).detach()) * self.scale


@contextmanager
def on_grids(module: nn.Module, grids: Mapping[str, Grid]) -> Iterator[None]:
    """Compute with rounded weights while the block runs; afterwards the rounded weights are the weights.

    ``grids`` are by path of a parameter, such as ``layer1.conv.weight``. To be entered before ``tune``.
    """
    places = [(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in grids]
    for (layer, name), grid in zip(places, grids.values(), strict=True):
        parametrize.register_parametrization(layer, name, grid)
    try:
        yield
    finally:
        for layer, name in places:
            with torch.no_grad():
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
