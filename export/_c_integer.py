"""Plan → simulation for C: integers through and through.

::

    quantize(relu(conv(dequantize(x), dequantize(w), dequantize(b))))        what ``_qdq`` writes
    quantize(((conv(x − zero, w, b) · multiplier + half) >> shift), 1.0)     the same in integers alone

Sums are computed in float64, which holds them exactly, and rounded by multiplication and shift in int64, so that the
simulation and the kernels give the very same integers. A rounded value keeps its ``quantize`` operator, with step 1.
What has no integer form stays as it was: floats between ``dequantize`` and ``quantize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.errors import Unsupported
from edgepack.export._alignment import word
from edgepack.export._c_fixed import HIGH, LOW, SUM_BITS, fixed, table
from edgepack.export._c_graph import Array
from edgepack.export._c_layers import pair
from edgepack.export._dialects import _assign, _attribute, retrace
from edgepack.export._integer_dialect import ADDITIONS, CONVOLUTIONS, LEAKY, RELUS, SILU, Dialect
from edgepack.export._qdq import quantized
from edgepack.export._tflite_ranges import harmonized

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

    from edgepack.plan import Plan

TABLES = frozenset({"sigmoid", "tanh", "hardswish", "hardsigmoid", "gelu"})
MEANS = frozenset({"mean", "adaptive_avg_pool2d", "avg_pool2d"})
MOVES = frozenset({
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "contiguous", "clone", "slice",
    "select", "pad", "constant_pad_nd", "expand", "pixel_shuffle", "pixel_unshuffle",
})  # fmt: skip
COMPARES = frozenset({"max_pool1d", "max_pool2d", "upsample_nearest2d"})  # PyTorch has them for floats alone
DIALECT = Dialect(
    "s8s8-c",
    fused=RELUS | LEAKY,
    integer=ADDITIONS | MEANS | TABLES | {"cat", "mul", "sub"},
    every_output=CONVOLUTIONS | {"linear"},
    signed=True,
    split=SILU,
    narrow=True,
)
SUM_LIMIT = 2**31 - 1


def lower_integers(graph: Graph, plan: Plan) -> Graph:
    """The simulation. Raises Unsupported where the plan asks for what the kernels lack."""
    simulation = quantized(graph, harmonized(graph, plan), DIALECT)
    if simulation.dialect != DIALECT.name:
        raise Unsupported(
            "the C target has no integer weights beside float activations",
            "activation_bits = 8 and activations = 'static' in quantize",
        )
    module = simulation.program.module(check_guards=False)
    _Exact(module).run()
    return replace(retrace(simulation, module), dialect=simulation.dialect)


@dataclass(eq=False)
class _Exact:
    """Rewrites a module. ``twins`` are float values with the integers they stand for: node, step, zero."""

    module: GraphModule
    twins: dict[Node, tuple[Node, float, int]] = field(default_factory=dict)
    count: int = 0

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            name = str(node.target)
            if name == "quantized_decomposed.quantize_per_tensor.default":
                self._rounded(node)
            elif name == "quantized_decomposed.dequantize_per_tensor.default":
                self.twins[node] = (node.args[0], node.args[1], node.args[2])

    def _rounded(self, node: Node) -> None:
        """Give a quantize operator an integer form, if what it rounds has one."""
        source: Any = node.args[0]
        limits, slope, base = self._activation(node, source)
        maker = self._clip if base in self.twins else self._makers().get(word(base))
        if maker is None or not all(self._twin(way) for way in _ways(base)):
            return
        plain = limits == (LOW, HIGH) and slope == 1
        with self.module.graph.inserting_before(node):
            made = maker(node, base, limits, slope) if plain or base in self.twins or word(base) in _LIMITED else None
        if made is not None:
            node.replace_all_uses_with(made)
            self.module.graph.erase_node(node)

    def _makers(self) -> dict[str, Callable[..., Node | None]]:
        return {
            **dict.fromkeys(CONVOLUTIONS | {"linear"}, self._weighted), **dict.fromkeys(ADDITIONS | {"sub"}, self._sum),
            **dict.fromkeys(MEANS, self._mean), **dict.fromkeys(TABLES, self._table),
            **dict.fromkeys(MOVES | COMPARES, self._move), "cat": self._cat, "mul": self._product,
        }  # fmt: skip

    def _twin(self, node: Node) -> bool:
        return node in self.twins

    def _activation(self, node: Node, source: Node) -> tuple[tuple[int, int], float, Node]:
        """Limits of the integers, the slope of negative values, and what stands before the activation."""
        _, step, zero = _arguments(node)
        full: Any = tuple(node.args[3:5])
        if len(source.users) > 1 or word(source) not in RELUS | LEAKY or not isinstance(source.args[0], type(node)):
            return full, 1.0, source
        if word(source) in LEAKY:
            slope = float(source.args[1] if len(source.args) > 1 else 0.01)  # type: ignore[arg-type]
            return full, slope, source.args[0]
        given: Any = source.args[1:3]
        low, high = (0.0, np.inf) if word(source).startswith("relu") else given or (-1.0, 1.0)
        high = 6.0 if word(source).startswith("relu6") else high
        ends = [int(np.clip(np.rint(end / step) + zero, *full)) for end in (low, high)]
        return (ends[0], ends[1]), 1.0, source.args[0]

    def _weighted(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node | None:
        """A convolution or linear layer with integer weights."""
        import torch

        held = [self._integers(place) for place in base.args[1:3]]
        if held[0] is None or not 0 <= slope <= 1 or len(base.users) > 1:
            return None
        weight, scale = held[0]
        _, step, zero = _arguments(node)
        stored, source_step, source_zero = self.twins[base.args[0]]  # type: ignore[index]
        bias = held[1][0] if len(held) > 1 and held[1] is not None else np.zeros(len(weight), np.int32)
        self._hold_sums(base, weight, bias)
        wide = self._wide(stored, source_zero, torch.float64)
        ends = [self._call(torch.ops.aten.to.dtype, self._constant(array), torch.float64) for array in (weight, bias)]
        total = self._call(base.target, wide, *ends, *base.args[3:], **base.kwargs)
        ratio = scale.astype(np.float64) * source_step / step
        axes = (1, -1, *[1] * (weight.ndim - 2)) if word(base) != "linear" else (-1,)
        return self._requantized(
            self._call(torch.ops.aten.to.dtype, total, torch.int64), ratio, axes, (zero, *limits), slope
        )

    def _integers(self, node: Any) -> tuple[Array, Array] | None:
        """A stored weight or bias and its scales."""
        if "dequantize_per_channel" not in str(getattr(node, "target", "")):
            return None
        values, scale = (_attribute(self.module, place).numpy() for place in node.args[:2])
        return values, scale

    def _hold_sums(self, base: Node, weight: Array, bias: Array) -> None:
        worst = 256 * np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1) + np.abs(bias.astype(np.int64))
        if worst.max(initial=0) > SUM_LIMIT // 2:
            raise Unsupported(f"sums of {base.name} do not fit 32 bits", "leave the layer float in quantize")

    def _requantized(
        self, total: Node, ratio: Array, axes: Sequence[int], grid: tuple[int, int, int], slope: float = 1.0
    ) -> Node:
        """int64 sums → 8 bits."""
        import torch

        aten = torch.ops.aten
        multiplier, shift = fixed(ratio)
        factor = self._constant(multiplier.reshape(axes))
        if slope != 1:
            below = self._call(aten.lt.Scalar, total, 0)
            negative = self._constant(np.rint(multiplier * slope).astype(np.int64).reshape(axes))
            factor = self._call(aten.where.self, below, negative, factor)
        half = self._constant((np.int64(1) << (shift - 1)).reshape(axes))
        moved = self._call(aten.add.Tensor, self._call(aten.mul.Tensor, total, factor), half)
        whole = self._call(aten.bitwise_right_shift.Tensor, moved, self._constant(shift.reshape(axes)))
        return self._clipped(whole, grid)

    def _clipped(self, whole: Node, grid: tuple[int, int, int]) -> Node:
        import torch

        values = self._call(torch.ops.aten.to.dtype, whole, torch.float32)
        rounding = torch.ops.quantized_decomposed.quantize_per_tensor.default
        return self._call(rounding, values, 1.0, *grid, torch.int8)

    def _wide(self, stored: Node, zero: int, dtype: torch.dtype) -> Node:
        import torch

        wide = self._call(torch.ops.aten.to.dtype, stored, dtype)
        return self._call(torch.ops.aten.sub.Tensor, wide, zero)

    def _sum(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node | None:
        """Both sides on a common fine grid, in 32 bits."""
        import torch

        if len(_ways(base)) != 2 or base.kwargs or slope != 1 or not _full(base):
            return None
        sides = [self.twins[way] for way in _ways(base)]
        _, step, zero = _arguments(node)
        ratios = np.array([side_step / step for _, side_step, _ in sides])
        _, shift = fixed(ratios.max(), SUM_BITS)
        if int(shift[0]) > 30:
            return None
        factors = np.rint(np.ldexp(ratios, int(shift[0]))).astype(np.int64)
        factors[1] *= -1 if word(base) == "sub" else 1
        terms = [
            self._call(torch.ops.aten.mul.Tensor, self._wide(stored, side_zero, torch.int64), int(factor))
            for (stored, _, side_zero), factor in zip(sides, factors, strict=True)
        ]
        return self._shifted(self._call(torch.ops.aten.add.Tensor, *terms), int(shift[0]), (zero, *limits))

    def _shifted(self, total: Node, shift: int, grid: tuple[int, int, int]) -> Node:
        import torch

        moved = self._call(torch.ops.aten.add.Tensor, total, 1 << (shift - 1))
        return self._clipped(self._call(torch.ops.aten.bitwise_right_shift.Tensor_Scalar, moved, shift), grid)

    def _product(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node | None:
        import torch

        if len(_ways(base)) != 2 or slope != 1:
            return None
        sides = [self.twins[way] for way in _ways(base)]
        _, step, zero = _arguments(node)
        multiplier, shift = fixed(sides[0][1] * sides[1][1] / step)
        wide = [self._wide(stored, side_zero, torch.int64) for stored, _, side_zero in sides]
        total = self._call(torch.ops.aten.mul.Tensor, *wide)
        total = self._call(torch.ops.aten.mul.Tensor, total, int(multiplier[0]))
        return self._shifted(total, int(shift[0]), (zero, *limits))

    def _mean(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node | None:
        """Sums over windows, which float64 pools hold exactly."""
        import torch

        found = _windows(base)
        if found is None or slope != 1:
            return None
        size, stride, keep = found
        stored, source_step, source_zero = self.twins[_ways(base)[0]]
        _, step, zero = _arguments(node)
        wide = self._wide(stored, source_zero, torch.float64)
        pool = torch.ops.aten.avg_pool2d.default
        total = self._call(pool, wide, list(size), list(stride), [0, 0], False, True, 1)
        total = self._call(torch.ops.aten.to.dtype, total, torch.int64)
        made = self._requantized(total, np.array([source_step / step / (size[0] * size[1])]), (1,), (zero, *limits))
        return made if keep else self._call(torch.ops.aten.view.default, made, list(node.meta["val"].shape))

    def _table(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node | None:
        """Any function of single values."""
        import torch

        stored, source_step, source_zero = self.twins[_ways(base)[0]]
        _, step, zero = _arguments(node)

        def function(values: Array) -> Array:
            result: Array = base.target(torch.from_numpy(values), *base.args[1:], **base.kwargs).numpy()  # type: ignore
            return result

        return self._looked_up(stored, table(function, (source_step, source_zero), (step, zero)))

    def _clip(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node | None:
        """A rounded value on another grid, between limits."""
        stored, *grid = self.twins[base]
        source, target = (grid[0], int(grid[1])), _arguments(node)[1:]
        if limits == (LOW, HIGH) and source == target:
            return stored
        found = table(lambda values: values, source, target)
        return self._looked_up(stored, np.clip(found, *limits)) if slope == 1 else None

    def _looked_up(self, stored: Node, found: Array) -> Node:
        import torch

        index = self._call(torch.ops.aten.to.dtype, stored, torch.int64)
        places = [self._call(torch.ops.aten.add.Tensor, index, -LOW)]
        return self._call(torch.ops.aten.index.Tensor, self._constant(found), places)

    def _regrid(self, stored: Node, source: tuple[float, int], target: tuple[float, int]) -> Node:
        """Integers on another grid."""
        if source == target:
            return stored
        return self._looked_up(stored, table(lambda values: values, source, target))

    def _move(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node:
        """What only moves values moves integers, on the grid of what it reads."""
        stored, source_step, source_zero = self.twins[_ways(base)[0]]
        _, step, zero = _arguments(node)
        moved = self._moved(stored, base, source_step, source_zero)
        return self._regrid(moved, (source_step, source_zero), (step, zero))

    def _moved(self, stored: Node, base: Node, step: float, zero: int) -> Node:
        import torch

        args: Any = base.args[1:]
        filler = _filler(word(base), args)
        if filler is not None:
            place = int(np.clip(np.rint(filler / step) + zero, LOW, HIGH))
            return self._call(torch.ops.aten.constant_pad_nd.default, stored, args[0], place)
        if word(base) not in COMPARES:
            return self._call(base.target, stored, *args, **base.kwargs)
        wide = self._call(torch.ops.aten.to.dtype, stored, torch.float32)
        return self._call(torch.ops.aten.to.dtype, self._call(base.target, wide, *args, **base.kwargs), torch.int8)

    def _cat(self, node: Node, base: Node, limits: tuple[int, int], slope: float) -> Node | None:
        import torch

        _, step, zero = _arguments(node)
        parts = []
        for way in base.args[0]:  # type: ignore[union-attr]
            stored, *grid = self.twins[way]  # type: ignore[index]
            parts.append(self._regrid(stored, (grid[0], int(grid[1])), (step, zero)))
        return self._call(torch.ops.aten.cat.default, parts, *base.args[1:])

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.module.graph.call_function(target, args, kwargs)

    def _constant(self, array: Array) -> Node:
        import torch

        name = f"c_{self.count}"
        self.count += 1
        _assign(self.module, name, torch.from_numpy(np.ascontiguousarray(array)))
        return self.module.graph.get_attr(name)


_LIMITED = CONVOLUTIONS | ADDITIONS | MEANS | {"linear", "sub", "mul"}


def _arguments(node: Node) -> tuple[Any, float, int]:
    """Source, step and zero of a quantize or dequantize operator."""
    source, step, zero = node.args[:3]
    return source, float(step), int(zero)  # type: ignore[arg-type]


def _ways(node: Node) -> list[Node]:
    """The activations that an operator reads."""
    if "dequantize_per_tensor" in str(node.target):
        return [node]
    return [way for way in node.all_input_nodes if "dequantize_per_channel" not in str(way.target)]


def _filler(name: str, args: Sequence[Any]) -> float | None:
    """What a padding with one value fills with; None for any other operator."""
    if name == "pad" and args[1:2] in ((), ("constant",)):
        return float((args[2:3] or (0.0,))[0] or 0.0)
    return float((args[1:2] or (0.0,))[0] or 0.0) if name == "constant_pad_nd" else None


def _full(base: Node) -> bool:
    return all(way.meta["val"].shape == base.meta["val"].shape for way in _ways(base))


def _windows(base: Node) -> tuple[tuple[int, int], tuple[int, int], bool] | None:
    """Size, stride and whether axes stay, of a mean over full windows of an image; None for any other."""
    shape = _ways(base)[0].meta["val"].shape
    if len(shape) != 4:
        return None
    if word(base) == "mean":
        axes: Any = base.args[1] if len(base.args) > 1 else None
        keep = bool(base.args[2]) if len(base.args) > 2 else False
        if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            return None
        return (shape[2], shape[3]), (shape[2], shape[3]), keep
    out = base.meta["val"].shape
    if word(base) == "adaptive_avg_pool2d":
        size = (shape[2] // out[2], shape[3] // out[3])
        return (size, size, True) if shape[2] % out[2] == shape[3] % out[3] == 0 else None
    given: Any = base.args[1:]
    if len(given) > 3 or any((given[2:3] or ([],))[0]):
        return None
    size = pair(given[0], 2)
    return size, pair(given[1], 2) if given[1:2] not in ((), ([],)) else size, True
