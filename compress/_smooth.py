"""Smoothing: channels of a layer norm's result brought to one size, paid for by the linear layers that read it.

The factor goes into the norm's own weight and bias and, the other way round, into the columns of the linear layers,
so the network stays the same function. A result that anything else reads too (the residual sum of post-norm blocks)
cannot be changed and stays.

After G. Xiao et al., "SmoothQuant" (arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edgepack.compress._axis import forward
from edgepack.compress._graph import argument, operator_of, readers, shape
from edgepack.compress._operators import aten

SHARE = 0.5
LIMIT = 1e4


@dataclass(frozen=True)
class Norm:
    """A layer norm whose result only linear layers read.

    Attributes:
        node: of the norm.
        affine: its weight and, where it has one, its bias.
        weights: of the linear layers, (outputs, channels).
    """

    node: fx.Node
    affine: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def norms(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> list[Norm]:
    """Every layer norm that can be smoothed.

    Args:
        graph: of the captured module.
        tensors: placeholder → the module's own parameter.
    """
    nodes = graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    return [norm for node in nodes if (norm := _norm(node, tensors)) is not None]


def smooth(norm: Norm, low: Tensor, high: Tensor, share: float = SHARE) -> float:
    """Smooth one norm in place; largest change of a channel as a factor.

    Args:
        low, high: of each channel of the norm's result, on calibration data.
    """
    size = torch.maximum(low.abs(), high.abs()).double()
    columns = torch.stack([_columns(weight) for weight in norm.weights]).amax(0)
    alive = (size > 0) & (columns > 0)
    wanted = size.pow(share) / columns.pow(1 - share)
    middle = wanted[alive].log().mean().exp() if bool(alive.any()) else torch.ones(())
    scale = torch.where(alive, (wanted / middle).clamp(1 / LIMIT, LIMIT), torch.ones_like(size))
    with torch.no_grad():
        for tensor in norm.affine:
            tensor.copy_(tensor.double() / scale)
        for weight in norm.weights:
            weight.copy_(weight.double() * scale)
    return float(torch.maximum(scale, 1 / scale).max())


def _columns(weight: Tensor) -> Tensor:
    """How much of its row's scale each column uses at most."""
    rows = weight.detach().double()
    return (rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-30)).abs().amax(0)


def _norm(node: fx.Node, tensors: Mapping[str, Tensor]) -> Norm | None:
    held = [argument(node, name) for name in ("weight", "bias")]
    affine = [source for source in held if isinstance(source, fx.Node)]
    if held[0] is None or len(argument(node, "normalized_shape")) != 1:
        return None
    if not all(source.name in tensors and len(source.users) == 1 for source in affine):
        return None
    found = list(_linears(node, len(shape(node)) - 1))
    if not found or any(linear is None for linear in found):
        return None
    linears = {linear for linear in found if linear is not None}
    weights = {argument(linear, "weight") for linear in linears}
    if not all(source.name in tensors and linears.issuperset(source.users) for source in weights):
        return None
    return Norm(node, tuple(tensors[source.name] for source in affine), _once(tensors[w.name] for w in weights))


def _once(tensors: Iterator[Tensor]) -> tuple[Tensor, ...]:
    return tuple({id(tensor): tensor for tensor in tensors}.values())


def _linears(node: fx.Node, axis: int) -> Iterator[fx.Node | None]:
    """The linear layers that read a value's channels; None for any other reader."""
    for reader in readers(node):
        if operator_of(reader) is aten.linear:
            yield reader if reader.args[0] is node and axis == len(shape(node)) - 1 else None
        elif reader.op == "call_function" and reader.args[0] is node and (after := _after(reader, axis)) is not None:
            yield from _linears(reader, after)
        else:
            yield None


def _after(node: fx.Node, axis: int) -> int | None:
    """Where the channels are in the result of an operator that moves values, or takes some of the other axes."""
    kind = operator_of(node)
    if kind in (aten.select, aten.slice):
        dim = (argument(node, "dim") or 0) % len(shape(node.all_input_nodes[0]))
        if dim == axis:
            return None
        return axis - (kind is aten.select and dim < axis)
    step = forward(node, axis)
    return None if step is None else step.axis
