"""Core ML's eight bits: which grids and places, and a written package held against what was planned.

Sources: coremltools' documentation of activation quantization and of its own passes over quantized programs. An
operator is computed in integers as ``dequantize → operator → quantize``; kernels are fastest without a zero point,
as unsigned bytes are behind a ReLU and signed ones around zero; weights are constant expressions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgepack.errors import ParityError, Unsupported
from edgepack.export._coreml_tables import refuse_tables
from edgepack.export._integer_dialect import (
    ADDITIONS,
    CONVOLUTIONS,
    LEAKY,
    NORMS,
    PRODUCTS,
    RELUS,
    Dialect,
    Grid,
    narrow_depthwise,
)
from edgepack.export._qdq import planned_integer, quantized

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.plan import Plan


@dataclass(frozen=True)
class Centred(Dialect):
    """Zero is the lowest byte where nothing is negative, and the middle one where that costs little of the step."""

    def grid(self, low: float, high: float, step: float | None = None, bits: int = 8) -> Grid:
        middle = max(-low / 128, high / 127)
        if step is None and low < 0 and middle <= CENTRED * (high - low) / 255:
            return Grid(middle, 128, self.lowest, self.highest)
        return super().grid(low, high, step, bits)


COREML = Centred(
    "u8s8-coreml",
    fused=RELUS | LEAKY,
    integer=ADDITIONS,
    both=NORMS,
    float_bias=CONVOLUTIONS | PRODUCTS,
    slow=narrow_depthwise,
    tables=True,
)
WEIGHTS = "w8"
CENTRED = 1.25  # times the step of a grid with a zero point; behind a leaky ReLU it would be about 2
KINDS = {"conv": ("conv", "conv_transpose"), "linear": ("linear", "matmul")}
MOVING = ("reshape", "transpose", "expand_dims", "squeeze", "pad", "max_pool", "slice_by_index", "slice_by_size")


def simulated(graph: Graph, plan: Plan, weights_only: bool, target: str) -> Graph:
    """The simulation of an integer package.

    Args:
        weights_only: leave all activations in float.
        target: oldest system that must run the package.

    Raises:
        Unsupported: the plan asks for what Core ML lacks; names the operator.
    """
    forms = {name: entry.get("activations", "static") for name, entry in plan.nodes.items() if "weight" in entry}
    if weights_only:
        forms = dict.fromkeys(forms, "float")
        plan = replace(plan, nodes={name: {**plan.nodes[name], "activations": "float"} if name in forms else entry
                                    for name, entry in plan.nodes.items()})  # fmt: skip
    for name, form in forms.items():
        if form == "dynamic":
            raise Unsupported(
                f"coreml: {name} is to round its activations while it runs, which Core ML cannot",
                "activations = 'static' in quantize, or activations = 'float' here (weights only)",
            )
        if form == "static" and target == "iOS16":
            raise Unsupported(
                f"coreml: iOS16 cannot compute {name} in 8 bits",
                "target = 'iOS17' or later, or activations = 'float' (weights only)",
            )
    refuse_tables(plan, target)
    simulation = quantized(graph, plan, replace(COREML, grouped=target == "iOS18"))
    return simulation if "static" in forms.values() else replace(simulation, dialect=WEIGHTS)


def hold_integers(function: Any, simulation: Graph) -> None:
    """Every operator that was planned in integers reads an int8 weight of the file, and quantized activations.

    Args:
        function: the main function of the package, read again.

    Raises:
        ParityError: the file holds fewer; says how many.
    """
    planned = planned_integer(simulation)
    weights, both = Counter[str](), Counter[str]()
    for operator in function.operations:
        weight = operator.inputs.get("weight", operator.inputs.get("y"))
        if weight is not None and _stored_in_8_bits(weight):
            weights[operator.op_type] += 1
            both[operator.op_type] += _dequantized(operator.inputs["x"])
    for kind, types in KINDS.items():
        wanted = sum(count for word, count in planned.items() if word.startswith(kind))
        _compare(wanted, sum(weights[name] for name in types), kind, "read int8 weights")
        if simulation.dialect == COREML.name:
            static = _static(simulation, kind)
            _compare(static, sum(both[name] for name in types), kind, "read 8-bit activations")


def _compare(wanted: int, found: int, kind: str, what: str) -> None:
    if found < wanted:
        raise ParityError(f"coreml: {found} of {wanted} planned {kind} operators in the file {what}")


def _static(simulation: Graph, kind: str) -> int:
    """Planned operators of a kind that read what was quantized before them."""
    return sum(
        any("dequantize_per_channel" in str(source.target) for source in node.all_input_nodes)
        and "dequantize_per_tensor" in str(getattr(node.args[0], "target", ""))
        for node in simulation.program.graph.nodes
        if str(node.target).removeprefix("aten.").startswith(kind)
    )


def _stored_in_8_bits(value: Any) -> bool:
    maker = value.op
    while maker is not None and maker.op_type in ("cast", *MOVING):
        maker = maker.inputs["x"].op
    if maker is None or not maker.op_type.startswith("constexpr_"):
        return False
    stored = maker.inputs.get("quantized_data", maker.inputs.get("data"))
    return stored is not None and str(stored.val.dtype) == "int8"


def _dequantized(value: Any) -> bool:
    maker = value.op
    while maker is not None and maker.op_type in ("cast", *MOVING):
        maker = maker.inputs["x"].op
    return maker is not None and maker.op_type == "dequantize"
