"""Which input channels stand side by side, so that a pattern N:M keeps the most.

Channels of a layer's input may be exchanged if the layer that makes them exchanges its outputs in the same way, with
every per-channel parameter between the two; the network stays the same function. After J. Pool and C. Yu, "Channel
Permutations for N:M Sparsity" (NeurIPS 2021): two groups of M channels are split anew into the best of all ways.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgepack.compress._axis import COPIES, DROPOUTS
from edgepack.compress._graph import Call, GraphView, operator_of
from edgepack.compress._operators import AVERAGES, FUSED, MAXIMA, WEIGHTED, aten, only_reader

LARGEST = 4  # M with a number of ways that can all be tried: 35
POINTWISE = (
    *FUSED, *COPIES, *DROPOUTS, aten.silu, aten.silu_, aten.gelu, aten.sigmoid, aten.tanh, aten.elu, aten.elu_,
    aten.hardswish, aten.hardswish_, aten.hardsigmoid, aten.mish, aten.softplus,
)  # fmt: skip
GAIN = 1e-9  # of what is kept; less is rounding
WORK = 3e9  # scores looked at, at most


def best_order(scores: Tensor, kept: int, of: int) -> Tensor:
    """An order of the columns with which the ``kept`` best of each ``of`` neighbours add up to much.

    Every two groups meet as in a tournament, and split their columns anew if that keeps more, until none gains or, for
    very wide layers, there were enough of them. Never worse than the order of now.

    Args:
        scores: (rows, columns), not below 0; columns a multiple of ``of``.
    """
    order = torch.arange(scores.shape[1]).view(-1, of)
    ways, left_to_do = _ways(of), WORK
    while left_to_do > 0:
        before = order.clone()
        for left, right in _rounds(len(order)):
            left_to_do -= scores.numel() * len(ways)
            both = torch.cat([order[left], order[right]], 1)
            totals = _kept(scores[:, both[:, ways[:, 0]]], kept) + _kept(scores[:, both[:, ways[:, 1]]], kept)
            best = totals.argmax(1)
            gains = totals.gather(1, best[:, None])[:, 0] > totals[:, 0] * (1 + GAIN)
            split = both.gather(1, ways[torch.where(gains, best, 0)].flatten(1)).view(-1, 2, of)
            order[left], order[right] = split[:, 0], split[:, 1]
            if left_to_do <= 0:
                break
        if torch.equal(order, before):
            break
    return order.flatten()


def _ways(of: int) -> Tensor:
    """Splits of 2·M columns into two halves, the first as they are: (ways, 2, M)."""
    first = [(0, *rest) for rest in itertools.combinations(range(1, 2 * of), of - 1)]
    return torch.tensor([[half, [i for i in range(2 * of) if i not in half]] for half in first])


def _kept(scores: Tensor, kept: int) -> Tensor:
    """(rows, pairs, ways, M) → (pairs, ways)."""
    if (kept, scores.shape[-1]) != (2, 4):
        return scores.topk(kept, -1).values.sum((0, -1))
    a, b, c, d = scores.unbind(-1)  # ten times as fast
    return torch.maximum(torch.maximum(a, b) + torch.maximum(c, d), torch.maximum(a + b, c + d)).sum(0)


def _rounds(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of groups; within a round each plays once, and after all rounds everybody has met everybody."""
    players = list(range(count)) + [-1] * (count % 2)
    half = len(players) // 2
    for _ in range(len(players) - 1):
        pairs = [(a, b) for a, b in zip(players[:half], players[: half - 1 : -1], strict=True) if a >= 0 and b >= 0]
        if pairs:
            yield torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
        players.insert(1, players.pop())


@dataclass(frozen=True, eq=False)
class Chain:
    """A layer, the one that makes what it reads, and everything per channel between them."""

    producer: nn.Module
    between: tuple[nn.Module, ...]
    consumer: nn.Module

    def permute(self, order: Tensor) -> None:
        """Exchange channels all along; the network stays the same function."""
        with torch.no_grad():
            for layer in (self.producer, *self.between):
                names = ("weight", "bias", *(("running_mean", "running_var") if isinstance(layer, _BatchNorm) else ()))
                for value in (getattr(layer, name) for name in names):
                    if value is not None:
                        value.copy_(value[order].clone())
            weight = self.consumer.weight
            assert isinstance(weight, Tensor)
            weight.copy_(weight[:, order].clone())


def chain_before(view: GraphView, layer: nn.Module) -> Chain | None:
    """What makes a layer's input channels, None where they cannot be exchanged exactly."""
    (call, *more) = view.calls_of(layer)
    if more or not _whole(call):
        return None
    axis, between = _axis_of(layer), list[nn.Module]()
    node = call.node.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function" and only_reader(node) is not None:
        found = view.call_at(node)
        if found is not None and (found.obstacle or len(view.calls_of(found.layer)) > 1):
            return None
        if found is not None and _whole(found):
            return Chain(found.layer, tuple(between), layer) if _axis_of(found.layer) == axis else None
        if found is not None and (isinstance(found.layer, _BatchNorm) or _depthwise(found.layer)) and axis == 1:
            between.append(found.layer)
        elif operator_of(node) not in POINTWISE and not (axis == 1 and operator_of(node) in (*AVERAGES, *MAXIMA)):
            return None
        node = node.args[0]
    return None


def _whole(call: Call) -> bool:
    """Whether every output channel of a layer reads every input channel."""
    return operator_of(call.node) in WEIGHTED and getattr(call.layer, "groups", 1) == 1


def _depthwise(layer: nn.Module) -> bool:
    plain = isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd)
    return plain and layer.groups == layer.in_channels == layer.out_channels


def _axis_of(layer: nn.Module) -> int:
    return 1 if isinstance(layer, _ConvNd) else -1
