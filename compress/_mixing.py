"""How many bits each weight gets: what each width does to the network's outputs, and the best of all mixtures.

Every layer is rounded alone, in each width, in the very way the pass rounds; the error that this brings to the
network's outputs is taken as the layer's loss, and losses of different layers are taken to add up. The table holds
what was predicted in this way beside what a network rounded so has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgepack.compress._emulation import Emulation, Parameters, Variant, compute
from edgepack.compress._gptq import round_in_turn, second_moments
from edgepack.compress._graph import argument, operator_of, owner_path, shape
from edgepack.compress._grid import round_to, spread, top, weight_scale
from edgepack.compress._observe import first_batches
from edgepack.compress._operators import WEIGHTED, aten
from edgepack.compress._programme import choose, total
from edgepack.errors import InputError

if TYPE_CHECKING:
    from edgepack.compress.quantize import Quantize
    from edgepack.contracts import Graph
    from edgepack.task import Task

FLOAT_BITS = 32
SCALE_BITS = 32  # of each output channel
BYTE, NIBBLE = 8, 4  # what files have for integers
LEAST, MOST = 16, 64  # samples that losses are measured on
RUNS = 4  # of all calibration samples through the network, that measuring may take
POINTS = 9  # rows of the table
Array = np.ndarray[Any, Any]
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight, and the operators that read it.

    Attributes:
        nodes: in the order of computation.
        path: of the module that the first is in.
        weight: before rounding.
        floor: least scale of the weight.
        macs: multiply-accumulates of all the operators, one sample.
        axis: of channels in the result.
    """

    nodes: tuple[str, ...]
    path: str
    weight: Tensor
    floor: Tensor | float
    macs: int
    axis: int

    def bits(self, width: int) -> int:
        """What the weight and its scales take."""
        return self.weight.numel() * width + len(self.weight) * SCALE_BITS

    def stored_bits(self, width: int) -> int:
        """The same in files, which hold integers in bytes and halves of bytes."""
        return self.bits(BYTE if width > NIBBLE else NIBBLE)


@dataclass(frozen=True)
class Budget:
    """What a mixture may take, as shares of the float network.

    Attributes:
        float_bits: of the original's parameters.
        rest_bits: of the parameters that stay float.
        activation_bits: of what layers read.
        rest_bops: bit operations of layers that stay float.
        limits: ``size_ratio`` or ``bops_ratio`` → the largest share.
    """

    float_bits: int
    rest_bits: int
    activation_bits: int
    rest_bops: int
    limits: Mapping[str, float]

    def costs(self, layers: Sequence[Layer], widths: Sequence[int]) -> dict[str, tuple[Array, int, int]]:
        """Of each limit: cost of layers in each width, cost of the rest, and what all of it costs in float."""
        operations = np.array([[layer.macs * width * self.activation_bits for width in widths] for layer in layers])
        whole = self.rest_bops + sum(layer.macs for layer in layers) * FLOAT_BITS**2
        sizes = np.array([[layer.bits(width) for width in widths] for layer in layers])
        return {"size_ratio": (sizes, self.rest_bits, self.float_bits),
                "bops_ratio": (operations, self.rest_bops, whole)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Trial:
    """A weight in one width: integers, their scales, and what is added to the bias."""

    integers: Tensor
    scale: Tensor
    shift: Tensor | None


@dataclass(eq=False)
class Mixing:
    """What to choose for.

    Attributes:
        graph: captured, on float weights.
        layers: to choose for.
        widths: to choose from, in bits.
        budget: to keep to.
        gptq: whether columns are rounded in turn.
        bias_correct: whether mean errors go into biases.
    """

    graph: Graph
    layers: Sequence[Layer]
    widths: Sequence[int]
    budget: Budget
    gptq: bool
    bias_correct: bool

    def choose(self, task: Task, inputs: list[Tensor], progress: Progress) -> tuple[dict[str, int], dict[str, Any]]:
        """Bits by operator, and the finding as JSON values; deterministic.

        Args:
            inputs: samples on which layers are rounded.

        Raises:
            InputError: the budget is under what the smallest width takes.
        """
        costs = self.budget.costs(self.layers, self.widths)
        self._refuse(costs)
        self.module = self.graph.program.module(check_guards=False)
        self.trials: dict[str, list[_Trial]] = {}
        with torch.no_grad():
            step = progress("mixing: layers in each width", len(self.layers))
            Emulation(self.module, {}, _as_it_is).watch(inputs, lambda *seen: step(self._try(*seen)), Variant())
            loss = self._losses(task, progress)
            chosen = self._solve(loss, costs, self.budget.limits)
            table = self._table(task, loss, costs, progress)
            found = self._row(loss, costs, chosen, self._measured(task, chosen))
        names = [{"layer": layer.path, "bits": self.widths[index], "values": layer.weight.numel(), "macs": layer.macs,
                  "loss": dict(zip(map(str, self.widths), row.tolist(), strict=True))}
                 for layer, index, row in zip(self.layers, chosen, loss, strict=True)]  # fmt: skip
        bits = {node: self.widths[i] for layer, i in zip(self.layers, chosen, strict=True) for node in layer.nodes}
        return bits, {"chosen": found, "table": table, "layers": names, "samples": self._count(task)}

    def _refuse(self, costs: Mapping[str, tuple[Array, int, int]]) -> None:
        for name, share in self.budget.limits.items():
            cost, rest, whole = costs[name]
            least = (int(cost.min(1).sum()) + rest) / whole
            if least > share:
                raise InputError(
                    f"quantize: {name} = {share:g} cannot be reached: with weights of {min(self.widths)} bits "
                    f"everywhere it is {least:.4f}",
                    f"{name} = {np.ceil(least * 1e4) / 1e4:.4f} or more, or fewer bits in weight_bits",
                )

    def _try(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> int:
        """Round a layer about to be computed in every width; how many layers that was."""
        layer = next((layer for layer in self.layers if layer.nodes[0] == node.name), None)
        if layer is None:
            return 0
        source = node.args[0]
        assert isinstance(source, fx.Node)
        moments = second_moments(node, [env[source]], layer.weight) if self.gptq else None
        exact = compute(node, env, layer.weight, None)
        self.trials[node.name] = []
        for width in self.widths:
            scale = weight_scale(layer.weight, layer.floor, top(width))
            value = _rounded(layer.weight, scale, moments, top(width))
            error = (exact - compute(node, env, value, None)).movedim(layer.axis, 0).flatten(1).double().mean(1)
            integers = (value / spread(scale, value)).round().to(torch.int8)
            corrects = self.bias_correct and isinstance(argument(node, "bias"), fx.Node)
            self.trials[node.name].append(_Trial(integers, scale, error.float() if corrects else None))
        return 1

    def _losses(self, task: Task, progress: Progress) -> Array:
        """(layers, widths): squared error of the outputs over their own squares, with this layer alone rounded."""
        samples = self._count(task)
        step = progress("mixing: losses", samples * len(self.widths))
        variants = [Variant(frozenset(layer.nodes)) for layer in self.layers]
        columns = [
            self._compared(task, self._parameters([column] * len(self.layers)), variants, step)
            for column in range(len(self.widths))
        ]
        return np.stack(columns, 1)

    def _measured(self, task: Task, chosen: Sequence[int] | Array) -> float:
        everything = Variant(frozenset(node for layer in self.layers for node in layer.nodes))
        return float(self._compared(task, self._parameters(chosen), [everything], lambda count: None)[0])

    def _compared(
        self, task: Task, other: Mapping[str, Parameters], variants: Sequence[Variant], step: Callable[[int], None]
    ) -> Array:
        """Mean over outputs of squared error over squares, of each variant."""
        emulation = Emulation(self.module, other, _as_it_is)
        signal: Array = np.zeros(1)
        noise: Array = np.zeros(1)
        for inputs in first_batches(self.graph, task, self._count(task)):
            exact, *found = emulation.run(inputs, variants)
            signal = signal + np.array([[float(value.double().square().sum()) for value in exact]])
            noise = noise + np.array(
                [[float((a - b).double().square().sum()) for a, b in zip(one, exact, strict=True)] for one in found]
            )
            step(len(inputs[0]))
        return np.asarray((noise / np.maximum(signal, np.finfo(float).tiny)).mean(1))

    def _parameters(self, chosen: Sequence[int] | Array) -> dict[str, Parameters]:
        found = {}
        for layer, index in zip(self.layers, chosen, strict=True):
            trial = self.trials[layer.nodes[0]][index]
            weight = trial.integers * spread(trial.scale, trial.integers)
            for name in layer.nodes:
                found[name] = weight, self._bias(name, trial)
        return found

    def _bias(self, name: str, trial: _Trial) -> Tensor | None:
        node = next(node for node in self.module.graph.nodes if node.name == name)
        source = argument(node, "bias")
        if trial.shift is None or not isinstance(source, fx.Node) or source.op != "get_attr":
            return None
        owner, _, leaf = str(source.target).rpartition(".")
        bias: Tensor = getattr(self.module.get_submodule(owner), leaf)
        return bias.detach() + trial.shift

    def _solve(self, loss: Array, costs: Mapping[str, tuple[Array, int, int]], limits: Mapping[str, float]) -> Array:
        spent = [costs[name][0] for name in limits]
        allowed = [int(share * costs[name][2] + 1e-6) - costs[name][1] for name, share in limits.items()]
        chosen = choose(loss, spent, allowed)
        assert chosen is not None
        return chosen

    def _table(
        self, task: Task, loss: Array, costs: Mapping[str, tuple[Array, int, int]], progress: Progress
    ) -> list[dict[str, Any]]:
        """The best mixtures from the smallest to the largest, by the first limit."""
        name = next(iter(self.budget.limits))
        cost, rest, whole = costs[name]
        ends = [(int(end.sum()) + rest) / whole for end in (cost.min(1), cost.max(1))]
        step = progress("mixing: the table", POINTS)
        rows: dict[tuple[int, ...], dict[str, Any]] = {}
        for share in np.linspace(ends[0], ends[1], POINTS):
            chosen = self._solve(loss, costs, {name: float(share) * (1 + 1e-12)})
            rows.setdefault(tuple(chosen), self._row(loss, costs, chosen, self._measured(task, chosen)))
            step(1)
        return list(rows.values())

    def _row(
        self, loss: Array, costs: Mapping[str, tuple[Array, int, int]], chosen: Array, measured: float
    ) -> dict[str, Any]:
        shares = {name: (int(total(cost, chosen)) + rest) / whole for name, (cost, rest, whole) in costs.items()}
        stored = sum(layer.stored_bits(self.widths[i]) for layer, i in zip(self.layers, chosen, strict=True))
        counts = {str(width): int((chosen == index).sum()) for index, width in enumerate(self.widths)}
        return {
            **shares, "stored_ratio": (stored + self.budget.rest_bits) / self.budget.float_bits,
            "predicted_db": _decibel(float(total(loss, chosen))), "measured_db": _decibel(measured), "layers": counts,
        }  # fmt: skip

    def _count(self, task: Task) -> int:
        assert task.calibration is not None
        given, runs = len(task.calibration), len(self.layers) * len(self.widths) / 2
        return min(given, max(LEAST, min(MOST, int(RUNS * given / runs))))


def mixing(options: Quantize, graph: Graph, rounded: Mapping[str, tuple[Tensor, Tensor | float]], module: nn.Module,
           original: nn.Module) -> Mixing:  # fmt: skip
    """What the options ask for.

    Args:
        rounded: operator → its weight, and the least scale of it.
        module: with these weights.
        original: what sizes are compared with.
    """
    weighted = [node for node in graph.program.graph.nodes if operator_of(node) in WEIGHTED]
    readers: dict[int, list[fx.Node]] = {}
    for node in weighted:
        if node.name in rounded:
            readers.setdefault(id(rounded[node.name][0]), []).append(node)
    layers = [_layer(nodes, *rounded[nodes[0].name]) for nodes in readers.values()]
    values = sum(layer.weight.numel() for layer in layers)
    budget = Budget(
        FLOAT_BITS * _values(original), FLOAT_BITS * (_values(module) - values),
        FLOAT_BITS if options.form == "float" else options.activation_bits or BYTE,
        sum(_macs(node) for node in weighted if node.name not in rounded) * FLOAT_BITS**2, options.limits,
    )  # fmt: skip
    return Mixing(graph, layers, options.widths, budget, options.rounding != "nearest", options.bias_correct)


def sentence(finding: Mapping[str, Any]) -> str:
    """The finding in a note."""
    row = finding["chosen"]
    counted = ", ".join(f"{bits} bits in {count}" for bits, count in row["layers"].items() if count)
    return (
        f"mixed weights: {counted} layers; {row['size_ratio']:.4f} of the float size in bits, "
        f"{row['stored_ratio']:.4f} where files hold 8 and 4 bits, {row['bops_ratio']:.4f} of its bit operations; "
        f"rounded weights alone leave {row['measured_db']:.1f} dB (predicted {row['predicted_db']:.1f})"
    )


def _layer(nodes: Sequence[fx.Node], weight: Tensor, floor: Tensor | float) -> Layer:
    axis = len(shape(nodes[0])) - 1 if operator_of(nodes[0]) is aten.linear else 1
    return Layer(
        tuple(node.name for node in nodes), owner_path(nodes[0]) or nodes[0].name, weight, floor,
        sum(map(_macs, nodes)), axis,
    )  # fmt: skip


def _macs(node: fx.Node) -> int:
    """Of one sample."""
    sizes = shape(node)
    weight: Any = argument(node, "weight")
    return math.prod(sizes[1:]) * math.prod(shape(weight)[1:])


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rounded(weight: Tensor, scale: Tensor, moments: Tensor | None, largest: int) -> Tensor:
    if moments is None:
        return round_to(weight, scale, largest)
    return round_in_turn(weight, scale, moments, largest)


def _decibel(share: float) -> float | None:
    return -10 * float(np.log10(share)) if share > 0 else None


def _as_it_is(node: fx.Node, value: Tensor) -> Tensor:
    return value
