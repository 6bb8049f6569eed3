"""Products that are written otherwise before integers are: SiLU as x · sigmoid(x), products with ones not at all."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from edgepack.export._dialects import _attribute

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


def split_silu(module: GraphModule, node: Node) -> tuple[Node, Node]:
    """Replace a SiLU; the sigmoid and the product."""
    import torch

    with module.graph.inserting_before(node):
        factor = module.graph.call_function(torch.ops.aten.sigmoid.default, (node.args[0],))
        product = module.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], factor))
    factor.meta["val"] = product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product)
    module.graph.erase_node(node)
    return factor, product


def drop_ones(module: GraphModule, node: Node, moves: Collection[str]) -> bool:
    """Take out a product with ones, which compression leaves where a layer took the factors; whether it was one.

    Args:
        moves: operators that only rearrange values.
    """
    sources = node.all_input_nodes
    for kept, factor in (sources, sources[::-1]) if len(sources) == 2 else ():
        if kept.meta["val"].shape == node.meta["val"].shape and _ones(module, factor, moves):
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)
            return True
    return False


def _ones(module: GraphModule, factor: Node, moves: Collection[str]) -> bool:
    while str(factor.target).removeprefix("aten.").partition(".")[0] in moves and len(factor.all_input_nodes) == 1:
        (factor,) = factor.all_input_nodes
    return factor.op == "get_attr" and bool((_attribute(module, factor) == 1).all())
