"""TensorRT: an ONNX file in the form its parser takes, and the settings to build an engine with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgepack.contracts import Census, Exporter, Graph, TensorSpec
from edgepack.errors import Unsupported, nearest
from edgepack.export._dialects import lower_float
from edgepack.export._onnx_census import census
from edgepack.export._onnx_form import to_onnx

if TYPE_CHECKING:
    from edgepack.plan import Plan

MODEL = "model.onnx"
SETTINGS = "tensorrt.json"
OPSET = 20  # the newest that every TensorRT 10 parser reads
VERSIONS = ">=10.9,<12"
COMPUTE = ("float32", "tf32", "float16")

Range = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Tensorrt(Exporter):
    """Write ONNX in the form TensorRT takes (model.onnx) and the settings of its engine (tensorrt.json).

    The file itself computes in float32 whatever ``compute`` says, so any ONNX engine can prove its numbers. The
    engine is built where it runs, as a strongly typed network: its types come from ``compute`` alone, nothing is left
    to the builder. ``precision = "float16"`` stores weights in 16 bits, as in every format, and makes float16 the
    usual ``compute``.

    What a plan of ``quantize`` holds is quantized explicitly: signed symmetric bytes, int8 weights with a scale per
    output channel, QuantizeLinear and DequantizeLinear where TensorRT makes one integer kernel of what lies between.
    ``compute`` is then the format of all the rest, and with ``float16`` scales and biases are 16-bit numbers.

    Attributes:
        compute: number format of the engine: ``float32``, ``tf32`` (float32 with products of 10-bit mantissas) or
            ``float16``; default float16 with ``precision = "float16"``, else float32.
        batch: smallest, usual and largest batch of one call. The engine is tuned for the usual one.
        axes: smallest, usual and largest size of every other dynamic axis, by name.
        workspace_mb: memory the engine may use for intermediate results in MiB; None for all the GPU has.
    """

    format: ClassVar[str] = "tensorrt"

    compute: str | None = None
    batch: Range = (1, 1, 64)
    axes: Mapping[str, Range] = field(default_factory=dict)
    workspace_mb: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute not in (None, *COMPUTE):
            raise ValueError(f"compute is one of {', '.join(COMPUTE)}, not {self.compute!r}")
        object.__setattr__(self, "batch", _range("batch", self.batch))
        object.__setattr__(self, "axes", {name: _range(f"axes.{name}", sizes) for name, sizes in self.axes.items()})
        if "batch" in self.axes:
            raise ValueError("the sizes of the axis 'batch' go into the option batch")
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise ValueError(f"workspace_mb is at least 1, not {self.workspace_mb}")

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        if self.precision == "plan" and plan.nodes:
            from edgepack.export._coreml_half import round_constants
            from edgepack.export._tensorrt_integer import simulated

            simulation = simulated(graph, plan)
            if self.compute != "float16":
                return simulation
            return replace(round_constants(simulation), dialect=simulation.dialect)
        return lower_float(graph, self.precision)

    def write(self, simulation: Graph, folder: Path) -> Census:
        from edgepack.export import _tensorrt_form as form
        from edgepack.export._onnx_integer import hold_integers
        from edgepack.export._tensorrt_sparse import sparse_weights

        settings = self._settings(simulation.inputs)
        notes = form.write(to_onnx(simulation, OPSET), folder / MODEL, self.precision == "float16")
        hold_integers(folder / MODEL, simulation)
        fitting, weights = sparse_weights(folder / MODEL)
        settings["sparse_weights"] = fitting > 0
        if fitting:
            notes = [*notes, f"{fitting} of {weights} weights hold 2:4; TensorRT may use sparse tensor cores for them"]
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return census(folder / MODEL, notes)

    def _settings(self, inputs: Sequence[TensorSpec]) -> dict[str, Any]:
        return {
            "schema": 1,
            "tensorrt": VERSIONS,
            "compute": self.compute or ("float16" if self.precision == "float16" else "float32"),
            "strongly_typed": True,
            "workspace_mb": self.workspace_mb,
            "profiles": self._profiles(inputs),
            "engine_key": ["model", "settings", "gpu", "compute_capability", "tensorrt"],
            "timing_cache_key": ["gpu", "compute_capability", "tensorrt"],
        }

    def _profiles(self, inputs: Sequence[TensorSpec]) -> dict[str, dict[str, list[int]]]:
        """Smallest, usual and largest shape of each input that has a dynamic axis."""
        dynamic = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
        for name in self.axes:
            if name not in dynamic:
                raise Unsupported(
                    f"tensorrt: no input has a dynamic axis {name!r}", nearest(name, dynamic or {"batch"})
                )
        return {
            spec.name: dict(zip(("min", "opt", "max"), self._shapes(spec), strict=True))
            for spec in inputs
            if any(isinstance(axis, str) for axis in spec.shape)
        }

    def _shapes(self, spec: TensorSpec) -> list[list[int]]:
        ranges = {"batch": self.batch, **self.axes}
        for axis in spec.shape:
            if isinstance(axis, str) and axis not in ranges:
                raise Unsupported(
                    f"tensorrt needs the sizes of the dynamic axis {axis!r} of input {spec.name!r}",
                    f"axes = {{ {axis} = [smallest, usual, largest] }}",
                )
        return [[axis if isinstance(axis, int) else ranges[axis][i] for axis in spec.shape] for i in range(3)]


def _range(name: str, sizes: Sequence[int]) -> Range:
    numbers = tuple(sizes)
    if len(numbers) != 3 or any(not isinstance(n, int) or isinstance(n, bool) for n in numbers):
        raise ValueError(f"{name} is three whole numbers (smallest, usual, largest), not {sizes!r}")
    if not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise ValueError(f"{name} must rise from smallest to largest and start at 1 or more, not {list(numbers)}")
    return numbers
