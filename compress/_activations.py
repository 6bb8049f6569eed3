"""Activations on integer grids: which are rounded, in how many bits, and the rounding itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx

from edgepack.compress._graph import operator_of
from edgepack.compress._operators import WEIGHTED, aten, floating, fused, only_reader, passes

BITS = 8  # of activations, and of what the options say nothing of
CONVOLUTIONS = tuple(operator for operator in WEIGHTED if operator is not aten.linear)
Range = tuple[float, float]


def grid(low: float, high: float, bits: int = BITS) -> tuple[float, int, int, int]:
    """Step, zero point, smallest and largest integer of a range with 0 in it."""
    largest = (1 << bits) - 1
    step = (high - low) / largest or 1.0
    return step, round(-low / step), 0, largest


def origin(node: fx.Node) -> fx.Node:
    """The operator or input whose values a node only rearranges."""
    while passes(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def rounded(node: fx.Node) -> bool:
    """Whether engines round a value: what layers with weights read, and convolutions' results, which some must round.

    Not the residual sums of transformers: they stay float in every engine, and small channels or tokens in them
    would be lost. Not what a ReLU is computed in one with.
    """
    return not fused(only_reader(node)) and (operator_of(node) in CONVOLUTIONS or any(True for _ in readers(node)))


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """The layers with weights that read a node's values, rearranged or not."""
    for user in node.users:
        if operator_of(user) in WEIGHTED:
            yield user
        elif passes(user):
            yield from readers(user)


def last_layers(graph: fx.Graph) -> set[fx.Node]:
    """The layer with weights that each output comes from, the last one where there are several ways to it."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    found = set()
    for output in graph.output_node().all_input_nodes:
        reached = list(_before(output, set()))
        if reached:
            found.add(max(reached, key=lambda node: order[node]))
    return found


def few_bits(graph: fx.Graph, bits: int, of_weight: Callable[[fx.Node], int | None]) -> dict[str, int]:
    """Node → ``bits``, for what only layers with weights of so few bits multiply.

    Args:
        of_weight: bits of a layer's weights; None where they stay float.
    """
    found = {}
    for node in graph.nodes:
        readers_ = list(readers(origin(node))) if floating(node) or node.op == "placeholder" else []
        if readers_ and all(of_weight(reader) == bits for reader in readers_):
            found[node.name] = bits
    return found


def as_it_is(node: fx.Node, value: Tensor) -> Tensor:
    return value


def fake_found(node: fx.Node, value: Tensor) -> Tensor:
    """Round what a linear layer reads, in the range it has."""
    if value.dtype != torch.float32 or not any(operator_of(user) is aten.linear for user in node.users):
        return value
    low, high = (float(end) for end in value.aminmax())
    return torch.fake_quantize_per_tensor_affine(value, *grid(min(low, 0.0), max(high, 0.0)))


def fake(
    ranges: Mapping[str, Range], names: Mapping[str, str], bits: Mapping[str, int]
) -> Callable[[fx.Node, Tensor], Tensor]:
    """Round what engines round.

    Args:
        ranges: by name in the plan.
        names: node → that name, where they differ.
        bits: node → bits, where they are not 8.
    """

    def quantize(node: fx.Node, value: Tensor) -> Tensor:
        pair = ranges.get(names.get(node.name, node.name))
        if pair is None or value.dtype != torch.float32 or not rounded(node):
            return value
        return torch.fake_quantize_per_tensor_affine(value, *grid(*pair, bits.get(node.name, BITS)))

    return quantize


def _before(node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
    """Layers with weights from which a value comes through no other such layer."""
    if node in seen:
        return
    seen.add(node)
    if operator_of(node) in WEIGHTED:
        yield node
        return
    for source in node.all_input_nodes:
        yield from _before(source, seen)
