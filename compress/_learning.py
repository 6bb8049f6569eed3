"""Quantization-aware training: a captured network with brevitas' quantizers in it, trained, and read again.

::

    conv(x, w) → relu      becomes      conv(x, rounded(w)) → relu → rounded

Training starts from the grids and weights that quantization after training found. Weights are rounded as they will be
stored: batch norms are folded before the network is captured. Rounding passes gradients on inside its range (the
straight-through estimate) and gives each step the gradient of the rounding error it makes, after S. Esser et al.,
"Learned step size quantization" (arXiv:1902.08153).

One learning rate has to suit everything. A folded weight has taken up the scale of its batch norm, which differs by
orders of magnitude between channels; so weights are trained in units of the range of their channel, biases in units of
the range of the layer's result, and steps as logarithms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from edgepack.compress._activations import BITS, Range, grid, origin, rounded
from edgepack.compress._graph import argument
from edgepack.compress._grid import top
from edgepack.compress._tune import Hold, Tune, tune
from edgepack.compress._tune_hold import masked
from edgepack.errors import require

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgepack.contracts import Graph, Run
    from edgepack.task import Task

PARTS = ("bit_width", "function_wrapper", "quant", "restrict_val", "scaling", "zero_point")  # of brevitas.core
PLACE = "learned_rounding"  # of the quantizers in the trained module


class Unit(nn.Module):
    """What a parameter is trained in: it is the parameter of the network over ``unit``."""

    unit: Tensor

    def __init__(self, unit: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", unit)

    def forward(self, value: Tensor) -> Tensor:
        return value * self.unit


class Rounding(nn.Module):
    """One quantizer of brevitas, with a learned step.

    Attributes:
        quantizer: value → value on the grid, step, zero point, bits.
    """

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = self.quantizer(value)[0]
        return found

    def grid(self) -> tuple[Tensor, int]:
        """The learned step (or steps, one per output channel) and zero point."""
        with torch.no_grad():
            _, step, zero, _ = self.quantizer(torch.zeros(1))
        return step.detach(), round(float(zero))


def weight_rounding(scale: Tensor, axes: int, bits: int) -> Rounding:
    """Symmetric integers, one step per output channel (axis 0) of a weight of so many axes."""
    return Rounding(_quantizer(_rows(scale, axes), bits, weight=True))


def activation_rounding(around: Range, bits: int) -> Rounding:
    """Integers from 0, one step; where something is negative, the lower end stays and the upper one is learned."""
    step, zero, _, _ = grid(*around, bits)
    return Rounding(_quantizer(torch.tensor(step), bits, weight=False, offset=zero * step))


def _rows(scale: Tensor, axes: int) -> Tensor:
    """One value per output channel, in a form that multiplies a weight."""
    return scale.detach().float().view(-1, *[1] * (axes - 1))


def _quantizer(step: Tensor, bits: int, weight: bool, offset: float = 0.0) -> nn.Module:
    core: Any = {name: require(f"brevitas.core.{name}", "qat") for name in PARTS}
    integers = core["quant"].IntQuant(
        narrow_range=weight, signed=weight, input_view_impl=core["function_wrapper"].Identity()
    )
    largest = (1 << (bits - weight)) - 1
    scaling = core["scaling"].ParameterScaling(
        step * largest, tuple(step.shape) or None, core["restrict_val"].LogFloatRestrictValue()
    )
    zero = core["zero_point"].ZeroZeroPoint()
    if offset:
        zero = core["zero_point"].ParameterZeroPoint(offset, integers, quantize_zero_point=True)
        zero.requires_grad_(False)
    ends = core["scaling"].IntScaling(signed=weight, narrow_range=weight)
    made: nn.Module = core["quant"].RescalingIntQuant(
        integers, scaling, ends, zero, core["bit_width"].BitWidthConst(bits)
    )
    return made


@dataclass(frozen=True)
class Learning:
    """What is trained: a captured network on grids.

    Attributes:
        names: node → its name in the plan, where they differ.
        ranges: of activations, by name in the plan; the learned ones afterwards.
        scales: of weights, by node; the learned ones afterwards.
        bits: of weights, by node.
        few: bits of activations, by node, where they are not 8.
        kept: what of a weight is not 0 and may change, by node, where the rest stays 0.
    """

    graph: Graph
    names: Mapping[str, str]
    ranges: MutableMapping[str, Range]
    scales: MutableMapping[str, Tensor]
    bits: Mapping[str, int]
    few: Mapping[str, int]
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def train(self, tensors: Mapping[str, Tensor], task: Task, run: Run, settings: Tune) -> set[str]:
        """Train, and put what was learned into ``ranges``, ``scales`` and ``tensors``; which ranges were learned.

        Args:
            tensors: placeholder of the captured program → the network's own parameter.
        """
        module = self.build()
        tune(module, task, run, settings, Hold(project=list(self._projections(module))))
        return self.read(module, tensors)

    def _projections(self, module: fx.GraphModule) -> Iterator[Callable[[], None]]:
        """What keeps zeros of masked weights."""
        for node in self._module().graph.nodes:
            if node.name in self.kept:
                yield masked(module.get_parameter(str(node.args[1].target)), self.kept[node.name])

    def build(self) -> fx.GraphModule:
        """The captured network with parameters of its own and quantizers, to be trained."""
        module = copy.deepcopy(self._module())
        module.requires_grad_(True)
        setattr(module, PLACE, nn.ModuleDict())
        nodes = list(module.graph.nodes)
        learned = {node for node in nodes if self._learns(node)}
        readers = {node.args[1]: node for node in nodes if node.name in self.scales}
        biases = {argument(node, "bias"): node for node in readers.values()}
        firsts = _firsts(module)
        for node in nodes:
            if node in learned:
                around, bits = self.ranges[self._name(node)], self.few.get(node.name, BITS)
                _insert(module, node, f"{node.name}/value", activation_rounding(around, bits))
            elif node in readers:
                self._insert_weight(module, node, readers[node], firsts[str(node.target)])
            elif node in biases and str(node.target) in firsts:
                low, high = self.ranges.get(self._name(biases[node]), (0.0, 1.0))
                _insert_unit(module, node, firsts[str(node.target)], torch.tensor(high - low or 1.0))
        module.recompile()
        return module.eval()

    def _insert_weight(self, module: fx.GraphModule, node: fx.Node, reader: fx.Node, name: str) -> None:
        scale, bits = self.scales[reader.name], self.bits[reader.name]
        axes = module.get_parameter(name).dim()
        _insert(module, node, f"{_key(name)}/value", weight_rounding(scale, axes, bits))
        _insert_unit(module, node, name, _rows(scale, axes) * top(bits))  # before the rounding

    def read(self, module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> set[str]:
        """Weights on their learned grids, biases, scales and ranges of a trained module; names of the ranges."""
        nodes = list(self._module().graph.nodes)
        made = {node: self._range(module, node) for node in nodes if self._learns(node)}
        learned = {self._name(node): made[origin(node)] for node in nodes if origin(node) in made}
        self.ranges.update({name: pair for name, pair in learned.items() if name in self.ranges})
        self._read_weights(module, nodes, tensors)
        return set(learned)

    def _read_weights(self, module: fx.GraphModule, nodes: Sequence[fx.Node], tensors: Mapping[str, Tensor]) -> None:
        made, firsts = getattr(module, PLACE), _firsts(module)
        with torch.no_grad():
            for placeholder, name in self.graph.program.graph_signature.inputs_to_parameters.items():
                value, key = module.get_parameter(name), _key(firsts[name])
                for step in (f"{key}/unit", f"{key}/value"):
                    value = made[step](value) if step in made else value
                tensors[placeholder].copy_(value)
        for node in nodes:
            if node.name in self.scales:
                source: Any = node.args[1]
                rounding = made[f"{_key(firsts[str(source.target)])}/value"]
                self.scales[node.name] = rounding.grid()[0].flatten()

    def _module(self) -> fx.GraphModule:
        module = self.graph.program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        return module

    def _name(self, node: fx.Node) -> str:
        return self.names.get(node.name, node.name)

    def _learns(self, node: fx.Node) -> bool:
        """Whether a value is rounded where it is made; what only rearranges it keeps its grid."""
        return self._name(node) in self.ranges and origin(node) is node and rounded(node)

    def _range(self, module: fx.GraphModule, node: fx.Node) -> Range:
        step, zero = getattr(module, PLACE)[f"{node.name}/value"].grid()
        largest = (1 << self.few.get(node.name, BITS)) - 1
        return -zero * float(step), (largest - zero) * float(step)


def _insert(module: fx.GraphModule, node: fx.Node, key: str, made: nn.Module) -> None:
    """Pass a value through a module for all that read it; through the one of that key where there is one."""
    place = getattr(module, PLACE)
    if key not in place:
        place[key] = made
    with module.graph.inserting_after(node):
        inserted = module.graph.call_module(f"{PLACE}.{key}", (node,))
    node.replace_all_uses_with(inserted, lambda user: user is not inserted)


def _insert_unit(module: fx.GraphModule, node: fx.Node, name: str, unit: Tensor) -> None:
    """Train a parameter in a unit of its own."""
    key = f"{_key(name)}/unit"
    if key not in getattr(module, PLACE):
        with torch.no_grad():
            module.get_parameter(name).div_(unit)
    _insert(module, node, key, Unit(unit))


def _firsts(module: nn.Module) -> dict[str, str]:
    """Name of a parameter → the first of the names that it has."""
    found: dict[int, str] = {}
    return {name: found.setdefault(id(value), name) for name, value in module.named_parameters(remove_duplicate=False)}


def _key(name: str) -> str:
    """Of a parameter."""
    return name.replace(".", "/")
