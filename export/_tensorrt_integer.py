"""TensorRT's eight bits, as explicit quantization: signed, symmetric, with biases in float.

Source: NVIDIA's recommendations on where QuantizeLinear and DequantizeLinear stand. They stand before what convolutions
and linear layers read, not behind their results: a convolution, the sum behind it and the ReLU behind that become
one kernel. Into that kernel the other way of the sum comes as bytes, so it is quantized, and the convolution is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepack.errors import Unsupported
from edgepack.export._integer_dialect import ADDITIONS, CONVOLUTIONS, NORMS, PRODUCTS, Dialect, narrow_depthwise
from edgepack.export._qdq import quantized

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.plan import Plan


@dataclass(frozen=True)
class Symmetric(Dialect):
    """Symmetric steps, but what is beyond the range ends at −128, as QuantizeLinear does."""

    @property
    def lowest(self) -> int:
        return -128


TENSORRT = Symmetric(
    "s8s8-tensorrt",
    fused=frozenset(),
    integer=frozenset(),
    both=NORMS,
    detour=ADDITIONS,
    signed=True,
    symmetric=True,
    float_bias=CONVOLUTIONS | PRODUCTS,
    slow=narrow_depthwise,
)
REASONS = {
    "dynamic": "to round its activations while it runs, which TensorRT cannot",
    "float": "to have integer weights and float activations, which TensorRT has for 4 bits only",
}


def simulated(graph: Graph, plan: Plan) -> Graph:
    """The simulation of an explicitly quantized network.

    Raises:
        Unsupported: the plan asks for what TensorRT lacks; names the operator.
    """
    for name, form in _forms(plan):
        if form in REASONS:
            raise Unsupported(
                f"tensorrt: {name} is {REASONS[form]}",
                "activations = 'static' in quantize, or precision = 'float16' here",
            )
    return quantized(graph, plan, TENSORRT)


def _forms(plan: Plan) -> Iterator[tuple[str, str]]:
    return ((name, entry.get("activations", "static")) for name, entry in plan.nodes.items() if "weight" in entry)
