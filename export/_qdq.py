"""Graph + plan + dialect → the simulation: a graph with integer weights and quantize / dequantize operators.

The simulation computes what the artifact must compute, and the artifact is written from that same graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.errors import InputError, Unsupported
from edgepack.export._alignment import PASSING, aligned, floats, kind_of, word
from edgepack.export._dialects import _assign, _attribute, _drop_unused, retrace
from edgepack.export._ends import skip_sum
from edgepack.export._integer_dialect import ADDITIONS, CONVOLUTIONS, MULTIPLICATIONS, SIGMOID, Dialect, Grid
from edgepack.export._products import drop_ones, split_silu
from edgepack.export._tables import codes_of, looked_up

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

    from edgepack.plan import Plan

Array = np.ndarray[Any, Any]
BITS = 8  # of an activation, where the dialect has no fewer
INT32 = 2**31 - 1
OFF_TIES = 1 + 1 / 4096  # 0.1 · 5 steps would be halfway between two; 255 steps are still the nearest to 255
LEAST_STEP = 1e-30
REGROUPED = ("view",)  # what lays the groups of a weight side by side
GRID_ERROR = 1e-6  # of a scale; how far from its grid a weight may be


def quantized(graph: Graph, plan: Plan, dialect: Dialect) -> Graph:
    """The simulation of an integer artifact.

    Raises:
        Unsupported: the plan asks for what the dialect lacks; names the operator.
        InputError: the plan is not of this graph.
    """
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers the operators)

    module = graph.program.module(check_guards=False)
    writer = _Writer(module, aligned(module, plan), plan, dialect)
    writer.run()
    _drop_unused(module)
    return replace(retrace(graph, module), dialect=writer.form())


@dataclass(eq=False)
class _Writer:
    module: GraphModule
    names: dict[Node, str]
    plan: Plan
    dialect: Dialect
    grids: dict[Node, Grid] = field(default_factory=dict)
    added: dict[Node, Mapping[str, Any]] = field(default_factory=dict)
    slow: set[Node] = field(default_factory=set)
    exact: set[Node] = field(default_factory=set)

    def run(self) -> None:
        for node in [node for node in self.names if word(node) in self.dialect.split]:
            self._split(node)
        products = [node for node in self.names if word(node) in MULTIPLICATIONS]
        for node in [node for node in products if drop_ones(self.module, node, PASSING)]:
            del self.names[node]
        self.slow = {node for node in self.names if "weight" in self._entry(node) and self.dialect.slow(node)}
        self._keep_skips()
        self._mark()
        pairs = {node: self._quantize(node, grid) for node, grid in self.grids.items()}
        shared: dict[tuple[str, str], Node] = {}
        ranged: dict[Node, Node] = {}
        for node in self._weighted():
            self._store(node, pairs, shared)
            if self._activations(node) == "dynamic":
                node.update_arg(0, self._ranged(node.args[0], ranged))

    def form(self) -> str:
        """The dialect's name, for what was written."""
        found = {self._activations(node) for node in self._weighted()}
        return self.dialect.forms[next(kind for kind in ("dynamic", "static", "float") if kind in found or not found)]

    def _activations(self, node: Node) -> str:
        """How the activations that a weighted operator reads are rounded: ``static``, ``dynamic`` or ``float``."""
        asked = str(self._entry(node).get("activations", "static"))
        if asked != "dynamic" or word(node) in self.dialect.dynamic:
            return asked
        if word(node) in CONVOLUTIONS and self.dialect.dynamic:
            return "float"  # products with ranges found at run time are fast, such convolutions slower than float
        raise Unsupported(
            f"this format has no {word(node)} that rounds activations in ranges found at run time ({node.name})",
            "activations = 'static' in quantize",
        )

    def _static(self, node: Node) -> bool:
        """Whether an operator with weights is computed in integers whose grids are known."""
        return node in self.names and self._stored(node) and self._activations(node) == "static"

    def _ranged(self, node: Any, done: dict[Node, Node]) -> Node:
        """A value rounded in the range it has, 0 inside."""
        import torch

        if node not in done:
            operators, add = torch.ops.quantized_decomposed, self.module.graph.call_function
            how = (0, 255, torch.uint8)
            with self.module.graph.inserting_after(node):
                found = add(operators.choose_qparams.tensor, (node, 0, 255, LEAST_STEP, torch.uint8))
            with self.module.graph.inserting_after(found):
                zero = add(operator.getitem, (found, 1))
                step = add(operator.getitem, (found, 0))
            with self.module.graph.inserting_after(zero):
                stored = add(operators.quantize_per_tensor.tensor, (node, step, zero, *how))
            with self.module.graph.inserting_after(stored):
                done[node] = add(operators.dequantize_per_tensor.tensor, (stored, step, zero, *how))
        return done[node]

    def _weighted(self) -> list[Node]:
        return [node for node in self.names if self._stored(node)]

    def _stored(self, node: Node) -> bool:
        """Whether an operator reads integer weights."""
        return "weight" in self._entry(node) and (node not in self.slow or self._activations(node) != "static")

    def _entry(self, node: Node) -> Mapping[str, Any]:
        return self.added[node] if node in self.added else self.plan.nodes[self.names[node]]

    def _split(self, node: Node) -> None:
        factor, product = split_silu(self.module, node)
        self.names[product] = self.names[factor] = self.names.pop(node)
        self.added[factor] = SIGMOID

    def _keep_skips(self) -> None:
        """Leave what a picture passes on its way past the network in float."""
        static = [node for node in self.slow if self._activations(node) == "static"]
        ends = {node: added for node in static if (added := skip_sum(node)) is not None}
        self.exact = {*ends, *ends.values()}
        for node, added in ends.items():
            if self.dialect.twins and sum(word(user) in ADDITIONS for user in node.users) > 1:
                self._twin(node, added)

    def _twin(self, node: Node, added: Node) -> None:
        """Compute an operator once more, for all readers but one."""
        with self.module.graph.inserting_after(node):
            twin = self.module.graph.node_copy(node)
        self.names[twin] = self.names[node]
        for user in [user for user in node.users if user is not added]:
            user.replace_input_with(node, twin)

    def _mark(self) -> None:
        """Choose which results are quantized, in the order of computation."""
        for node in list(self.module.graph.nodes):
            if node not in self.names:
                continue
            if "weight" in self._entry(node):
                if not self._static(node):
                    continue
                self._mark_one(node.args[0], node)
                if word(node) in self.dialect.every_output:
                    self._mark_result(node)
            elif word(node) in self.dialect.detour and node not in self.exact:
                self._mark_detour(node)
            elif "float" in self._entry(node) or node in self.exact:
                continue
            elif word(node) in self.dialect.integer and all(self._integer(source) for source in floats(node)):
                for source in floats(node):
                    self._mark_one(source, node)
                self._mark_result(node)

    def _mark_detour(self, node: Node) -> None:
        """Of two integer ways into a sum, quantize the one that does not end in the operator computed with the sum."""
        ways = list(floats(node))
        if len(ways) != 2 or not all(self._integer(way) for way in ways):
            return
        order = {before: place for place, before in enumerate(self.module.graph.nodes)}
        ends = [way for way in ways if way in self.names and self._static(way) and len(way.users) == 1]
        if self.dialect.first:
            for way in [end for end in ends if word(end) in CONVOLUTIONS][1:]:
                known = self._entry(way)["range"]
                self.grids.setdefault(way, self.dialect.around_zero(known["low"], known["high"]))
            return
        last = max(ends, key=lambda way: order[way], default=None)
        for way in ways:
            if way is not last:
                self._mark_one(way, node)

    def _integer(self, node: Node) -> bool:
        """Whether a value is, or can be, the result of an integer operator or a rearrangement of one."""
        while word(node) in PASSING and isinstance(node.args[0], type(node)) and node not in self.grids:
            node = node.args[0]
        if word(node) in self.dialect.both:
            return False
        return node in self.grids or self._static(node)

    def _mark_result(self, node: Node) -> None:
        behind = next(iter(node.users)) if len(node.users) == 1 else None
        self._mark_one(behind if behind is not None and word(behind) in self.dialect.fused else node, node)

    def _mark_one(self, node: Any, reader: Node) -> None:
        known = self._entry(node).get("range") if node in self.names else None
        if known is None:
            raise Unsupported(f"the plan has no range for what {reader.name} reads", "compress again")
        if known["bits"] > BITS and self.dialect.bits == BITS:
            raise Unsupported(f"this format has no activations of {known['bits']} bits ({reader.name} reads them)",
                              "activation_bits = 8 in quantize, or export to tflite")  # fmt: skip
        if known["bits"] < BITS and not self.dialect.narrow:
            raise Unsupported(f"this format has no activations of {known['bits']} bits ({reader.name} reads them)",
                              "activation_bits = 8 in quantize, or export to onnx, openvino or c")  # fmt: skip
        while word(node) in self.dialect.early and self._alone(node.args[0]):
            node = node.args[0]
        step = None
        if word(node) in self.dialect.same_step and node.args[0] in self.grids and known["bits"] == BITS:
            step = float(np.float32(self.grids[node.args[0]].step * OFF_TIES))
        low, high = self.dialect.spans.get(word(node), (known["low"], known["high"]))
        self.grids.setdefault(node, self.dialect.grid(low, high, step, known["bits"]))

    def _alone(self, node: Node) -> bool:
        """Whether one operator reads a value, and it may be rounded for that."""
        return len(node.users) == 1 and word(node) not in self.dialect.both

    def _quantize(self, node: Node, grid: Grid) -> Node:
        import torch

        operators = torch.ops.quantized_decomposed
        kind = torch.int16 if self.dialect.bits > BITS else torch.int8 if self.dialect.signed else torch.uint8
        how = (grid.step, grid.zero, grid.lowest, grid.highest, kind)
        users = [user for user in node.users if self._reads_integers(user, node)]
        with self.module.graph.inserting_after(node):
            stored = self.module.graph.call_function(operators.quantize_per_tensor.default, (node, *how))
        with self.module.graph.inserting_after(stored):
            value = self.module.graph.call_function(operators.dequantize_per_tensor.default, (stored, *how))
        for user in users:
            user.replace_input_with(node, value)
        return value

    def _reads_integers(self, user: Node, node: Node) -> bool:
        """Whether a reader of a quantized value takes what was rounded."""
        if word(node) in self.dialect.both:
            return self._static(user)
        return user not in self.exact or self._static(node)

    def _store(self, node: Node, pairs: Mapping[Node, Node], shared: dict[tuple[str, str], Node]) -> None:
        """Weight and bias of one operator as integers."""
        weight: Any = node.args[1]
        bias: Any = node.args[2] if len(node.args) > 2 else None
        where = str(weight.target)
        if (tables := self.plan.tensors.get(f"{self.names[node]}/weight_table")) is not None:
            node.update_arg(1, self._tables(node, where, self._values(weight), tables, shared))
            return
        scale = self.plan.tensors[f"{self.names[node]}/weight_scale"]
        if scale.ndim > 1:
            node.update_arg(1, self._groups(node, where, self._values(weight), scale, shared))
            return
        node.update_arg(1, self._integers(node, where, _on_grid(self._values(weight), scale, where), scale, shared))
        if bias is None or not self._static(node) or kind_of(node) in self.dialect.float_bias:
            return
        source = next(before for before, after in pairs.items() if after is node.args[0])
        steps = (scale * np.float32(self.grids[source].step)).astype(np.float32)
        whole = np.rint(self._values(bias).astype(np.float64) / steps)
        if np.abs(whole).max(initial=0) > INT32:
            raise Unsupported(f"the bias of {node.name} does not fit 32 bits", f"leave = [{where!r}] in quantize")
        node.update_arg(2, self._integers(node, str(bias.target), whole.astype(np.int32), steps, shared))

    def _groups(self, node: Node, where: str, values: Array, scale: Array, shared: dict[tuple[str, str], Node]) -> Node:
        """A weight with a scale per group of columns: every group a row of its own, laid side by side again."""
        import torch

        if not self.dialect.grouped:
            raise Unsupported(
                f"this format has no weights with a scale per group of columns ({where})",
                "leave group_size out in quantize",
            )
        rows, flat = values.reshape(scale.size, -1), scale.reshape(-1)
        wide = self._integers(node, where, _on_grid(rows, flat, where), flat, shared)
        with self.module.graph.inserting_before(node):
            return self.module.graph.call_function(torch.ops.aten.view.default, (wide, list(values.shape)))

    def _tables(
        self, node: Node, where: str, values: Array, tables: Array, shared: dict[tuple[str, str], Node]
    ) -> Node:
        """A weight looked up in tables of values."""
        if not self.dialect.tables:
            raise Unsupported(
                f"this format has no weights that are looked up in tables ({where})",
                "export to coreml, or leave codebook out in quantize",
            )
        key = where, "looked up"
        if key not in shared:
            shared[key] = looked_up(self.module, node, where, codes_of(values, tables, where), tables)
        return shared[key]

    def _integers(
        self, reader: Node, name: str, whole: Array, scale: Array, shared: dict[tuple[str, str], Node]
    ) -> Node:
        import torch

        kind = torch.int8 if whole.dtype == np.int8 else torch.int32
        key = (name, f"{whole.tobytes()!r}" if kind is torch.int32 else "")
        prefix = name if kind is torch.int8 else f"{name}_{reader.name}"
        stored = (whole, scale, np.zeros(len(scale), whole.dtype))
        with self.module.graph.inserting_before(reader):
            if key not in shared:
                held = []
                for suffix, array in zip(("integers", "scale", "zero"), stored, strict=True):
                    _assign(self.module, f"{prefix}_{suffix}", torch.from_numpy(np.ascontiguousarray(array)))
                    held.append(self.module.graph.get_attr(f"{prefix}_{suffix}"))
                low, high = (-127, 127) if kind is torch.int8 else (-INT32 - 1, INT32)
                wide = torch.ops.quantized_decomposed.dequantize_per_channel.default
                shared[key] = self.module.graph.call_function(wide, (*held, 0, low, high, kind))
        return shared[key]

    def _values(self, node: Node) -> Array:
        if node.op != "get_attr":
            raise InputError(f"the plan calls {node.name} a weight, the network computes it", "compress again")
        tensor: torch.Tensor = _attribute(self.module, node)
        return tensor.detach().numpy()


def _on_grid(values: Array, scale: Array, name: str) -> Array:
    steps = scale.reshape(-1, *[1] * (values.ndim - 1)).astype(np.float64)
    whole = np.rint(values / steps)
    if np.abs(values / steps - whole).max(initial=0.0) > GRID_ERROR * 127 or np.abs(whole).max(initial=0.0) > 127:
        raise InputError(f"the weight {name} does not lie on the grid that the plan gives", "compress again")
    return whole.astype(np.int8)


def planned_integer(simulation: Graph) -> Counter[str]:
    """Operators that read integer weights, by kind."""
    kinds: Counter[str] = Counter()
    for node in simulation.program.graph.nodes:
        if word(node) in REGROUPED:
            continue
        sources = [_ungrouped(source) for source in node.all_input_nodes]
        if any("dequantize_per_channel" in str(source.target) for source in sources):
            kinds[word(node)] += 1
    return kinds


def _ungrouped(node: Node) -> Node:
    """What stands before the reshaping of a weight that has a scale per group."""
    return node.all_input_nodes[0] if word(node) in REGROUPED else node


def transposed(simulation: Graph) -> list[str]:
    """What is said of transposed convolutions in a file for a CPU, as a sentence.

    Neither ONNX Runtime 1.32 nor OpenVINO 2026.4 has an integer kernel for them that takes these grids: written between
    quantized values both compute them in float, and take 0.92 to 1.22 times as long as with nothing around.
    """
    count = sum(word(node).startswith("conv_transpose") for node in simulation.program.graph.nodes)
    return [f"in float, for want of an integer kernel: {count} transposed convolutions"] if count else []
