"""Constant factors per channel go into the weights before they are rounded.

litert-torch multiplies them in (layer scale …) when it converts, which would move weights off the 16-bit grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepack.contracts import Graph
from edgepack.export._dialects import _attribute, _constant, _fold_constants, _new_attribute, retrace

if TYPE_CHECKING:
    from torch.fx import GraphModule

AXES = {"conv1d": 1, "conv2d": 1, "linear": -1}  # operator → axis of output channels in its result


def fold_scales(graph: Graph) -> Graph:
    """convolution or linear, multiplication by a constant per channel → the same with scaled weights and bias."""
    import torch

    module: GraphModule = graph.program.module(check_guards=False)
    for node in list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)):
        if not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    _fold_constants(module)
    found = False
    for product in list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)):
        found |= any(_fold(module, product, *pair) for pair in (product.args, product.args[::-1]))
    return retrace(graph, module) if found else graph


def _fold(module: GraphModule, product: Any, scaled_result: Any, factor: Any) -> bool:
    import torch

    source, axis = _linear(scaled_result)
    scale = _constant(module, factor)
    if axis is None or scale is None or _constant(module, source.args[1]) is None:
        return False
    shape = scaled_result.meta["val"].shape
    wide = [1] * (len(shape) - scale.ndim) + list(scale.shape)
    if len(wide) != len(shape) or wide[axis] != shape[axis] or scale.numel() != shape[axis]:
        return False
    bias = source.args[2] if len(source.args) > 2 else None
    with torch.no_grad():
        for index, tensor in enumerate((source.args[1], bias), start=1):
            if tensor is None:
                continue
            weight = _attribute(module, tensor).double()
            scaled = weight * scale.reshape(-1, *(1 for _ in range(weight.ndim - 1)))
            source.update_arg(index, _new_attribute(module, source, f"{source.name}_scaled{index}", scaled))
    product.replace_all_uses_with(scaled_result)
    module.graph.erase_node(product)
    return True


def _linear(node: Any) -> tuple[Any, int | None]:
    """The linear map behind a node that only one operator reads, and the axis of its channels there."""
    order = None
    if _name(node) == "permute" and len(node.users) == 1:
        node, order = node.args
    axis = AXES.get(_name(node))
    if axis is None or len(node.users) != 1:
        return node, None
    rank = node.meta["val"].ndim
    return node, axis % rank if order is None else [place % rank for place in order].index(axis % rank)


def _name(node: Any) -> str:
    return str(getattr(getattr(node, "target", None), "overloadpacket", "")).removeprefix("aten.")
