"""The layers whose weights may become zero, as matrices with a score for each weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from edgepack.compress._activations import last_layers
from edgepack.compress._eliminate import saliency
from edgepack.compress._graph import Call, GraphView, named
from edgepack.compress._patterns import Pattern
from edgepack.compress._spots import Spot
from edgepack.compress._stages import CONVOLUTIONS, Stage


@dataclass(eq=False)
class Sparse:
    """A layer that gets zeros.

    Attributes:
        cost: of a squared weight, (groups, 1, columns) or a single number: what its score is multiplied by.
    """

    path: str
    layer: nn.Module
    pattern: Pattern
    moments: Tensor | None = None
    cost: Tensor | float = 1.0

    @property
    def weight(self) -> nn.Parameter:
        assert isinstance(self.layer.weight, nn.Parameter)
        return self.layer.weight

    @property
    def groups(self) -> int:
        groups = getattr(self.layer, "groups", 1)
        assert isinstance(groups, int)
        return groups

    @cached_property
    def order(self) -> Tensor:
        """Of the columns, as the pattern wants them."""
        return self.pattern.columns(self.weight.view(*self.weight.shape, *[1] * (3 - self.weight.dim())))

    @property
    def spot(self) -> Spot:
        """What collects the second moments knows the layer as this."""
        return Spot(self.path, self.layer, Stage.of(self.layer), ())

    def matrix(self, values: Tensor) -> Tensor:
        """Values in the weight's shape as (groups, rows, columns)."""
        return values.detach().reshape(self.groups, -1, len(self.order))[..., self.order]

    def shaped(self, matrix: Tensor) -> Tensor:
        """The other way round."""
        values = torch.empty_like(matrix)
        values[..., self.order] = matrix
        return values.reshape(self.weight.shape)

    def look(self, moments: Tensor | None, relative: bool) -> None:
        """Take the second moments of what the layer reads; scores are errors over the results' size if ``relative``."""
        matrix = self.matrix(self.weight).double()
        if moments is None:
            self.cost = 1 / float(matrix.square().sum().clamp_min(1e-300)) if relative else 1.0
            return
        self.moments = moments[:, self.order][:, :, self.order]
        size = ((matrix @ self.moments) * matrix).sum().clamp_min(1e-300)
        self.cost = saliency(self.moments)[:, None] / size

    def exchange(self, channels: Tensor) -> None:
        """Follow the weight, whose input channels were put in this order."""
        taps = len(self.order) // len(channels)
        columns = (torch.arange(taps)[:, None] * len(channels) + channels).flatten()
        if self.moments is not None:
            self.moments = self.moments[:, columns][:, :, columns]
        if isinstance(self.cost, Tensor):
            self.cost = self.cost[..., columns]

    def scores(self) -> Tensor:
        """What each weight is worth now, (groups, rows, columns)."""
        return self.matrix(self.weight).double().square() * self.cost


def find(view: GraphView, pattern: Pattern, layers: Sequence[str]) -> tuple[list[Sparse], dict[str, str]]:
    """Layers that get zeros, in the order of computation, and path → why others do not."""
    last, left, found = last_layers(view.program.graph), {}, dict[nn.Module, Sparse]()
    for call in view.calls:
        if not isinstance(call.layer, (*CONVOLUTIONS, nn.Linear)) or call.layer in found:
            continue
        calls = view.calls_of(call.layer)
        reason = _obstacle(call, calls, pattern, layers, last)
        if reason is None:
            found[call.layer] = Sparse(call.path, call.layer, pattern)
        else:
            left[call.path] = reason
    return list(found.values()), left


def _obstacle(
    call: Call, calls: Sequence[Call], pattern: Pattern, layers: Sequence[str], last: Collection[fx.Node]
) -> str | None:
    layer = call.layer
    asked = any(named(one.path, layers) for one in calls)
    if layers and not asked:
        return "'layers' does not name it"
    groups = getattr(layer, "groups", 1)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if groups > 1 and weight.shape[1] == 1 and not asked:
        return "depthwise: few weights, and no engine gains"
    if not asked and any(_reads_input(one.node) for one in calls):
        return "it reads the network's input"
    if not asked and any(one.node in last for one in calls):
        return "it gives the network's output"
    obstacle = next((one.obstacle for one in calls if one.obstacle is not None), None)
    return obstacle or pattern.obstacle(weight, groups)


def _reads_input(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder"


def second_moments(layers: Sequence[Sparse]) -> Mapping[nn.Module, Spot]:
    """Layers whose moments can be collected: those that pad zeros."""
    plain = [one for one in layers if getattr(one.layer, "padding_mode", "zeros") == "zeros"]
    return {one.layer: one.spot for one in plain}
