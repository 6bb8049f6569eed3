"""Constants as Core ML's float16 programs hold them: every float weight and scalar on the grid of 16-bit numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.export._dialects import half_weights, retrace

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node


LEAST = float(np.finfo(np.float16).smallest_subnormal)


def on_half_grid(graph: Graph) -> Graph:
    """Round weights, biases, statistics and scalar arguments to 16 bits, held as float32.

    What 16 bits cannot hold (beyond 65504, or a nonzero number that would become zero) stays as it is; an epsilon of a
    normalization becomes 6e-8 at least.

    Raises:
        Unsupported: a weight is beyond the range of float16; names it.
    """
    return round_constants(half_weights(graph))


def round_constants(graph: Graph) -> Graph:
    """Round every float constant on its own: none is multiplied into another, so integers stay integers."""
    module = graph.program.module(check_guards=False)
    _round_tensors(module)
    for node in module.graph.nodes:
        if node.op == "call_function":
            _round_scalars(node)
    _half_scale(module)
    return retrace(graph, module)


def exact(values: Any) -> bool:
    """Whether 16 bits hold these numbers."""
    array = np.asarray(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(np.float16).astype(np.float32), array, equal_nan=True))


def _rounded(value: float, floor: bool = False) -> float:
    with np.errstate(over="ignore"):
        half = float(np.float16(value))
    if half == 0.0 and value != 0.0:
        return LEAST if floor else value
    return half if np.isfinite(half) else value


def _round_tensors(module: GraphModule) -> None:
    """The tensors themselves belong to the graph that was given, and are replaced."""
    import torch

    names = dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr"))
    places = [(module.get_submodule(owner), leaf) for owner, _, leaf in (name.rpartition(".") for name in names)]
    values = [getattr(owner, leaf) for owner, leaf in places]
    rounded: dict[int, torch.Tensor] = {}  # one tensor under two names stays one tensor
    for (owner, leaf), value in zip(places, values, strict=True):
        if isinstance(value, torch.Tensor):
            setattr(owner, leaf, rounded.setdefault(id(value), _half(value)))


def _half(tensor: torch.Tensor) -> torch.Tensor:
    """A rounded copy, or the tensor itself."""
    import torch

    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.detach().to(torch.float16).to(torch.float32)
    if bool((half.isinf() & tensor.isfinite()).any()):
        return tensor
    return torch.nn.Parameter(half, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else half


def _round_scalars(node: Node) -> None:
    floor = "norm" in str(node.target)  # an epsilon, which must not become zero
    node.args = tuple(_rounded(value, floor) if isinstance(value, float) else value for value in node.args)
    scalars = {name: value for name, value in node.kwargs.items() if isinstance(value, float)}
    node.kwargs = {**node.kwargs, **{name: _rounded(value, floor) for name, value in scalars.items()}}


def _half_scale(module: GraphModule) -> None:
    """Attention divides by the root of its width, which Core ML gets as a factor."""
    import torch

    attention = torch.ops.aten.scaled_dot_product_attention.default
    for node in module.graph.find_nodes(op="call_function", target=attention):
        if node.kwargs.get("scale") is None:
            query: Any = node.args[0]
            node.kwargs = {**node.kwargs, "scale": _rounded(float(query.meta["val"].shape[-1]) ** -0.5)}
