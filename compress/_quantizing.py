"""The steps of quantization after training, in order: fold, equalize, calibrate, round, correct, plan."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from edgepack.compress._activations import (
    BITS,
    Range,
    as_it_is,
    fake,
    fake_found,
    few_bits,
    grid,
    last_layers,
    origin,
)
from edgepack.compress._codebook import sharing, tabled_words
from edgepack.compress._correct import Correction, channel_means, sample
from edgepack.compress._emulation import Emulation, Variant
from edgepack.compress._graph import argument, named, operator_of, owner_path, shape
from edgepack.compress._grid import limits, multipliers, top, weight_scale
from edgepack.compress._groups import grouped_words, scale_of
from edgepack.compress._masks import nonzero, renew_masks, sparse_layers
from edgepack.compress._mixing import mixing, sentence
from edgepack.compress._observe import batch_size, batches, observe_ends, observe_histograms
from edgepack.compress._operators import WEIGHTED, aten, floating, only_reader, passes, slope, word
from edgepack.compress._preparing import Preparing, parameters
from edgepack.compress._ranges import METHODS, Histogram
from edgepack.compress._rounding import Rounding
from edgepack.compress._saturation import Saturation, narrow_words
from edgepack.compress._sensitivity import Sensitivity, remember, sentences
from edgepack.errors import InputError, Unsupported, counted
from edgepack.graph import capture

if TYPE_CHECKING:
    from edgepack.compress.quantize import Quantize
    from edgepack.contracts import Graph, Run
    from edgepack.task import Task

OTHERS = ("minmax", "percentile")  # read from a histogram in no time
INPUT = "input:"  # before the names of inputs in the plan
BIAS_STEPS = 2.0**26  # a bias is at most this many steps of its 32-bit grid
RANGED = ("static", "auto")  # forms for which layers are corrected as ranges fixed now have it


@dataclass(eq=False)
class Quantizing:
    """One run of the pass."""

    options: Quantize
    task: Task
    run_: Run
    left: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Histogram] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    weights: dict[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)  # and their least scales
    few: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)  # what of weights with a mask is not 0
    tables: dict[int, Tensor] = field(default_factory=dict)  # id of a weight → values it is looked up in

    def run(self, module: nn.Module) -> nn.Module:
        sparse = sparse_layers(self.run_.plan, module, self.task)
        module = Preparing(self.task, self.run_, self.options.equalize).prepare(module)
        graph = capture(module, self.task)
        self.few = self._few(graph)
        ranges = self._calibrate(graph)
        inputs = sample(graph, self.task)
        means = channel_means(graph, inputs, _axes(graph))
        scales, weights = self._scales(module, graph, ranges)
        self.kept = nonzero(module, graph, sparse)
        if self.options.limits:
            self._mix(module, graph, inputs, scales)
        wanted = self.options.explain or self.options.target is not None
        before = remember(graph, parameters(module, graph), scales) if wanted else {}
        biases = _biases(graph, parameters(module, graph), scales) if self.options.bias_correct else {}
        correct = functools.partial(self._correct, graph, ranges, inputs, means, biases, scales, weights)
        largest = correct()
        while self.options.target is not None and self._saturating(graph, before, ranges, scales):
            for name, (weight, bias) in before.items():
                if name in weights:
                    weights[name].copy_(weight)
                if name in biases and bias is not None:
                    biases[name][0].copy_(bias)
            largest = correct()
        for text in self.rounding.notes:
            self.run_.note(text)
        if biases:
            samples = counted(len(inputs[0]), "sample")
            self.run_.note(
                f"corrected biases of {counted(len(biases), 'layer')} on {samples}, by {largest:.2g} at most"
            )
        if self.options.target is not None:
            self._name_narrow(graph, len(scales))
        if self.options.explain:
            self._explain(graph, before, ranges)
        if self.options.method == "qat":
            self._learn(module, graph, ranges, scales)
        self._plan(capture(module, self.task), ranges, scales)
        return module

    def _mix(self, module: nn.Module, graph: Graph, inputs: list[Tensor], scales: dict[str, Tensor]) -> None:
        """Choose the bits of every weight to be rounded, and give it the scale of that many."""
        found = mixing(self.options, graph, self.weights, module, self.run_.original)
        self.bits, finding = found.choose(self.task, inputs, self.run_.progress)
        for layer in found.layers:
            scale = weight_scale(layer.weight, layer.floor, top(self.bits[layer.nodes[0]]))
            scales.update(dict.fromkeys(layer.nodes, scale))
        self.run_.record("mixed", finding)
        self.run_.note(sentence(finding))

    def _correct(
        self, graph: Graph, ranges: Mapping[str, Range], inputs: list[Tensor], means: Mapping[str, Tensor],
        biases: Mapping[str, tuple[Tensor, int]], scales: Mapping[str, Tensor], weights: Mapping[str, Tensor],
    ) -> float:  # fmt: skip
        """Round every layer, and correct its bias, in the order of computation; largest change of a bias."""
        correction = Correction(
            graph.program.module(check_guards=False), means, biases, self._activations(ranges, graph),
            functools.partial(self._round, scales=scales, weights=dict(weights)),
        )  # fmt: skip
        with torch.no_grad():
            correction.run(inputs, batch_size(graph))
        return correction.largest

    def _saturating(
        self, graph: Graph, before: Mapping[str, Any], ranges: Mapping[str, Range], scales: dict[str, Tensor]
    ) -> bool:
        """Look for more layers whose products saturate, and give them steps twice as large; whether there are any."""
        names = _inputs(graph)

        def steps(node: fx.Node) -> tuple[float, int] | None:
            pair = ranges.get(names.get(node.name, node.name))
            return None if pair is None else grid(*pair)[:2]

        emulation = Emulation(graph.program.module(check_guards=False), before, fake(ranges, names, self.few))
        found = Saturation({name: scale for name, scale in scales.items() if self.bits[name] == BITS}, steps)
        step = self._progress("looking for products that saturate")
        with torch.no_grad():
            for inputs in batches(graph, self.task):
                emulation.watch(inputs, found.show, Variant())
                step(len(inputs[0]))
        shared = {id(scales[name]): 2 * scales[name] for name in found.found}
        for name in [name for name, scale in scales.items() if id(scale) in shared]:
            scales[name] = shared[id(scales[name])]
            self.bits[name] = BITS - 1
        return bool(found.found)

    def _name_narrow(self, graph: Graph, rounded: int) -> None:
        nodes = [node for node in graph.program.graph.nodes if self.bits.get(node.name) == BITS - 1]
        paths = [owner_path(node) or node.name for node in nodes]
        self.run_.note(narrow_words(paths, rounded))
        self.run_.record("saturation", {"target": self.options.target, "layers": paths})

    def _explain(self, graph: Graph, before: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
        names, static = _inputs(graph), self.options.form in RANGED
        tried = [name for name in OTHERS if static and self.seen and name != self.options.calibrate]
        others = {f"calibrate = {name!r}": fake(self._ranges(graph, name), names, self.few) for name in tried}
        found = Sensitivity(
            graph, before, self._activations(ranges, graph), ranges if static else {}, names, others,
            frozenset(self.left), self.options.leave,
        )  # fmt: skip
        finding = found.explain(self.task, self.run_.progress)
        self.run_.record("sensitivity", finding)
        for text in sentences(finding):
            self.run_.note(text)

    def _calibrate(self, graph: Graph) -> dict[str, Range]:
        """Range of every float result and input."""
        nodes = {node.name: node for node in graph.program.module(check_guards=False).graph.nodes}
        ranged = [name for name, node in nodes.items() if _ranged(node) or _input(node)]
        ends = observe_ends(graph, self.task, ranged, self._progress("calibrating"))
        for name, (low, high) in ends.items():
            if not (abs(low) < 1e30 and abs(high) < 1e30):  # NaN fails too
                raise InputError(f"quantize: {name} is not finite on the calibration data")
        if self.options.calibrate == "minmax" or self._wide:  # with 65,536 steps, none is too coarse
            seen = {name: Histogram(*pair, torch.zeros(1).numpy()) for name, pair in ends.items()}
            return self._ranges(graph, "minmax", seen)
        self.seen = observe_histograms(graph, self.task, ends, self._progress("calibrating: histograms"))
        return self._ranges(graph, self.options.calibrate)

    def _ranges(self, graph: Graph, method: str, seen: Mapping[str, Histogram] | None = None) -> dict[str, Range]:
        """Ranges as one method reads them, by their names in the plan."""
        nodes = {node.name: node for node in graph.program.module(check_guards=False).graph.nodes}
        found = {
            name: METHODS[method](histogram, slope(only_reader(nodes[name])), 1 << self.few.get(name, BITS))
            for name, histogram in (self.seen if seen is None else seen).items()
        }
        for name, node in nodes.items():
            if floating(node) and name not in found and (source := origin(node)).name in found:
                found[name] = found[source.name]
        names = _inputs(graph)
        return {names.get(name, name): pair for name, pair in found.items()}

    def _round(
        self, node: fx.Node, reads: Sequence[Tensor], scales: Mapping[str, Tensor], weights: dict[str, Tensor]
    ) -> None:
        """Put one layer's weight on its grid, in place, unless another use of it was there before."""
        weight = weights.pop(node.name, None)
        if weight is None:
            return
        if self.options.codebook is not None and self.bits[node.name] < BITS:
            found, self.tables[id(self.weights[node.name][0])] = self.rounding.look_up(
                node, reads, weight, self.options.codebook
            )
            weight.copy_(found if node.name not in self.kept else found * self.kept[node.name])
            return
        most = limits(top(self.bits[node.name]), self.kept.get(node.name))
        weight.copy_(self.rounding.round(node, reads, weight, scales[node.name], most))

    @property
    def _wide(self) -> bool:
        """Whether activations have more than 8 bits: they are fixed point then."""
        return (self.options.activation_bits or BITS) > BITS

    @functools.cached_property
    def rounding(self) -> Rounding:
        layers = len({id(weight) for weight, _ in self.weights.values()})
        return Rounding(self.options.rounding, self.options.rounding_seconds, layers, self.run_.progress)

    def _scales(
        self, module: nn.Module, graph: Graph, ranges: Mapping[str, Range]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Node → scale per output channel; the first node that reads a weight → the weight."""
        tensors = parameters(module, graph)
        scales: dict[str, Tensor] = {}
        done: dict[int, tuple[Tensor, int]] = {}
        weights: dict[str, Tensor] = {}
        names, wanted = _inputs(graph), self._wanted(graph.program.graph)
        for node in graph.program.graph.nodes:
            if operator_of(node) not in WEIGHTED:
                continue
            weight = tensors.get(getattr(argument(node, "weight"), "name", ""))
            reason = self._obstacle(node, weight)
            source = names.get(node.args[0].name, node.args[0].name)
            reason = reason or (None if source in ranges else "its input is no float tensor")
            if reason is not None:
                self.left[node.name] = reason
                continue
            assert weight is not None
            bias = tensors.get(getattr(argument(node, "bias"), "name", ""))
            self.weights[node.name] = weight, _floor(bias, ranges[source], self.few.get(node.args[0].name, BITS))
            if id(weight) not in done:
                bits = wanted[node.name]
                scale = scale_of(node, *self.weights[node.name], bits, self.options.group_size)
                done[id(weight)] = multipliers(scale) if self._wide else scale, bits
                weights[node.name] = weight.data
            scales[node.name], self.bits[node.name] = done[id(weight)]
        if not scales:
            raise Unsupported("quantize: there is no convolution or linear layer to round", "leave the pass out")
        return scales, weights

    def _wanted(self, graph: fx.Graph) -> dict[str, int]:
        """Layer → bits of its weights: 8 in layers that read an input, and in the last ones beside few activations."""
        last = last_layers(graph) if self.options.activation_bits not in (None, BITS) else set()
        layers = [node for node in graph.nodes if operator_of(node) in WEIGHTED]
        firsts = {node for node in layers if _reads_input(node)}
        return {node.name: BITS if node in firsts | last else self.options.stored_bits for node in layers}

    def _few(self, graph: Graph) -> dict[str, int]:
        """Node → bits of its result, where they are not 8."""
        bits = self.options.activation_bits or BITS
        if bits == BITS:
            return {}
        module = graph.program.module(check_guards=False)
        if self._wide:
            return {node.name: bits for node in module.graph.nodes if floating(node) or _input(node)}
        wanted = self._wanted(module.graph)

        def of_weight(node: fx.Node) -> int | None:
            return None if named(owner_path(node), self.options.leave) else wanted[node.name]

        return few_bits(module.graph, bits, of_weight)

    def _obstacle(self, node: fx.Node, weight: Tensor | None) -> str | None:
        if named(owner_path(node), self.options.leave):
            return "'leave' names it"
        if weight is None:
            return "its weight is computed, not a plain parameter"
        if weight.dtype != torch.float32:
            return f"its weight is {weight.dtype}".replace("torch.", "")
        if bool((weight.abs() == 1).all()):
            return "its weights are ±1, of one bit each"
        return None

    def _plan(self, graph: Graph, ranges: Mapping[str, Range], scales: Mapping[str, Tensor]) -> None:
        plan, form, names = self.run_.plan, self.options.form, _inputs(graph)
        module = graph.program.module(check_guards=False)
        for node in module.graph.nodes:
            if not (floating(node) or node.op == "placeholder"):
                continue
            entry: dict[str, Any] = {"operator": word(node) if node.op == "call_function" else "input"}
            name = names.get(node.name, node.name)
            if name in ranges and form != "float":
                low, high = ranges[name]
                entry["range"] = {"low": low, "high": high, "bits": self.few.get(node.name, BITS)}
            if node.name in scales:
                entry["weight"] = self._plan_weight(node.name, scales[node.name])
                if form != "static":
                    entry["activations"] = form
            if node.name in self.left:
                entry["float"] = self.left[node.name]
            plan.nodes[name] = entry
        renew_masks(plan, self.kept)
        if missing := (set(scales) | set(ranges)) - set(plan.nodes):
            raise AssertionError(f"captured again, the network lacks {sorted(missing)}")
        counts = Counter(max(self.bits[name], self.options.widths[-1]) for name in scales)
        said = ", ".join(f"{bits}-bit weights in {counted(count, 'layer')}" for bits, count in sorted(counts.items()))
        said += grouped_words(scales, self.options.group_size) + tabled_words(len(self.tables), self.options.codebook)
        self.run_.note(f"{said}, {len(self.left)} left in float")

    def _plan_weight(self, name: str, scale: Tensor) -> dict[str, Any]:
        """What the plan says of an operator's weight; its scales or tables become tensors of the plan."""
        entry: dict[str, Any] = {"bits": self.bits[name], "axis": 0}
        weight = self.weights[name][0]
        if (table := self.tables.get(id(weight))) is not None:
            self.run_.plan.tensors[f"{name}/weight_table"] = table.numpy()
            assert self.options.codebook is not None
            return {**entry, "codebook": sharing(len(weight), self.options.codebook)}
        self.run_.plan.tensors[f"{name}/weight_scale"] = scale.numpy()
        return {**entry, "group_size": self.options.group_size} if scale.dim() > 1 else entry

    def _learn(self, module: nn.Module, graph: Graph, ranges: dict[str, Range], scales: dict[str, Tensor]) -> None:
        """Train weights and grids together, from what they are now on; all of them are changed in place."""
        from edgepack.compress._learning import Learning

        learning = Learning(graph, _inputs(graph), ranges, scales, self.bits, self.few, self.kept)
        learned = learning.train(parameters(module, graph), self.task, self.run_, self.options.training)
        ranges.update({name: pair for name, pair in self._calibrate(graph).items() if name not in learned})

    def _activations(self, ranges: Mapping[str, Range], graph: Graph) -> Callable[[fx.Node, Tensor], Tensor]:
        """What rounding of activations does to the layers behind it, as far as it is the same for all engines."""
        if self.options.form in RANGED:
            return fake(ranges, _inputs(graph), self.few)
        return fake_found if self.options.form == "dynamic" else as_it_is

    def _progress(self, text: str) -> Any:
        assert self.task.calibration is not None
        return self.run_.progress(text, len(self.task.calibration))


def _inputs(graph: Graph) -> dict[str, str]:
    """Placeholder → its name in the plan, ``input:NAME``; torch has other words for some placeholders."""
    module = graph.program.module(check_guards=False)
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    plan = [f"{INPUT}{spec.name}" for spec in graph.inputs]
    return dict(zip((*placeholders, *graph.program.graph_signature.user_inputs), plan * 2, strict=True))


def _input(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == torch.float32


def _reads_input(node: fx.Node) -> bool:
    """Whether a layer reads an input of the network."""
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder"


def _ranged(node: fx.Node) -> bool:
    return floating(node) and not passes(node)


def _axes(graph: Graph) -> dict[str, int]:
    """Convolution or linear layer → axis of channels in its result."""
    return {
        node.name: len(shape(node)) - 1 if operator_of(node) is aten.linear else 1
        for node in graph.program.graph.nodes
        if operator_of(node) in WEIGHTED
    }


def _biases(graph: Graph, tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Node → bias and axis of channels, for rounded layers whose bias nothing else reads."""
    found = {}
    axes = _axes(graph)
    for node in graph.program.graph.nodes:
        source = argument(node, "bias") if node.name in scales else None
        if isinstance(source, fx.Node) and source.name in tensors and len(source.users) == 1:
            found[node.name] = tensors[source.name].data, axes[node.name]
    return found


def _floor(bias: Tensor | None, around: Range, bits: int) -> Tensor | float:
    """The least scale of a weight for which the bias fits a 32-bit grid of scale × step of the input."""
    return 0.0 if bias is None else bias.detach().abs() / (grid(*around, bits)[0] * BIAS_STEPS)
