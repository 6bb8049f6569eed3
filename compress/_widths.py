"""In which order units go: step by step, what is worth least for what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from edgepack.compress._cutting import IN, OUT, Group, depthwise, width
from edgepack.compress._hooks import hooked


@dataclass(frozen=True)
class Step:
    """Some units of one group that go together."""

    group: int
    units: tuple[int, ...]


@dataclass(eq=False)
class Layer:
    """A layer that multiplies, and what is left of it.

    Attributes:
        macs, values: of the whole layer.
        wide: channels on each side; kept: those that are left.
    """

    macs: float
    values: float
    wide: dict[str, int]
    kept: dict[str, int] = field(default_factory=dict)

    def share(self, fewer: dict[str, int] | None = None) -> float:
        """What is left of the layer, if these channels go as well."""
        found = 1.0
        for side, count in self.wide.items():
            found *= (self.kept.get(side, count) - (fewer or {}).get(side, 0)) / count
        return found


@dataclass(eq=False)
class Costs:
    """Multiply-accumulates and weights of a network's layers while units go.

    Attributes:
        weights: how much each unit of multiply-accumulates, and each weight, counts.
    """

    layers: dict[str, Layer]
    weights: tuple[float, float]

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[Tensor], macs: bool, values: bool) -> Costs:
        """``macs``, ``values``: which of the two counts."""
        found = dict(_layers(module, inputs))
        totals = sum(layer.macs for layer in found.values()), sum(layer.values for layer in found.values())
        return cls(found, (macs / max(totals[0], 1.0), values / max(totals[1], 1.0)))

    def saved(self, group: Group, units: Sequence[int]) -> float:
        """What goes with these units of a group, as a share of the network."""
        total = 0.0
        for path, fewer in self._fewer(group, units).items():
            layer = self.layers[path]
            gone = layer.share() - layer.share(fewer)
            total += gone * (layer.macs * self.weights[0] + layer.values * self.weights[1])
        return total

    def take(self, group: Group, units: Sequence[int]) -> None:
        for path, fewer in self._fewer(group, units).items():
            layer = self.layers[path]
            for side, count in fewer.items():
                layer.kept[side] = layer.kept.get(side, layer.wide[side]) - count

    def _fewer(self, group: Group, units: Sequence[int]) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for (path, side), rows in group.sides.items():
            if path in self.layers and side in self.layers[path].wide:
                own = found.setdefault(path, {})
                own[side] = own.get(side, 0) + sum(len(rows[unit]) for unit in units)
        return found


def steps(groups: Sequence[Group], worth: Sequence[Tensor], costs: Costs, multiple: int, least: float) -> list[Step]:
    """Every step until each group is as narrow as it may be, the best first."""
    orders = [values.argsort().tolist() for values in worth]
    gone = [0] * len(groups)
    found: list[Step] = []
    while True:
        best: tuple[float, Step] | None = None
        for index, group in enumerate(groups):
            if not (units := _next(group, orders[index], gone[index], multiple, least)):
                continue
            saved = costs.saved(group, units)
            if saved <= 0:
                continue
            price = float(worth[index][list(units)].sum()) / saved
            if best is None or price < best[0]:
                best = price, Step(index, units)
        if best is None:
            return found
        step = best[1]
        costs.take(groups[step.group], step.units)
        gone[step.group] += len(step.units)
        found.append(step)


def narrowest(group: Group, multiple: int, least: float) -> int:
    """The fewest units that may stay."""
    size = multiple if group.kind == "channels" else 1
    return min(group.units, max(size, -(-round(least * group.units) // size) * size))


def _next(group: Group, order: Sequence[int], gone: int, multiple: int, least: float) -> tuple[int, ...]:
    """The units that go next: as many as lead to a multiple."""
    left, size = group.units - gone, multiple if group.kind == "channels" else 1
    count = left % size or size
    return tuple(order[gone : gone + count]) if left - count >= narrowest(group, multiple, least) else ()


def enough(count: int, keeps: Callable[[int], bool]) -> int | None:
    """The fewest steps after which ``keeps`` is true, as it is after all that follow; None where it never is."""
    if not keeps(count):
        return None
    low, high = -1, count  # high keeps, low does not
    while high - low > 1:
        middle = (low + high) // 2
        if keeps(middle):
            high = middle
        else:
            low = middle
    return high


def _layers(module: nn.Module, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Layer]]:
    """Convolutions and linear layers, with what one run of the network makes them compute."""
    sizes: dict[nn.Module, int] = {}

    def see(layer: Any, _: object, result: Tensor) -> None:
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        sizes[layer] = sizes.get(layer, 0) + result.numel() // int(channels)

    found = {path: layer for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, _ConvNd))}
    with hooked((layer, see) for layer in found.values()), torch.no_grad():
        module(*inputs)
    for path, layer in found.items():
        values = layer.weight.numel()
        wide = {OUT: width(module, (path, OUT))} if depthwise(layer) else {
            side: width(module, (path, side)) for side in (OUT, IN)}  # fmt: skip
        yield path, Layer(float(values * sizes.get(layer, 0)), float(values), wide)
