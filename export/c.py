"""A whole network as dependency-free C."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgepack.contracts import Census, Exporter, Graph
from edgepack.errors import Unsupported, nearest
from edgepack.export._dialects import lower_float
from edgepack.graph import fixed_batch

if TYPE_CHECKING:
    from edgepack.plan import Plan

DEFAULT_PREFIX = "model"
BINARY = ("auto", "xnor", "tree")
EXACT = (
    "quantize",
    "dequantize",
    "copy",
    "fill",
    "border",
    "cast",
)  # beside integers: kernels that give one answer everywhere
FLOAT_TOLERANCE = 1e-4  # of the self-test, times the largest answer


@dataclass(frozen=True, kw_only=True)
class C(Exporter):
    """Write C99 without dependencies: one function, no allocation, weights as constants, a self-test.

    ``cc *.c -lm`` in the folder gives the self-test; compile with -O3. Fixed shapes, one sample per call.

    Attributes:
        prefix: of every visible name, default ``model``.
        binary: how layers of ±1 are computed whose results are bits: ``xnor`` (every output by itself), ``tree`` (as
            differences along the spanning tree of the outputs), or ``auto``, the faster of the two.
    """

    format: ClassVar[str] = "c"

    prefix: str = ""
    binary: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.binary not in BINARY:
            raise ValueError(
                f"binary is one of {', '.join(BINARY)}, not {self.binary!r}; {nearest(self.binary, BINARY)}"
            )

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        _refuse_dynamic(graph)
        if self.precision == "float16":
            raise Unsupported("the C target has no float16", "precision = 'float32', or quantize to 8 bits")
        if self.precision == "plan" and plan.nodes:
            from edgepack.export._c_integer import lower_integers

            return lower_integers(fixed_batch(graph), plan)
        return lower_float(fixed_batch(graph), self.precision)

    def write(self, simulation: Graph, folder: Path) -> Census:
        from edgepack.export import _c_arena, _c_files, _c_planes
        from edgepack.export._c_bits_choose import choose
        from edgepack.export._c_fuse import fuse
        from edgepack.export._c_read import read
        from edgepack.export._c_samples import samples

        network = read(simulation)
        _c_planes.arrange(network)
        fuse(network)
        choose(network, self.binary)
        inputs, answers = samples(simulation, folder)
        arena_bytes = _c_arena.plan(network)
        prefix = _c_files.sanitized(self.prefix or DEFAULT_PREFIX)
        exact = all(step.kernel.endswith("s8") or step.kernel in EXACT for step in network.steps)
        form = _c_files.Form(prefix, arena_bytes, inputs, answers, 0.0 if exact else FLOAT_TOLERANCE)
        constants = _c_files.write(network, folder, form)
        stored: Counter[str] = Counter()
        for array in constants:
            stored[str(array.dtype)] += array.nbytes
        text_bytes = sum(path.stat().st_size for path in folder.glob("*.[ch]"))
        notes = (
            f"arena of {arena_bytes} bytes",
            f"{sum(stored.values())} bytes of constants once compiled, from {text_bytes} bytes of text",
            *_c_planes.notes(network),
        )
        return Census(dict(Counter(step.kernel for step in network.steps)), dict(stored), notes)


def _refuse_dynamic(graph: Graph) -> None:
    for spec in graph.inputs:
        axes = [axis for axis in spec.shape if isinstance(axis, str) and axis != "batch"]
        if axes:
            raise Unsupported(
                f"input {spec.name!r} may have any {' and '.join(axes)}, but memory in C is planned for fixed shapes",
                f"give a fixed {' and '.join(axes)} in task.input and take it out of dynamic, or export to onnx",
            )
