"""What is done to a float network before anything is rounded; it computes the same afterwards."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepack.compress._equalize import equalize, pairs
from edgepack.compress._gains import merge_gains
from edgepack.compress._graph import GraphView, operator_of, shape
from edgepack.compress._norms import fold_norms
from edgepack.compress._observe import observe_channels
from edgepack.compress._operators import WEIGHTED
from edgepack.compress._smooth import norms, smooth
from edgepack.graph import capture

if TYPE_CHECKING:
    from edgepack.contracts import Graph, Run
    from edgepack.task import Task


@dataclass(frozen=True, eq=False)
class Preparing:
    """Folds batch norms, gives layers biases, merges gains, and brings channels to one size.

    Attributes:
        equalize: whether to do the last.
    """

    task: Task
    run_: Run
    equalize: bool

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module, changed in place or another."""
        module = self._fold(module)
        _give_biases(GraphView.of(module, self.task))
        if gains := merge_gains(GraphView.of(module, self.task)):
            self.run_.note(f"merged {gains} gains of channels into layers")
        if self.equalize:
            self._equalize(module)
            self._smooth(module)
        return module

    def _fold(self, module: nn.Module) -> nn.Module:
        if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
            return module
        module, foldings = fold_norms(GraphView.of(module, self.task), self.task, self.run_)
        folded = sum(len(folding.folded) for folding in foldings)
        self.run_.note(f"folded {folded} batch norms, left {len(foldings[-1].left)}")
        return module

    def _equalize(self, module: nn.Module) -> None:
        view = GraphView.of(module, self.task)
        found = pairs(view)  # layers to be left in float too: they stay the same function
        graph = capture(module, self.task)
        axes = {pair.read.name: pair.axis for pair in found}
        seen = observe_channels(graph, self.task, axes, self._progress("looking at channels")) if found else {}
        changes = [equalize(pair, *seen[pair.read.name]) for pair in found]
        if changes:
            self.run_.note(f"equalized {len(changes)} pairs of layers; largest change of a channel {max(changes):.3g}×")

    def _smooth(self, module: nn.Module) -> None:
        graph = capture(module, self.task)
        found = norms(graph.program.graph, parameters(module, graph))
        axes = {norm.node.name: len(shape(norm.node)) - 1 for norm in found}
        seen = observe_channels(graph, self.task, axes, self._progress("looking at norms")) if found else {}
        changes = [smooth(norm, *seen[norm.node.name]) for norm in found]
        if changes:
            self.run_.note(f"smoothed {len(changes)} layer norms; largest change of a channel {max(changes):.3g}×")

    def _progress(self, text: str) -> Any:
        assert self.task.calibration is not None
        return self.run_.progress(text, len(self.task.calibration))


def parameters(module: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """Placeholder → the module's own parameter."""
    names = graph.program.graph_signature.inputs_to_parameters
    return {key: functools.reduce(getattr, name.split("."), module) for key, name in names.items()}  # type: ignore[misc]


def _give_biases(view: GraphView) -> None:
    """Give layers without a bias one of zeros, to be corrected and to take what engines want there anyway."""
    for call in view.calls:
        layer = call.layer
        if operator_of(call.node) in WEIGHTED and layer.bias is None and call.obstacle is None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            layer.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype), requires_grad=False)
