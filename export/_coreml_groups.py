"""Weights with a scale per group of columns, as Core ML has them from iOS 18: ``constexpr_blockwise_shift_scale``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepack.export._coreml_operators import taught
from edgepack.export._dialects import _assign, _attribute, retrace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from edgepack.contracts import Graph

NAME = "edgepack::dequantize_groups"


def merge_groups(graph: Graph) -> Graph:
    """Groups made float and laid side by side → one operator, which coremltools is taught here.

    ::

        dequantize_per_channel (rows · groups, size) → view (rows, columns, …)
        becomes   dequantize_groups (rows, columns, …)
    """
    import torch
    import torch.ao.quantization.fx._decomposed

    module = graph.program.module(check_guards=False)
    to_floats = torch.ops.quantized_decomposed.dequantize_per_channel.default
    found = [
        node
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
        if node.args[0].target is to_floats
    ]
    if not found:
        return graph
    operator = taught(NAME, _dequantize, _written)
    for node in found:
        _merge(module, node, operator)
    return retrace(graph, module)


def _merge(module: GraphModule, node: Node, operator: Any) -> None:
    wide: Any
    sizes: Any
    wide, sizes = node.args[:2]
    integers, scale = (_attribute(module, source) for source in wide.args[:2])
    shape = [int(size) for size in sizes]
    groups = scale.numel() // shape[0]
    kept = []
    for suffix, value, form in (
        ("laid", integers, shape),
        ("scales", scale, [shape[0], groups, *[1] * len(shape[2:])]),
    ):
        name = f"{wide.args[0].target}_{suffix}"
        _assign(module, name, value.detach().reshape(form).contiguous())
        with module.graph.inserting_before(node):
            kept.append(module.graph.get_attr(name))
    with module.graph.inserting_before(node):
        merged = module.graph.call_function(operator, tuple(kept))
    node.replace_all_uses_with(merged)
    module.graph.erase_node(node)


def _dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """``integers · scale``, each scale for a block of columns: (rows, columns, …) and (rows, groups, …)."""
    return integers * scale.repeat_interleave(integers.shape[1] // scale.shape[1], 1)


def _written(utils: Any, integers: Any, scale: Any, name: str) -> Any:
    return utils._construct_constexpr_dequant_op(integers, None, scale, name=name)
