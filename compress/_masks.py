"""Masks in the plan: which weights of a layer stay, ``node/mask``, True where they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edgepack.compress._graph import GraphView, argument, operator_of, owner_path
from edgepack.compress._operators import WEIGHTED
from edgepack.compress._preparing import parameters
from edgepack.graph import capture

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.plan import Plan
    from edgepack.task import Task

MASK = "/mask"


def plan_masks(plan: Plan, view: GraphView, masks: Mapping[nn.Parameter, Tensor]) -> None:
    """Put masks of weights (1 or 0) into the plan, at every operator that reads the weight."""
    for call in view.calls:
        weight = call.layer.weight
        if isinstance(weight, nn.Parameter) and weight in masks:
            plan.tensors[f"{call.node.name}{MASK}"] = masks[weight].bool().numpy()


def sparse_layers(plan: Plan, module: nn.Module, task: Task) -> set[str]:
    """Paths of the layers that have masks. Passes that rename operators or scale weights keep the paths."""
    names = {name.removesuffix(MASK) for name in plan.tensors if name.endswith(MASK)}
    if not names:
        return set()
    return {owner_path(node) for node in capture(module, task).program.graph.nodes if node.name in names}


def renew_masks(plan: Plan, masks: Mapping[str, Tensor]) -> None:
    """Masks by the names that operators have now, instead of those in the plan."""
    for name in [name for name in plan.tensors if name.endswith(MASK)]:
        del plan.tensors[name]
    plan.tensors.update({f"{name}{MASK}": kept.numpy() for name, kept in masks.items()})


def nonzero(module: nn.Module, graph: Graph, paths: set[str]) -> dict[str, Tensor]:
    """Operator → what of its weight is not 0, for the layers at these paths."""
    tensors = parameters(module, graph) if paths else {}
    nodes = [node for node in graph.program.graph.nodes if operator_of(node) in WEIGHTED and owner_path(node) in paths]
    sources = {node.name: argument(node, "weight").name for node in nodes}
    return {name: tensors[source].detach() != 0 for name, source in sources.items() if source in tensors}
