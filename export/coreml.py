"""Core ML packages: model.mlpackage, for apps on Apple's devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgepack.artifact import reserve
from edgepack.contracts import Census, Exporter, Graph
from edgepack.export._dialects import refuse_plan
from edgepack.graph import fixed_batch

if TYPE_CHECKING:
    from edgepack.plan import Plan

MODEL = "model.mlpackage"
TARGETS = ("iOS16", "iOS17", "iOS18")


@dataclass(frozen=True, kw_only=True)
class Coreml(Exporter):
    """Write one ML Program (model.mlpackage) that takes one sample at a time.

    With ``precision`` ``float16``, as Apple's devices compute: weights, biases and scalar constants are rounded to 16
    bits, in the simulation as in the file, and operators work in float16. An operator with a constant that 16 bits
    cannot hold (a mask of huge numbers, 1/255) stays float32 in the file, and the census says how many do. So the
    file's constants equal the simulation's bit for bit, and the parity proof, which computes both in float32, checks
    all of them; how Apple's engines round results is not part of it. With ``float32`` and ``plan``, weights and
    arithmetic are float32.

    With ``normalize``, image inputs of the package are Core ML images (what a camera or Vision gives: 8 bits, RGB or
    gray), and the normalization is part of the network. The artifact's own interface stays uint8 (1, H, W, C). Labels
    lie as JSON in the user-defined metadata ``edgepack.labels``; outputs stay plain arrays.

    Core ML allows letters, digits and underscores in the names of inputs and outputs; other characters become ``_``.
    Inputs and outputs are in the manifest's order.

    A dynamic height or width stays dynamic, from what the network takes up to ``largest``.

    Attributes:
        largest: upper bound of dynamic axes; Core ML plans memory for it.
        target: oldest system that runs the package, ``iOS16`` to ``iOS18`` (macOS 13 to 15).
        precision: ``float16`` (default), ``float32`` or ``plan``.
    """

    format: ClassVar[str] = "coreml"

    precision: str = "float16"
    target: str = "iOS17"
    largest: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in TARGETS:
            raise ValueError(f"target is one of {', '.join(TARGETS)}, not {self.target!r}")
        if self.largest < 1:
            raise ValueError(f"largest is at least 1, not {self.largest}")

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        from edgepack.export._coreml_half import on_half_grid

        refuse_plan(plan, self.format, self.precision)
        fixed = fixed_batch(graph)
        return on_half_grid(fixed) if self.precision == "float16" else fixed

    def write(self, simulation: Graph, folder: Path) -> Census:
        from edgepack.export._coreml_census import census
        from edgepack.export._coreml_form import convert
        from edgepack.export._coreml_package import finish

        package = folder / MODEL
        weights = simulation.program.state_dict.values()
        reserve(folder, sum(weight.numel() * (2 if self.precision == "float16" else 4) for weight in weights))
        convert(simulation, package, self.target, self.precision == "float16")
        finish(package, simulation, self.largest, describe=self.normalize)
        return census(package, self.precision == "float16")
