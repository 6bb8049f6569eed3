"""Which entry of a plan each operator of a graph has, and how to walk among operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgepack.errors import InputError

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from edgepack.plan import Plan

PASSING = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose",
    "contiguous", "clone", "alias", "detach", "dropout", "slice", "select", "pad", "expand",
    "max_pool1d", "max_pool2d", "max_pool3d",
})  # fmt: skip


def aligned(module: GraphModule, plan: Plan) -> dict[Node, str]:
    """Node of the graph → its name in the plan.

    A change of layout or baked-in preprocessing stands before the network and may shift the numbers in names, so
    operators of one kind are counted from the end. The result that enters the network takes the name of the input.

    Raises:
        InputError: the plan names operators that the graph lacks.
    """
    planned, present = defaultdict(list), defaultdict(list)
    for name, entry in plan.nodes.items():
        if "operator" not in entry:
            raise InputError(f"the plan does not say which operator {name!r} is", "compress again")
        planned[entry["operator"]].append(name)
    for node in module.graph.nodes:
        if floating(node):
            present[word(node)].append(node)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, planned.pop("input", []), strict=False))
    found: dict[Node, str] = {}
    for kind, names in planned.items():
        nodes = present[kind][-len(names) :]
        if len(nodes) < len(names):
            raise InputError(f"the plan has {len(names)} operators {kind}, the network {len(nodes)}", "compress again")
        found.update(zip(nodes, names, strict=True))
    for node in module.graph.nodes:
        if node not in found and is_float(node) and any(user in found for user in node.users):
            origin = _placeholder(node)
            if origin in inputs:
                found[node] = inputs[origin]
    return found


def floats(node: Node) -> Iterator[Node]:
    return (source for source in node.all_input_nodes if is_float(source))


def is_float(node: Node) -> bool:
    import torch

    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def floating(node: Node) -> bool:
    return node.op == "call_function" and is_float(node)


def _placeholder(node: Node) -> Node | None:
    """The input that a node's value comes from."""
    while node.op != "placeholder":
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node


def word(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def kind_of(node: Node) -> str:
    """A linear layer on rows of more than one axis is a matrix product to most engines."""
    return "matmul" if word(node) == "linear" and node.meta["val"].dim() > 2 else word(node)
