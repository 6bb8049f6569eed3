"""Which channels of a network can be removed: groups from the dependency graph, each tried before it is believed.

Torch-Pruning (Fang et al., DepGraph, arXiv:2301.12900) follows the gradients' graph, which does not tell everything:
what pads or slices channels, for one. So each group is tried on the network with random weights, in double precision:
with some units removed it must compute what it computes with their weights at 0.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from edgepack.compress._cutting import IN, OUT, Cut, Group, Side, depthwise, mask, owner, remove, tensors, union
from edgepack.compress._graph import named
from edgepack.compress._heads import heads_of, settle
from edgepack.errors import require
from edgepack.graph import flatten
from edgepack.usercode import sentence

DOUBLE, SINGLE = 1e-8, 1e-4  # largest differences over the largest value, by precision
FAULTS = (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError, KeyError, ZeroDivisionError)


@dataclass(eq=False)
class Survey:
    """What can be removed from a network, and what cannot.

    Attributes:
        groups: whose units can go.
        left: name of any other group → why.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    layers: Sequence[str]
    leave: Sequence[str]
    heads: bool
    groups: list[Group] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def run(self) -> Survey:
        found = list(heads_of(self.module))
        inside = {side for group in found for side in group.sides}
        found = found if self.heads else []
        for group in self._channels():
            if not inside & set(group.sides):  # what heads are made of goes by heads
                found.append(group)
        self._try([group for group in found if self._wanted(group)])
        return self

    def exact(self, cut: Cut) -> bool:
        """Whether a cut of several groups is the same as weights at 0, as those of each were."""
        return self._trial.exact(cut)

    def _wanted(self, group: Group) -> bool:
        paths = [path for path, what in group.sides if what == OUT]
        if self.layers and not any(named(path, self.layers) for path in paths):
            self.left[group.name] = "it is not among layers"
        elif kept := next((path for path in paths if named(path, self.leave)), None):
            self.left[group.name] = "it is in leave" if kept == group.name else f"{kept}, tied to it, is in leave"
        return group.name not in self.left

    def _channels(self) -> Iterator[Group]:
        """Every group of channels that some layer computes, those that cannot go excepted."""
        try:
            graph = _graph(self.module, self.inputs)
        except FAULTS as error:
            self.left[type(self.module).__name__] = f"Torch-Pruning cannot follow its channels ({sentence(error)})"
            return
        seen: set[str] = set()
        for path, layer in graph.model.named_modules():
            computes = isinstance(layer, (nn.Linear, _ConvNd)) and not depthwise(layer)
            if not computes or path in seen or layer not in graph.module2node:
                continue
            pruner = graph.get_pruner_of_module(layer)
            units = list(range(pruner.get_out_channels(layer)))
            try:
                items = list(graph.get_pruning_group(layer, pruner.prune_out_channels, units))
            except FAULTS as error:
                self.left[path] = f"Torch-Pruning cannot follow its channels ({sentence(error)})"
                continue
            seen |= {path for path, what in (_side(graph, item) for item in items) if what == OUT}
            if (reason := _reason(graph, items)) is None:
                yield _group(graph, path, items, len(units))
            else:
                self.left[path] = reason

    def _try(self, groups: Sequence[Group]) -> None:
        """Keep the groups that can go together; where they cannot, look in each half."""
        if not groups:
            return
        fault = self._trial.fault(groups)
        if fault is None:
            self.groups += groups
        elif len(groups) == 1:
            self.left[groups[0].name] = fault
        else:
            self._try(groups[: len(groups) // 2])
            self._try(groups[len(groups) // 2 :])

    @cached_property
    def _trial(self) -> Trial:
        return Trial.of(self.module, self.inputs)


@dataclass(frozen=True)
class Trial:
    """A network with random weights, so that nothing hides behind a small one; in double precision if it bears that.

    Attributes:
        limit: largest difference over the largest value that rounding explains.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    limit: float

    @classmethod
    def of(cls, module: nn.Module, inputs: tuple[Tensor, ...]) -> Trial:
        random = _random(copy.deepcopy(module))
        double = tuple(one.double() if one.is_floating_point() else one for one in inputs)
        twin = copy.deepcopy(random).double()
        try:
            with torch.no_grad():
                twin(*double)
        except FAULTS:
            return cls(random, inputs, SINGLE)
        return cls(twin, double, DOUBLE)

    def fault(self, groups: Sequence[Group]) -> str | None:
        """What goes wrong when half of each group's units go, None if nothing does."""
        random = torch.Generator().manual_seed(len(groups))
        cuts = [group.cut(torch.randperm(group.units, generator=random)[: max(1, group.units // 2)].tolist())
                for group in groups]  # fmt: skip
        try:
            exact = self.exact(union(cuts))
        except FAULTS as error:
            return f"without some of its {groups[0].kind} the network does not run ({sentence(error)})"
        return None if exact else f"removing {groups[0].kind} from it is not the same as setting their weights to 0"

    def exact(self, cut: Cut) -> bool:
        """Whether removal is the same as weights at 0."""
        return difference(self.module, self.inputs, cut) <= self.limit


def difference(module: nn.Module, inputs: Sequence[Tensor], cut: Cut, pruned: nn.Module | None = None) -> float:
    """Largest difference between a network without some channels and with their weights at 0, over the largest value.

    ``pruned`` is the former, made here if it is not given. Infinite where shapes differ.
    """
    if pruned is None:
        pruned = remove(copy.deepcopy(module), cut)
        settle(pruned)
    with torch.no_grad():
        wanted = flatten(mask(copy.deepcopy(module), cut)(*inputs))
        found = flatten(pruned(*inputs))
    if [one.shape for one in wanted] != [one.shape for one in found]:
        return float("inf")
    gaps = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True)
            if b.numel() and b.is_floating_point()]  # fmt: skip
    return max((float("inf") if gap != gap else gap for gap in gaps), default=float("inf"))


def _graph(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Torch-Pruning's graph of a copy of the network."""
    library = require("torch_pruning", "prune")
    twin = copy.deepcopy(module).eval()
    for value in twin.parameters():
        value.requires_grad_(True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return library.DependencyGraph().build_dependency(twin, inputs, verbose=False)


def _reason(graph: Any, items: Sequence[Any]) -> str | None:
    """Why a group is not even tried."""
    kinds = graph.ops
    reads = False
    for item in items:
        layer, where = item.dep.target.module, graph._module2name.get(item.dep.target.module, "")
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            return f"{where} normalizes channels together, so that without some the others would change"
        if isinstance(layer, kinds._OutputOp):
            return "its channels are the network's output"
        if isinstance(layer, (nn.MultiheadAttention, nn.LSTM)):
            return f"{where} is a {type(layer).__name__}, which keeps its width"
        if isinstance(layer, _ConvNd) and layer.groups > 1 and not depthwise(layer):
            return f"{where} is a grouped convolution"
        if isinstance(layer, nn.Module) and parametrize.is_parametrized(layer):
            return f"the weights of {where} are computed"
        if None in item.root_idxs:
            return f"it is not known which channels of {where} belong to it"
        reads |= isinstance(layer, (nn.Linear, _ConvNd)) and _side(graph, item)[1] == IN
    return None if reads else "no layer reads its channels: they are the network's output"


def _group(graph: Any, path: str, items: Sequence[Any], units: int) -> Group:
    """A group of the library as ours."""
    sides: dict[Side, list[list[int]]] = {}
    for item in items:
        if (side := _side(graph, item))[0]:
            rows = sides.setdefault(side, [[] for _ in range(units)])
            for root, index in zip(item.root_idxs, item.idxs, strict=True):
                rows[root].append(index)
    return Group(path, {side: rows for side, rows in sides.items() if _has_numbers(graph.model, side)})


def _side(graph: Any, item: Any) -> Side:
    """Which side of which layer; the path is empty for an operator without parameters."""
    layer = item.dep.target.module
    if isinstance(layer, nn.Parameter):
        return graph._param_to_name[layer], str(item.dep.target.pruning_dim % layer.ndim)
    pruner = graph.get_pruner_of_module(layer)
    reads = item.dep.handler == pruner.prune_in_channels != pruner.prune_out_channels
    return graph._module2name.get(layer, ""), IN if reads else OUT


def _has_numbers(module: nn.Module, side: Side) -> bool:
    layer = owner(module, side[0])
    shared = isinstance(layer, nn.PReLU) and layer.num_parameters == 1
    known = isinstance(layer, nn.Parameter) or next(tensors(module, side), None) is not None
    return known and not shared


def _random(module: nn.Module) -> nn.Module:
    """Random weights, biases and statistics. Changes it in place."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not value.is_floating_point():
                continue
            leaf = name.rpartition(".")[2]
            if leaf in ("running_mean", "bias") or value.ndim == 0:
                value.normal_(0, 0.3, generator=random)
            elif value.ndim == 1 and leaf in ("running_var", "weight"):
                value.uniform_(0.5, 1.5, generator=random)
            elif isinstance(value, nn.Parameter):
                value.normal_(0, (value.numel() / value.shape[0]) ** -0.5, generator=random)
    return module
