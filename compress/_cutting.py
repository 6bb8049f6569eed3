"""Channels of layers: which numbers of a layer belong to one, how they are set to 0, and how they are removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from edgepack.errors import require

OUT, IN = "out", "in"
Side = tuple[str, str]  # path of a layer and OUT or IN; or path of a bare parameter and the number of its axis
Cut = Mapping[Side, set[int]]  # the channels that go
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


@dataclass(eq=False)
class Group:
    """Units (channels, or attention heads) that some layers have in common, so that one goes from all of them.

    Attributes:
        name: path of the first layer that computes them.
        sides: of each layer that has them: the channels that belong to each unit.
        kind: ``channels`` or ``heads``.
    """

    name: str
    sides: dict[Side, list[list[int]]] = field(default_factory=dict)
    kind: str = "channels"

    @property
    def units(self) -> int:
        return len(next(iter(self.sides.values())))

    def cut(self, units: Iterable[int]) -> dict[Side, set[int]]:
        """What goes with these units."""
        wanted = list(units)
        return {side: {index for unit in wanted for index in rows[unit]} for side, rows in self.sides.items()}


def union(cuts: Iterable[Cut]) -> dict[Side, set[int]]:
    """Several cuts as one."""
    found: dict[Side, set[int]] = {}
    for cut in cuts:
        for side, gone in cut.items():
            if gone:
                found.setdefault(side, set()).update(gone)
    return found


def owner(module: nn.Module, path: str) -> nn.Module | nn.Parameter:
    """The layer, or the bare parameter, at a path."""
    parent, _, name = path.rpartition(".")
    found: nn.Module | nn.Parameter = getattr(module.get_submodule(parent), name) if path else module
    return found


def depthwise(layer: object) -> bool:
    """Whether each output channel of a convolution reads the input channel of the same number."""
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def tensors(module: nn.Module, side: Side) -> Iterator[tuple[str, Tensor, int]]:
    """Name, values and axis of all numbers that are per channel on a side of a layer."""
    path, what = side
    layer = owner(module, path)
    if isinstance(layer, nn.Parameter):
        yield "", layer, int(what)
        return
    if isinstance(layer, (_BatchNorm, _InstanceNorm, nn.PReLU)) or depthwise(layer):
        names = [(name, 0) for name in PER_CHANNEL]
    elif isinstance(layer, (nn.Linear, _ConvNd)):
        swapped = isinstance(layer, _ConvTransposeNd)
        names = [("weight", 1 if swapped else 0), ("bias", 0)] if what == OUT else [("weight", 0 if swapped else 1)]
    else:
        names = [("weight", 1)]  # an embedding
    for name, axis in names:
        if isinstance(value := getattr(layer, name, None), Tensor):
            yield name, value, axis


def width(module: nn.Module, side: Side) -> int:
    """Channels on a side of a layer."""
    _, value, axis = next(tensors(module, side))
    return value.shape[axis]


def mask(module: nn.Module, cut: Cut) -> nn.Module:
    """Set what belongs to these channels to 0: the network that removal must equal. Changes it in place."""
    with torch.no_grad():
        for side, gone in cut.items():
            for _, value, axis in tensors(module, side):
                value.index_fill_(axis, torch.tensor(sorted(gone)), 0.0)
    return module


def remove(module: nn.Module, cut: Cut) -> nn.Module:
    """Take these channels out of their layers, which stay where and what they are. Changes it in place."""
    function, kinds = require("torch_pruning.pruner.function", "prune"), require("torch_pruning.ops", "prune")
    for (path, what), gone in cut.items():
        layer = owner(module, path)
        if isinstance(layer, nn.Parameter):
            _narrow(module, path, int(what), gone)
            continue
        frozen = {name for name, value in layer.named_parameters(recurse=False) if not value.requires_grad}
        pruner = function.PrunerBox.get(kinds.module2type(layer), function.DepthwiseConvPruner())
        (pruner.prune_out_channels if what == OUT else pruner.prune_in_channels)(layer, sorted(gone))
        for name, value in layer.named_parameters(recurse=False):
            value.requires_grad_(name not in frozen)
    return module


def _narrow(module: nn.Module, path: str, axis: int, gone: set[int]) -> None:
    parent, _, name = path.rpartition(".")
    old = owner(module, path)
    assert isinstance(old, nn.Parameter)
    kept = [index for index in range(old.shape[axis]) if index not in gone]
    new = nn.Parameter(old.detach().index_select(axis, torch.tensor(kept)), old.requires_grad)
    setattr(module.get_submodule(parent), name, new)
