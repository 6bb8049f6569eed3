"""TFLite files for LiteRT on phones, boards and computers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgepack.artifact import reserve
from edgepack.contracts import Census, Exporter, Graph
from edgepack.errors import Unsupported, require
from edgepack.export._dialects import lower_float, refuse_plan
from edgepack.export._packed import PACKED, check_form, hold_packed, packs_float, require_four, weights_only
from edgepack.export._tflite_integer import DIALECTS, choices, float_weights, hold_integers, lower_integers
from edgepack.export._tflite_quantized import quantize
from edgepack.export._tflite_weights import Weight
from edgepack.graph import fixed_batch

if TYPE_CHECKING:
    from edgepack.plan import Plan

MODEL = "model.tflite"


@dataclass(frozen=True, kw_only=True)
class Tflite(Exporter):
    """Write a TFLite file (model.tflite) with fixed shapes, for one sample per call.

    float16 stores weights in 16 bits behind DEQUANTIZE operators, which XNNPACK and the GPU delegates absorb.

    Attributes:
        weights: how weights of 4 bits are stored: ``packed``, two in a byte (INT4), or ``fast``, the same values in
            bytes. Left out: ``packed`` where activations are float, else ``fast``, the one such form there is. The
            operators that read packed weights are TFLite's own: XNNPACK does not take them.
    """

    format: ClassVar[str] = "tflite"

    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form(self.weights)

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        _refuse_dynamic(graph)
        graph = fixed_batch(graph)
        if self.precision == "plan":
            require_four(plan, self.weights, self.format)
        if self.precision == "plan" and plan.nodes:
            return self._held(lower_integers(graph, plan))
        refuse_plan(plan, self.format, self.precision)
        if self.precision == "float16":
            from edgepack.export._tflite_scales import fold_scales

            graph = fold_scales(graph)
        return lower_float(graph, self.precision)

    def _held(self, simulation: Graph) -> Graph:
        """The simulation of an integer file, if the engine computes it from weights as they are to be stored."""
        if self.weights == PACKED and not weights_only(simulation):
            raise Unsupported(
                "tflite: between 8-bit activations, XNNPACK does not take packed weights of 4 bits, and TFLite's own "
                "operators round otherwise than the simulation",
                "weights = 'fast', or no activation_bits in quantize",
            )
        return simulation

    def write(self, simulation: Graph, folder: Path) -> Census:
        for package in ("litert_converter", "ai_edge_litert", "flatbuffers"):
            require(package, "tflite")
        from edgepack.export._tflite_census import census
        from edgepack.export._tflite_file import finish
        from edgepack.export._tflite_form import to_tflite
        from edgepack.export._tflite_packed import packed_values
        from edgepack.export._tflite_sparse import store_sparse

        half, change = self.precision == "float16", store_sparse
        packed = packs_float(self.weights, simulation)
        form, weights = simulation, list[Weight]()
        if simulation.dialect in DIALECTS:
            form, weights = float_weights(simulation)
            change = partial(quantize, weights=weights, packed=packed)
        data = finish(to_tflite(form, keep_weights=form is not simulation or half), form, half, self.normalize, change)
        reserve(folder, len(data))
        (folder / MODEL).write_bytes(data)
        hold_integers((folder / MODEL).read_bytes(), weights)
        found = census((folder / MODEL).read_bytes(), simulation)
        left_bytes = found.weight_bytes.get("float32", 0) if half else 0
        notes = [f"{left_bytes} bytes of biases and constants stay float32"] if left_bytes else []
        notes += choices(simulation, weights)
        notes += hold_packed(packed_values((folder / MODEL).read_bytes()), simulation) if packed else []
        return replace(found, notes=(*notes, *found.notes))


def _refuse_dynamic(graph: Graph) -> None:
    for spec in graph.inputs:
        axes = [axis for axis in spec.shape if isinstance(axis, str) and axis != "batch"]
        if axes:
            raise Unsupported(
                f"input {spec.name!r} may have any {' and '.join(axes)}, but a TFLite file has fixed shapes",
                f"sizes = {{{', '.join(f'{axis} = 64' for axis in axes)}}} in this export, one per size, or use onnx",
            )
