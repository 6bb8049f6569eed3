"""Find the first operator of an artifact that computes something else than its simulation.

Converters rename, fuse, split and re-lay tensors, so operators are matched by what they compute: a value of the
simulation counts as *found* when some tensor of the file equals it, as it is or with its channels moved last. An
operator is sound when its value is found, or that of an operator that depends on it. The culprit is the first that is
not; where the file computes several operators in one, values that survive the fusion tell which of them it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Arrays, Graph, Step
from edgepack.parity import max_relative
from edgepack.samples import Array

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

TOLERANCE = 1e-5  # of the largest value: correct float engines stay a decade below
MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze",
    "expand", "contiguous", "clone", "numpy_T", "moveaxis", "to", "_to_copy", "alias", "detach", "lift_fresh_copy",
}  # fmt: skip
PIECEWISE = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu", "prelu"}
LEAST_SHARE = 0.02  # of a value's elements that must have passed an activation unchanged to identify what fed it
LEAST_POINTS = 8  # of a channel, to tell a line from anything else


@dataclass(frozen=True)
class Divergence:
    """Where an artifact leaves its simulation.

    Attributes:
        node: the operator's name in the simulation; None when every operator agrees on its own.
        operator: its type, such as ``conv2d``.
        layer: the layer whose weights it uses, or after which it stands.
        step: the operator of the file that computes it, in the format's words.
        inside: whether the operator reads weights of ``layer`` itself.
        error: max|a−b| / max|b| of its value, None where the file has no tensor of that shape.
    """

    node: str | None
    operator: str = ""
    layer: str = ""
    step: str = ""
    inside: bool = True
    error: float | None = None

    def __str__(self) -> str:
        if self.node is None:
            return "every operator agrees when it is computed alone: the engine's rewriting of the graph changes it"
        place = "" if not self.layer else f" of {self.layer!r}" if self.inside else f" after {self.layer!r}"
        file = f", in the file {self.step}" if self.step else ""
        amount = "" if self.error is None else f", by {self.error:.2g} of its largest value"
        return f"first operator that diverges: {self.operator}{place} ({self.node}{file}){amount}"


def first_divergence(simulation: Graph, inputs: Arrays, steps: Sequence[Step]) -> Divergence:
    """Compare what an engine computed, operator by operator, with the simulation on the same batch.

    Args:
        simulation: what the artifact must compute.
        inputs: one batch, as the artifact takes it.
        steps: the artifact's operators with their results on that batch.
    """
    return _Search(_nodes(simulation, inputs), _File(steps)).run()


def describe(node: Node, step: str, error: float | None) -> Divergence:
    """The divergence of one operator; one that only rounds, moves or cuts stands for what feeds it."""
    source = node
    while not _layer(source) and source.all_input_nodes and _word(source) in (*MOVES, *PIECEWISE):
        source = source.all_input_nodes[0]
    return Divergence(source.name, _word(source), _layer(source), step, bool(_layer(source)), error)


@dataclass(eq=False)
class _Value:
    """An operator of the simulation and what it computes."""

    name: str
    operator: str
    layer: str
    inside: bool
    array: Array
    sources: tuple[_Value, ...]
    found: bool = False
    sound: bool = False

    @property
    def moves(self) -> bool:
        return self.operator in MOVES


class _File:
    """The tensors of an artifact, indexed by what does not depend on the order of axes."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.tensors = [(index, array) for index, step in enumerate(steps) for array in step.outputs.values()]
        self.matched: set[int] = set()  # tensors that equal a value of the simulation
        self._by_size: dict[int, list[int]] = {}
        for place, (_, array) in enumerate(self.tensors):
            self._by_size.setdefault(array.size, []).append(place)
        self._moments = [_moments(array) for _, array in self.tensors]

    def alike(self, array: Array) -> Iterator[int]:
        """Tensors with the same number of elements, sum and mean magnitude: candidates for equality."""
        total, magnitude = _moments(array)
        for place in self._by_size.get(array.size, ()):
            other_total, other_magnitude = self._moments[place]
            slack = 4 * TOLERANCE * array.size * float(np.abs(array).max(initial=0.0)) + 1e-30
            if abs(total - other_total) <= slack and abs(magnitude - other_magnitude) <= slack:
                yield place

    def same_size(self, array: Array) -> Iterator[int]:
        return iter(self._by_size.get(array.size, ()))

    def array(self, place: int) -> Array:
        return self.tensors[place][1]

    def find(self, array: Array) -> list[int]:
        return [place for place in self.alike(array) if any(equal(view, array) for view in views(self.array(place)))]

    @cached_property
    def bad_steps(self) -> list[int]:
        """Steps whose results match nothing, and nothing that depends on them does."""
        makers = {name: index for index, step in enumerate(self.steps) for name in step.outputs}
        good = {self.tensors[place][0] for place in self.matched}
        for index in range(len(self.steps) - 1, -1, -1):
            if index in good:
                good |= {makers[name] for name in self.steps[index].inputs if name in makers}
        return [index for index in range(len(self.steps)) if index not in good]


class _Search:
    def __init__(self, values: Sequence[_Value], file: _File) -> None:
        self.values = values
        self.file = file
        self.users: dict[int, list[_Value]] = {}
        for value in values:
            for source in value.sources:
                self.users.setdefault(id(source), []).append(value)

    def run(self) -> Divergence:
        self._mark()
        bad = [value for value in self.values if not value.sound]
        if not bad:
            return Divergence(None)
        culprit = self._past_fusions(self._past_moves(bad[0]))
        step, error = self._step(culprit), self._error(culprit)
        return Divergence(culprit.name, culprit.operator, culprit.layer, step, culprit.inside, error)

    def _mark(self) -> None:
        for value in self.values:
            places = self.file.find(value.array)
            value.found = bool(places)
            self.file.matched.update(places)
        for value in reversed(self.values):
            value.sound = value.sound or value.found
            if value.sound:
                for source in value.sources:
                    source.sound = True

    def _past_moves(self, value: _Value) -> _Value:
        """A reshape the file does without is not at fault, unless the file holds its elements in another order."""
        while value.moves and not self._scrambled(value):
            following = self._following(value)
            if following is None:
                return value
            value = following
        return value

    def _scrambled(self, value: _Value) -> bool:
        ordered = np.sort(value.array, axis=None)
        shape = _squeezed(value.array).shape
        return any(
            place not in self.file.matched
            and _squeezed(self.file.array(place)).shape == shape
            and equal(np.sort(self.file.array(place), axis=None), ordered)
            for place in self.file.alike(value.array)
        )

    def _past_fusions(self, value: _Value) -> _Value:
        """The file may compute an operator and what follows in one; then the first is sound if its values show.

        Behind an activation the values it lets pass show what fed it; a layer whose batch normalization is wrong
        still shows up to a scale and a shift per channel.
        """
        following = self._following(value)
        norm = following if following is not None and following.operator == "batch_norm" else None
        last = self._following(norm) if norm is not None else following
        activation = last if last is not None and last.operator in PIECEWISE else None
        fed = norm or value
        passed = np.ones(fed.array.shape, bool) if activation is None else fed.array == activation.array
        passed &= fed.array != 0
        if passed.mean() < LEAST_SHARE:
            return value
        shown = list(self._unmatched(fed.array))
        scale = float(np.abs(fed.array).max())
        if activation is not None and any(equal(view[passed], fed.array[passed], scale) for view in shown):
            return activation
        if norm is not None and any(_affine(view, value.array, activation) for view in shown):
            return norm
        return value

    def _unmatched(self, array: Array) -> Iterator[Array]:
        """Tensors of the file with this shape that match nothing."""
        for place in self.file.same_size(array):
            if place not in self.file.matched:
                yield from (view for view in views(self.file.array(place)) if view.shape == array.shape)

    def _following(self, value: _Value) -> _Value | None:
        users = self.users.get(id(value), [])
        return users[0] if len(users) == 1 and not users[0].sound else None

    def _error(self, culprit: _Value) -> float | None:
        wanted = _squeezed(culprit.array)
        candidates = (
            max_relative(_squeezed(view), wanted)
            for place in self.file.same_size(culprit.array)
            if place not in self.file.matched
            for view in views(self.file.array(place))
            if _squeezed(view).shape == wanted.shape
        )
        return min((value for value in candidates if np.isfinite(value)), default=None)

    def _step(self, culprit: _Value) -> str:
        bad = self.file.bad_steps
        if not bad:
            return ""
        shape = _squeezed(culprit.array).size
        same = [index for index in bad if any(array.size == shape for array in self.file.steps[index].outputs.values())]
        index = (same or bad)[0]
        step = self.file.steps[index]
        return f"{step.operator} #{index}" + (f" {step.name!r}" if step.name else "")


def views(array: Array) -> Iterator[Array]:
    """The tensor as it is, and with channels moved between axis 1 and the last."""
    yield array
    if array.ndim > 2:
        yield np.moveaxis(array, -1, 1)
        yield np.moveaxis(array, 1, -1)


def equal(found: Array, wanted: Array, scale: float | None = None) -> bool:
    """Equal shapes but for axes of one, and values within the tolerance of the largest (or of ``scale``)."""
    found, wanted = _squeezed(found), _squeezed(wanted)
    if found.shape != wanted.shape:
        return False
    if wanted.dtype.kind not in "fc":
        return bool((found.astype(wanted.dtype) == wanted).all())
    scale = float(np.abs(wanted).max(initial=0.0)) if scale is None else scale
    with np.errstate(invalid="ignore"):
        return bool((np.abs(found.astype(np.float64) - wanted) <= TOLERANCE * scale).all())


def _squeezed(array: Array) -> Array:
    return array.reshape([size for size in array.shape if size != 1])


def _moments(array: Array) -> tuple[float, float]:
    wide = array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return float(wide.sum()), float(np.abs(wide).sum())


def _affine(found: Array, value: Array, activation: _Value | None) -> bool:
    """``found`` is scale · value + shift per channel (axis 1), wherever the activation behind it cut nothing off."""
    low, high = (-np.inf, np.inf) if activation is None else (activation.array.min(), activation.array.max())
    scale = float(np.abs(found).max(initial=0.0))
    explained = 0
    for y, x in zip(np.moveaxis(found, 1, 0), np.moveaxis(value, 1, 0), strict=True):
        inside = (y > low) & (y < high)
        if inside.sum() < LEAST_POINTS:
            continue
        points = np.stack([x[inside], np.ones(int(inside.sum()))], axis=1).astype(np.float64)
        line, *_ = np.linalg.lstsq(points, y[inside].astype(np.float64))
        if not equal(points @ line, y[inside].astype(np.float64), scale):
            return False
        explained += 1
    return explained > 0


def _nodes(simulation: Graph, inputs: Arrays) -> list[_Value]:
    """Every operator of the simulation that depends on the inputs, with its value, in order."""
    import torch

    module = simulation.program.module(check_guards=False)
    results = _results(module, [torch.from_numpy(inputs[spec.name]) for spec in simulation.inputs])
    values: dict[Node, tuple[_Value, ...]] = {}
    ordered = []
    for node in module.graph.nodes:
        near = tuple(value for source in node.all_input_nodes for value in values.get(source, ()))
        fed = any(source in values for source in node.all_input_nodes)
        if node.op == "placeholder":
            values[node] = ()
        elif node.op == "call_function" and fed:
            result = results.get(node)
            if not isinstance(result, torch.Tensor):
                values[node] = near  # a tuple, or a size: what reads it depends on what it reads
                continue
            layer = _layer(node)
            value = _Value(
                node.name, _word(node), layer or (near[0].layer if near else ""), bool(layer), result.numpy(), near
            )
            values[node] = (value,)
            ordered.append(value)
    return ordered


def _results(module: GraphModule, inputs: Sequence[torch.Tensor]) -> dict[Node, Any]:
    import torch

    kept: dict[Node, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            kept[n] = result.clone() if isinstance(result, torch.Tensor) else result
            return result

    with torch.no_grad():
        Recorder(module).run(*inputs)
    return kept


def _word(node: Node) -> str:
    """``aten.conv2d.default`` → ``conv2d``; ``getitem`` stands for what it picks from."""
    name = getattr(node.target, "__name__", "")
    if name == "getitem":
        return _word(node.all_input_nodes[0])
    return str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")


def _layer(node: Node) -> str:
    """The layer whose weight a node reads, as it is or as integers."""
    sources = [
        source.all_input_nodes[0] if "dequantize_per_channel" in str(source.target) else source
        for source in node.all_input_nodes
    ]
    names = [str(source.target) for source in sources if source.op == "get_attr"]
    return names[0].rpartition(".")[0] or names[0] if names else ""
