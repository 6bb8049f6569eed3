"""Activations that OpenVINO's CPU engine rounds at run time: computed as it does, and left out of the file.

The engine rounds by itself what a matrix product with a constant int8 weight reads, as long as the property
DYNAMIC_QUANTIZATION_GROUP_SIZE is not 0: every row is cut into groups of that many values, each rounded to −127…127 of
its largest magnitude. So the file holds int8 weights and that property, and no operator that rounds. Source: OpenVINO
2026.4 itself, on a processor with VNNI: single products agree with this simulation to 140 dB where the groups divide
the row; where they do not, some are computed in float.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import FLOAT_LIMIT
from edgepack.errors import Unsupported
from edgepack.export._alignment import PASSING, aligned, word
from edgepack.export._dialects import retrace
from edgepack.export._openvino_integer import set_group
from edgepack.export._qdq import quantized

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from edgepack.contracts import Graph
    from edgepack.export._integer_dialect import Dialect
    from edgepack.plan import Plan

GROUPS = (128, 64, 32)  # values; the larger, the faster
LIMITS = (-128, 127)


def simulated(graph: Graph, plan: Plan, dialect: Dialect) -> Graph:
    """The simulation of a plan in which linear layers may be ``dynamic``.

    Convolutions have no such form and read what calibration found ranges for. Linear layers whose rows cannot be cut
    into equal groups stay float.

    Raises:
        Unsupported: the plan asks for what OpenVINO lacks; names the operator.
    """
    module = graph.program.module(check_guards=False)
    asked = {name: node for node, name in aligned(module, plan).items() if _dynamic(plan.nodes[name])}
    rows = {name: _columns(node) for name, node in asked.items() if word(node) == "linear"}
    fitting = {name for name, columns in rows.items() if columns % GROUPS[-1] == 0}
    if rows and not fitting:
        raise Unsupported(
            f"openvino rounds rows at run time in groups of at least {GROUPS[-1]} values, which divide the rows of no "
            f"linear layer here ({', '.join(sorted(rows))})",
            "activations = 'static' in quantize",
        )
    nodes = dict(plan.nodes)
    for name in asked:
        if name in rows and name not in fitting:
            nodes[name] = {key: value for key, value in nodes[name].items() if key != "weight"}
        else:
            nodes[name] = {**nodes[name], "activations": "float" if name in fitting else "static"}
    simulation = quantized(graph, replace(plan, nodes=nodes), dialect)
    if not fitting:
        return simulation
    group = next(size for size in GROUPS if all(rows[name] % size == 0 for name in fitting))
    linear = {name: entry for name, entry in plan.nodes.items() if entry["operator"] == "linear"}
    return replace(_rounding(simulation, replace(plan, nodes=linear), fitting, group), dialect=dialect.forms["dynamic"])


def unrounded(simulation: Graph) -> tuple[Graph, int]:
    """What the file holds of the simulation, and the size of a group."""
    module = simulation.program.module(check_guards=False)
    size = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and word(node) == "linear" and (rounded := _origin(node.args[0])) is not None:
            groups: Any = rounded.args[0]
            size = int(groups.args[0].meta["val"].shape[-1])
            source: Any = groups.args[0]
            while word(source) in PASSING and source.meta["val"].shape != node.args[0].meta["val"].shape:
                source = source.args[0]
            node.update_arg(0, source)
    return replace(retrace(simulation, module), dialect=simulation.dialect), size


def describe(simulation: Graph, group: int) -> list[str]:
    """How the file computes, as sentences."""
    linear = [node for node in simulation.program.graph.nodes if word(node) == "linear"]
    left = sum(_origin(node.args[0]) is None for node in linear)
    others = f"; {left} others, whose rows no group divides, are float" if left else ""
    return [
        f"{len(linear) - left} linear layers round what they read in groups of {group} values at run time, where the "
        f"processor has VNNI; elsewhere OpenVINO computes them in float{others}"
    ]


def require_rounding(ov: Any) -> None:
    """Refuse where the engine would compute in float, so that nothing could be proved.

    Raises:
        Unsupported: this processor has no instructions for it, as far as OpenVINO knows.
    """
    numbers = np.random.default_rng(0).standard_normal((2, GROUPS[-1], GROUPS[-1])).astype(np.float32)
    values, weight = numbers[0], np.rint(40 * numbers[1]).clip(-127, 127).astype(np.int8)
    given = ov.opset13.parameter(values.shape, np.float32)
    scale = ov.opset13.constant(np.full((len(weight), 1), 0.025, np.float32))
    wide = ov.opset13.multiply(ov.opset13.convert(ov.opset13.constant(weight), "f32"), scale)
    model = ov.Model([ov.opset13.matmul(given, wide, transpose_a=False, transpose_b=True)], [given])
    set_group(model, GROUPS[-1])
    found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values)[0]
    exact = values @ (weight.T * np.float32(0.025))
    if np.abs(found - exact).max() <= FLOAT_LIMIT * np.abs(exact).max():
        raise Unsupported(
            f"OpenVINO {ov.__version__.partition('-')[0]} rounds no activations at run time on this processor",
            "activations = 'static' in quantize",
        )


def _dynamic(entry: Mapping[str, Any]) -> bool:
    return "weight" in entry and entry.get("activations") == "dynamic"


def _columns(node: Node) -> int:
    weight: Any = node.args[1]
    return int(weight.meta["val"].shape[1])


def _rounding(simulation: Graph, plan: Plan, names: Collection[str], group: int) -> Graph:
    """``plan``: of linear layers alone: others may be gone or have another form in a simulation."""
    module = simulation.program.module(check_guards=False)
    rounded: dict[Node, Node] = {}
    for node, name in aligned(module, plan).items():
        if name not in names:
            continue
        source: Any = node.args[0]
        if source not in rounded:
            with module.graph.inserting_before(node):
                rounded[source] = _rounded(module, source, group)
        node.update_arg(0, rounded[source])
    return retrace(simulation, module)


def _rounded(module: GraphModule, source: Node, group: int) -> Node:
    import torch

    operators, call = torch.ops.quantized_decomposed, module.graph.call_function
    cut = call(torch.ops.aten.unflatten.int, (source, -1, (-1, group)))
    how = call(operators.choose_qparams_per_token.default, (cut, torch.int8))
    grid = (call(operator.getitem, (how, 0)), call(operator.getitem, (how, 1)), *LIMITS, torch.int8)
    stored = call(operators.quantize_per_token.default, (cut, *grid))
    value = call(operators.dequantize_per_token.default, (stored, *grid, torch.float32))
    return call(torch.ops.aten.flatten.using_ints, (value, -2, -1))


def _origin(node: Any) -> Node | None:
    """The rounding at run time behind a value; None where there is none."""
    while word(node) in PASSING:
        node = node.args[0]
    found: Node = node
    return found if word(found) == "quantized_decomposed" and "dequantize_per_token" in str(found.target) else None
