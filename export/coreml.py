"""Core ML packages: model.mlpackage, for apps on Apple's devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgepack.artifact import reserve
from edgepack.contracts import Census, Exporter, Graph
from edgepack.export._packed import PACKED, check_form, hold_packed, require_four
from edgepack.graph import fixed_batch

if TYPE_CHECKING:
    from edgepack.plan import Plan

MODEL = "model.mlpackage"
TARGETS = ("iOS16", "iOS17", "iOS18")


@dataclass(frozen=True, kw_only=True)
class Coreml(Exporter):
    """Write one ML Program (model.mlpackage) that takes one sample at a time.

    Weights, biases and scalar constants are rounded to 16 bits, in the simulation as in the file, and operators work
    in float16, as Apple's devices compute: the Neural Engine has no float32. What a plan of ``quantize`` holds are
    bytes instead: int8 weights, one 16-bit scale per output channel, and activations that are rounded to 8 bits where
    such an operator, or a sum of two of their results, reads them (iOS17 or later). An operator with a constant that
    16 bits cannot hold (a mask of huge numbers, 1/255) stays float32 in the file, and the census says how many do. So
    the file's constants equal the simulation's bit for bit, and the parity proof, which computes both in float32,
    checks all of them; how Apple's engines round results is not part of it.

    With ``normalize``, image inputs of the package are Core ML images (what a camera or Vision gives: 8 bits, RGB or
    gray), and the normalization is part of the network. The artifact's own interface stays uint8 (1, H, W, C). Labels
    lie as JSON in the user-defined metadata ``edgepack.labels``; outputs stay plain arrays.

    Core ML allows letters, digits and underscores in the names of inputs and outputs; other characters become ``_``.
    Inputs and outputs are in the manifest's order.

    A dynamic height or width stays dynamic, from what the network takes up to ``largest``.

    Attributes:
        largest: upper bound of dynamic axes; Core ML plans memory for it.
        target: oldest system that runs the package, ``iOS16`` to ``iOS18`` (macOS 13 to 15).
        precision: ``plan`` (default): bytes where the plan has them, float16 elsewhere; ``float16`` or ``float32``
            whatever the plan says.
        activations: ``plan``, or ``float`` to take only the weights' bytes from a plan.
        weights: how weights of 4 bits are stored: ``packed``, two in a byte (int4, which iOS18 is the first to read),
            or ``fast``, the same values in bytes, for the systems before. Left out, ``target`` decides.
    """

    format: ClassVar[str] = "coreml"

    target: str = "iOS17"
    activations: str = "plan"
    largest: int = 4096
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in TARGETS:
            raise ValueError(f"target is one of {', '.join(TARGETS)}, not {self.target!r}")
        if self.activations not in ("plan", "float"):
            raise ValueError(f"activations is 'plan' or 'float', not {self.activations!r}")
        if self.largest < 1:
            raise ValueError(f"largest is at least 1, not {self.largest}")
        check_form(self.weights)
        if self.weights is not None and (self.weights == PACKED) != self._packed:
            raise ValueError(
                f"weights = {self.weights!r} is for {'iOS18' if self.weights == PACKED else 'iOS17 or older'}"
                f", and target is {self.target!r}"
            )

    @property
    def _packed(self) -> bool:
        """Whether weights of 4 bits are stored in 4 bits; coremltools does so wherever the target can read them."""
        return self.target == "iOS18"

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        from edgepack.export._coreml_half import on_half_grid, round_constants
        from edgepack.export._coreml_integer import simulated

        fixed = fixed_batch(graph)
        if self.precision == "float32":
            return fixed
        if self.precision == "plan":
            require_four(plan, self.weights, self.format)
        if self.precision == "float16" or not plan.nodes:
            return replace(on_half_grid(fixed), dialect="float16")
        simulation = simulated(fixed, plan, self.activations == "float", self.target)
        return replace(round_constants(simulation), dialect=simulation.dialect)

    def write(self, simulation: Graph, folder: Path) -> Census:
        from edgepack.export._coreml_census import census, packed_values, read
        from edgepack.export._coreml_form import convert
        from edgepack.export._coreml_integer import hold_integers
        from edgepack.export._coreml_package import finish
        from edgepack.export._coreml_tables import hold_tables

        package, half = folder / MODEL, simulation.dialect != "float32"
        weights = simulation.program.state_dict.values()
        reserve(folder, sum(weight.numel() * min(weight.element_size(), 2 if half else 4) for weight in weights))
        convert(simulation, package, self.target, half)
        finish(package, simulation, self.largest, describe=self.normalize)
        function = read(package)
        hold_integers(function, simulation)
        found, notes = census(function, half), hold_tables(function, simulation)
        if self._packed:
            notes += hold_packed(packed_values(function), simulation, integers_too=True)
        return replace(found, notes=(*found.notes, *notes))
