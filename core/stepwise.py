"""An integer artifact operator by operator, each fed with what the file itself computed before it.

End to end, single values that round the other way grow from layer to layer until the outputs say little about whether
the file is right. Here the simulation is computed with every rounded value replaced by the file's own as soon as it
is known, so that a difference never travels: a correct file is at most one step away, on few values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import FLOAT_LIMIT, Arrays, Graph, Step
from edgepack.divergence import MOVES, Divergence, describe, views
from edgepack.halves import apart, exact_steps
from edgepack.parity import STEP_SHARE, max_relative, sqnr_db
from edgepack.samples import Array

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

ON_GRID = 0.02  # of a step; how far a float tensor of the file may be from the grid it is said to be on
FOUND = "quantized_decomposed.quantize_per_tensor.tensor"  # in a range found at run time
PRODUCT_DB = 60.0  # of a product of rows rounded at run time; values that rounded the other way leave it above 70
WEIGHTED = ("aten.linear", "aten.conv2d")
THINNED = 1 << 16  # elements that show whether a tensor may be the one looked for
LOOKED_AT = 4  # of the nearest by those, whole
WIDE_SHARE = 0.02  # of 16-bit values; a step of theirs is near what float32 sums are exact to
HALVES = (*MOVES, "mul", "sub", "trunc", "add")
RELUS = ("aten.relu", "aten.hardtanh")
QUANTIZE = ("quantized_decomposed.quantize_per_tensor.default", FOUND)


@dataclass
class Stepwise:
    """What the comparison found.

    Attributes:
        compared: rounded values of the simulation that the file holds too.
        absent: those of which the file has no tensor of that size; engines may do without.
        worst_share: the largest share of one value's elements that is a step apart.
        fault: the first operator that is further apart, None for a sound file.
    """

    compared: int = 0
    absent: int = 0
    worst_share: float = 0.0
    fault: Divergence | None = None


def stepwise(simulation: Graph, inputs: Arrays, steps: Sequence[Step]) -> Stepwise:
    """Compare every rounded value, and the outputs.

    Args:
        simulation: what the artifact must compute.
        inputs: one batch, as the artifact takes it.
        steps: the artifact's operators with their results on that batch.
    """
    module = simulation.program.module(check_guards=False)
    comparison = _Comparison(_Tensors.of(steps))
    results = _walk(module, [inputs[spec.name] for spec in simulation.inputs], comparison)
    if comparison.found.fault is None:
        comparison.found.fault = _outputs_fault(module, results, comparison.file)
    return comparison.found


def _walk(module: GraphModule, inputs: Sequence[Array], comparison: _Comparison) -> Any:
    import torch

    class Walk(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if _product(n):
                return comparison.product(n, result)
            if str(n.target) not in QUANTIZE:
                return result
            scale, zero = map(float, self.fetch_args_kwargs_from_env(n)[0][1:3])
            exact = None if str(n.target) == FOUND else exact_steps(n.all_input_nodes[0], self.env, scale)
            return comparison.forced(n, result, _Grid(scale, zero, exact))

    with torch.no_grad():
        return Walk(module, garbage_collect_values=False).run(*map(torch.from_numpy, inputs))


@dataclass(frozen=True)
class _Grid:
    """How a value is rounded: value = scale · (integer − zero); ``exact``: the value in steps where that is known."""

    scale: float
    zero: float
    exact: Array | None = None


def _product(node: Node) -> bool:
    """Whether a value is a product of what is rounded at run time, or the ReLU that engines compute in one with it."""
    if _relu(node):
        return _reads_rounded_rows(node.all_input_nodes[0])
    return _reads_rounded_rows(node) and not any(map(_relu, node.users))


def _relu(node: Node) -> bool:
    return str(node.target).startswith(RELUS)


def _reads_rounded_rows(node: Node) -> bool:
    """Whether an operator reads what is rounded row by row at run time, which engines do inside the product."""
    if not str(node.target).startswith(WEIGHTED):
        return False
    source: Any = node.args[0]
    return any("dequantize_per_token" in str(one.target) for one in (source, *source.all_input_nodes))


@dataclass(frozen=True)
class _Tensors:
    """The file's tensors by size."""

    by_size: dict[int, list[tuple[Step, Array]]] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: Sequence[Step]) -> _Tensors:
        made = cls()
        for step in steps:
            for array in step.outputs.values():
                made.by_size.setdefault(array.size, []).append((step, array))
        return made

    def shaped(self, shape: tuple[int, ...]) -> Iterator[tuple[Step, Array]]:
        """Tensors that can be laid out in this shape, in each layout that does."""
        for step, array in self.by_size.get(int(np.prod(shape)), ()):
            seen = False
            for view in views(array):
                if view.shape == shape:
                    yield step, view
                    seen = True
            if not seen and _squeezed(array.shape) == _squeezed(shape):
                yield step, array.reshape(shape)


@dataclass
class _Comparison:
    file: _Tensors
    found: Stepwise = field(default_factory=Stepwise)

    def forced(self, node: Node, computed: Tensor, grid: _Grid) -> Tensor:
        """The file's integers where it has them; notes a fault where all it has of that size is something else."""
        import torch

        wanted = computed.numpy()
        nearest = None if self.found.fault is not None else self._nearest(wanted, grid)
        if nearest is None:
            self.found.absent += self.found.fault is None
            return computed
        step, whole = nearest
        if str(node.target) == FOUND:
            whole = _same_zero(whole, wanted)
        differences = apart(whole, wanted, grid.exact, grid.zero)
        share = float((differences > 0).mean())
        most = WIDE_SHARE if wanted.dtype == np.int16 else STEP_SHARE
        if differences.max(initial=0) > 1 or (share > most and (differences > 0).sum() > 1):
            error = float(differences.max()) / float(np.abs(wanted.astype(np.int32) - grid.zero).max(initial=1))
            self.found.fault = describe(_rounded(node), _name(step), error)
            return computed
        self.found.compared += 1
        self.found.worst_share = max(self.found.worst_share, share)
        return torch.from_numpy(np.ascontiguousarray(whole))

    def product(self, node: Node, computed: Tensor) -> Tensor:
        """The file's result of a product whose rounding no engine shows; notes a fault where it is another product.

        Converters move factors that follow a product into its weights, those of attention for one: what the file holds
        may be a multiple. Were that multiple wrong, what is computed with it next would be as well.
        """
        import torch

        wanted = computed.numpy()
        views = [(step, _scaled(array, wanted)) for step, array in self.file.shaped(wanted.shape)]
        levels = [(_level(array, wanted), place, step, array) for place, (step, array) in enumerate(views)]
        if self.found.fault is not None or not levels:
            self.found.absent += self.found.fault is None
            return computed
        level, _, step, array = max(levels, key=lambda entry: entry[:2])
        if level < PRODUCT_DB:
            self.found.fault = describe(node, _name(step), max_relative(array, wanted))
            return computed
        self.found.compared += 1
        return torch.from_numpy(np.ascontiguousarray(array))

    def _nearest(self, wanted: Array, grid: _Grid) -> tuple[Step, Array] | None:
        """The tensor of the file whose integers are nearest, None where none of that size is on this grid.

        Some elements of each show which few to look at whole.
        """
        some = _thinned(wanted).astype(np.int32)
        found = []
        for step, array in self.file.shaped(wanted.shape):
            part = _integers(_thinned(array), wanted.dtype, grid.scale, grid.zero)
            if part is not None:
                found.append((_distance(part, some), step, array))
        best: list[tuple[float, Step, Array]] = []
        for _, step, array in sorted(found, key=lambda entry: entry[0]):
            whole = _integers(array, wanted.dtype, grid.scale, grid.zero)
            if whole is not None:
                best.append((_distance(whole, wanted), step, whole))
            if len(best) == LOOKED_AT:
                break
        return min(best, key=lambda entry: entry[0])[1:] if best else None


def _distance(whole: Array, wanted: Array) -> float:
    return float(np.abs(whole.astype(np.int32) - wanted).mean())


def _thinned(array: Array) -> Array:
    """A view of some of the elements, the same ones of all arrays of one shape: all of a small one."""
    steps = [1] * array.ndim
    while math.prod(left := [-(-size // step) for size, step in zip(array.shape, steps, strict=True)]) > THINNED:
        steps[left.index(max(left))] *= 3
    return array[tuple(slice(None, None, step) for step in steps)]


def _rounded(node: Node) -> Node:
    """What a rounding reads; an average whose halves are decided before it (… add, trunc, sub, mul) is read as such."""
    way = [node.all_input_nodes[0]]
    while _word(way[-1]) in HALVES and way[-1].all_input_nodes:
        way.append(way[-1].all_input_nodes[0])
    return way[-1] if any(_word(one) == "trunc" for one in way) else way[0]


def _word(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _scaled(value: Array, wanted: Array) -> Array:
    """The multiple of a tensor that is nearest to another."""
    power = float(np.vdot(value, value)) if value.dtype.kind == "f" else 0.0
    if not power:  # also where the squares of tiny values are nothing
        return value
    factor = float(np.vdot(value, wanted)) / power
    return value if abs(factor - 1) < FLOAT_LIMIT else value * np.float32(factor)


def _level(value: Array, wanted: Array) -> float:
    """SQNR in dB."""
    found = sqnr_db(value, wanted)
    if found is None:
        return math.inf if np.array_equal(value, wanted) else -math.inf
    return found


def _same_zero(whole: Array, wanted: Array) -> Array:
    """Integers around the zero of ``wanted``: one that was found at run time may have been rounded the other way."""
    limits = np.iinfo(whole.dtype)
    moved = [np.clip(whole.astype(np.int32) + by, limits.min, limits.max) for by in (0, -1, 1)]
    nearest: Array = min(moved, key=lambda values: float(np.abs(values - wanted).mean()))
    return nearest.astype(whole.dtype)


def _integers(array: Array, kind: np.dtype[Any], scale: float, zero: float) -> Array | None:
    """A tensor of the file as the integers it stands for; None where it is on another grid."""
    if array.dtype == kind:
        return array
    if array.dtype.kind != "f":
        return None
    steps = array.astype(np.float64) / scale + zero
    whole = np.rint(steps)
    limits = np.iinfo(kind)
    if np.abs(steps - whole).max(initial=0.0) > ON_GRID or whole.min() < limits.min or whole.max() > limits.max:
        return None
    return whole.astype(kind)


def _outputs_fault(module: GraphModule, results: Any, file: _Tensors) -> Divergence | None:
    import torch

    (last,) = module.graph.find_nodes(op="output")
    values = results if isinstance(results, (tuple, list)) else [results]
    for node, value in zip(last.all_input_nodes, values, strict=False):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            continue
        wanted = value.numpy()
        errors = {max_relative(array, wanted): step for step, array in file.shaped(wanted.shape)}
        if errors and min(errors) > FLOAT_LIMIT:
            return describe(node, _name(errors[min(errors)]), min(errors))
    return None


def _name(step: Step) -> str:
    return f"{step.operator} {step.name!r}" if step.name else step.operator


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
