"""Activations of fewer than 8 bits: the same bytes, of which only the few lowest values are used.

::

    ONNX        QuantizeLinear → DequantizeLinear      becomes   QuantizeLinear → Clip → DequantizeLinear
    OpenVINO    FakeQuantize with 256 levels           becomes   FakeQuantize with 16 levels

ONNX Runtime still finds its 8-bit operators around the Clip, which works on the bytes they give; OpenVINO's engine has
convolutions of bytes for 16 levels too. Each is told apart from a file without it by the proof: values above the
highest level would be far from those of the simulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import Unsupported

if TYPE_CHECKING:
    from edgepack.contracts import Graph

FULL = 254  # steps, at least, of a grid of 8 bits
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"


def has_narrow(simulation: Graph) -> bool:
    """Whether some activation has fewer than 8 bits."""
    return any(levels <= FULL for _, _, levels in _grids(simulation))


def clipping() -> dict[Any, Any]:
    """How torch.onnx is to write quantize operators, so that the ends of a grid of few bits are kept."""
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operators
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.common import constant

    op: Any = opset18

    def rounded(x: Any, step: float, zero: int, low: int, high: int, dtype: int) -> Any:
        stored = op.QuantizeLinear(x, step, constant(zero, dtype=dtype))
        if high - low >= FULL:
            return stored
        return op.Clip(stored, constant(low, dtype=dtype), constant(high, dtype=dtype))

    return {torch.ops.quantized_decomposed.quantize_per_tensor.default: rounded}


def narrow(ov: Any, model: Any, simulation: Graph) -> None:
    """Give each FakeQuantize of a grid of few bits its number of levels, in place.

    Raises:
        Unsupported: two grids of different bits have one step and one zero point.
    """
    grids: dict[tuple[float, int], int] = {}
    for step, zero, levels in _grids(simulation):
        if grids.setdefault((step, zero), levels) != levels:
            raise Unsupported("activations of 8 and of fewer bits share a step, which the file cannot say",
                              "another calibrate in quantize")  # fmt: skip
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != 256:
            continue
        low, high = (float(node.input_value(place).get_node().data.reshape(-1)[0]) for place in (3, 4))
        step = (high - low) / 255
        for (wanted, zero), levels in grids.items():
            if levels <= FULL and np.isclose(step, wanted, rtol=1e-6) and round(-low / step) == zero:
                ends = [np.float32(wanted * (integer - zero)) for integer in (0, levels - 1)]
                made = ov.opset13.fake_quantize(node.input_value(0), *ends, *ends, levels)
                node.output(0).replace(made.output(0))


def _grids(simulation: Graph) -> Iterator[tuple[float, int, int]]:
    """Step, zero point and number of levels of every rounded activation."""
    for node in simulation.program.graph.nodes:
        if str(node.target) == QUANTIZE:
            _, step, zero, low, high, _ = node.args
            yield step, zero, high - low + 1
