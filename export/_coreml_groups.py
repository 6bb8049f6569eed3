"""Weights with a scale per group of columns, as Core ML has them from iOS 18: ``constexpr_blockwise_shift_scale``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from edgepack.errors import require
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
    _teach()
    for node in found:
        _merge(module, node)
    return retrace(graph, module)


def _merge(module: GraphModule, node: Node) -> None:
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
        merged = module.graph.call_function(_operator(), tuple(kept))
    node.replace_all_uses_with(merged)
    module.graph.erase_node(node)


@functools.cache
def _operator() -> Any:
    """``integers · scale``, each scale for a block of columns: (rows, columns, …) and (rows, groups, …)."""
    import torch

    def dequantize_groups(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return integers * scale.repeat_interleave(integers.shape[1] // scale.shape[1], 1)

    def like(integers: Tensor, scale: Tensor) -> Tensor:
        return torch.empty_like(integers, dtype=scale.dtype)

    # postponed annotations would be looked up among this module's names, where torch is not
    dequantize_groups.__annotations__ = dict.fromkeys(("integers", "scale", "return"), torch.Tensor)
    made = torch.library.custom_op(NAME, dequantize_groups, mutates_args=())
    made.register_fake(like)
    return torch.ops.edgepack.dequantize_groups.default


@functools.cache
def _teach() -> None:
    """Tell coremltools how to write the operator."""
    registry = require("coremltools.converters.mil.frontend.torch.torch_op_registry", "coreml")
    utils = require("coremltools.converters.mil.frontend._utils", "coreml")

    def dequantize_groups(context: Any, node: Any) -> None:
        integers, scale = (context[name].val for name in node.inputs)
        context.add(utils._construct_constexpr_dequant_op(integers, None, scale, name=node.name), node.name)

    registry.register_torch_op(dequantize_groups, torch_alias=[NAME, NAME.replace("::", ".")])
