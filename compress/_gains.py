"""Channels multiplied by learned gains behind a layer (layer scale): the layer's weight takes the gains.

Left between a layer and a sum, the product would keep both out of integers. The gains become ones, and exporters drop
products with ones. After H. Touvron et al., "Going deeper with Image Transformers" (arXiv:2103.17239), who put them
there.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edgepack.compress._affine import Affine, merge_after
from edgepack.compress._axis import COPIES, DROPOUTS, RESHAPES
from edgepack.compress._graph import Call, GraphView, _tensors, operator_of, shape
from edgepack.compress._operators import WEIGHTED, aten, only_reader

PRODUCTS = (aten.mul, aten.mul_)


def merge_gains(view: GraphView) -> int:
    """Merge every product of a layer's result with one gain per channel, in place; how many there were."""
    tensors = _tensors(view.module, view.program)
    count = 0
    for node in view.nodes:
        found = _found(view, node, tensors) if operator_of(node) in PRODUCTS else None
        if found is not None and merge_after(found[0].layer, Affine(found[1].double(), torch.zeros(len(found[1])))):
            found[1].fill_(1.0)
            count += 1
    return count


def _found(view: GraphView, node: fx.Node, tensors: dict[str, Tensor]) -> tuple[Call, Tensor] | None:
    """The layer in front of a product, and its gains."""
    sources = [source for source in node.args if isinstance(source, fx.Node)]
    for value, factor in (sources, sources[::-1]) if len(sources) == 2 else ():
        call, gains = _layer(view, value), _origin(factor)
        held = tensors.get(gains.name) if gains is not None else None
        if call is None or held is None or held.dim() != 1 or held.dtype != torch.float32:
            continue
        last = len(shape(node)) - 1
        axis = last if operator_of(call.node) is aten.linear else 1
        wanted = tuple(len(held) if index == axis else 1 for index in range(last + 1))
        fits = shape(factor) == wanted or (axis == last and shape(factor) == (len(held),))
        if fits and shape(value) == shape(node):
            return call, held.detach()
    return None


def _layer(view: GraphView, node: fx.Node) -> Call | None:
    """The layer whose result this is, if nothing else reads it and its parameters may be edited."""
    while only_reader(node) is not None:
        call = view.call_at(node)
        if call is not None:
            alone = call.obstacle is None and len(view.calls_of(call.layer)) == 1
            return call if alone and operator_of(node) in WEIGHTED else None
        source = node.args[0] if operator_of(node) in (*COPIES, *DROPOUTS) else None
        if not isinstance(source, fx.Node):
            return None
        node = source
    return None


def _origin(node: fx.Node) -> fx.Node | None:
    """The parameter that a node holds in another form, if that is its only use."""
    while only_reader(node) is not None:
        if node.op == "placeholder":
            return node
        source = node.args[0] if operator_of(node) in RESHAPES else None
        if not isinstance(source, fx.Node):
            return None
        node = source
    return None
