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
    """

    format: ClassVar[str] = "tflite"

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        _refuse_dynamic(graph)
        graph = fixed_batch(graph)
        if self.precision == "plan" and plan.nodes:
            return lower_integers(graph, plan)
        refuse_plan(plan, self.format, self.precision)
        if self.precision == "float16":
            from edgepack.export._tflite_scales import fold_scales

            graph = fold_scales(graph)
        return lower_float(graph, self.precision)

    def write(self, simulation: Graph, folder: Path) -> Census:
        for package in ("litert_converter", "ai_edge_litert", "flatbuffers"):
            require(package, "tflite")
        from edgepack.export._tflite_census import census
        from edgepack.export._tflite_file import finish
        from edgepack.export._tflite_form import to_tflite

        half, change = self.precision == "float16", None
        form, weights = simulation, list[Weight]()
        if simulation.dialect in DIALECTS:
            form, weights = float_weights(simulation)
            change = partial(quantize, weights=weights)
        data = finish(to_tflite(form, keep_weights=form is not simulation or half), form, half, self.normalize, change)
        reserve(folder, len(data))
        (folder / MODEL).write_bytes(data)
        hold_integers((folder / MODEL).read_bytes(), weights)
        found = census((folder / MODEL).read_bytes(), simulation)
        left_bytes = found.weight_bytes.get("float32", 0) if half else 0
        notes = [f"{left_bytes} bytes of biases and constants stay float32"] if left_bytes else []
        notes += choices(simulation, weights)
        return replace(found, notes=(*notes, *found.notes))


def _refuse_dynamic(graph: Graph) -> None:
    for spec in graph.inputs:
        axes = [axis for axis in spec.shape if isinstance(axis, str) and axis != "batch"]
        if axes:
            raise Unsupported(
                f"input {spec.name!r} may have any {' and '.join(axes)}, but a TFLite file has fixed shapes",
                f"sizes = {{{', '.join(f'{axis} = 64' for axis in axes)}}} in this export, one per size, or use onnx",
            )
