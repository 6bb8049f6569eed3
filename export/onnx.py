"""ONNX files for ONNX Runtime and every engine that reads them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgepack.contracts import Census, Exporter, Graph
from edgepack.errors import nearest
from edgepack.export._dialects import lower_float
from edgepack.export._narrow import clipping, has_narrow
from edgepack.export._onnx_bits import use_binary
from edgepack.export._onnx_census import census
from edgepack.export._onnx_form import LIMIT_BYTES, to_onnx
from edgepack.export._onnx_integer import TARGETS, fused, here, hold_integers, name_pools
from edgepack.export._onnx_packed import OPSET as PACKED_OPSET
from edgepack.export._onnx_packed import pack, packed_values
from edgepack.export._onnx_products import translations, use_casts, use_integer_products
from edgepack.export._onnx_slim import slim, store_half
from edgepack.export._packed import check_form, hold_packed, packs, planned, require_four
from edgepack.export._qdq import quantized, transposed

if TYPE_CHECKING:
    import onnx
    from edgepack.plan import Plan

MODEL = "model.onnx"
OPSETS = range(18, 24)
BINARY = ("float", "packed")


@dataclass(frozen=True, kw_only=True)
class Onnx(Exporter):
    """Write one small ONNX file (model.onnx): weights inside, names and notes stripped.

    Attributes:
        opset: operator set of the file, 18 to 23.
        target: processors that integer files are for: ``x86`` (unsigned activations) or ``arm`` (signed ones, which
            64-bit ARM multiplies faster). Either kind runs on both.
        weights: how weights of 4 bits are stored. ``packed``, the default but for ranges found at run time: two in a
            byte (INT4, which needs operator set 21, so an older ``opset`` is raised). ONNX Runtime makes bytes of them
            when it loads the file, and then runs the same operators as with ``fast``: the same values in bytes, for
            engines without INT4.
        binary: how layers of ±1 are written: ``float``, ordinary operators that compute the same whole numbers
            anywhere, or ``packed``, edgepack's own operator with a bit per weight, computed by XNOR and popcount. Such
            a file loads in edgepack's ONNX Runtime engine, which compiles the operator with the system's C compiler.
    """

    format: ClassVar[str] = "onnx"

    opset: int = 20
    target: str = "x86"
    weights: str | None = None
    binary: str = "float"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opset not in OPSETS:
            raise ValueError(f"opset is {OPSETS[0]} to {OPSETS[-1]}, not {self.opset}")
        if self.target not in TARGETS:
            raise ValueError(f"target is 'x86' or 'arm', not {self.target!r}")
        if self.binary not in BINARY:
            raise ValueError(
                f"binary is one of {', '.join(BINARY)}, not {self.binary!r}; {nearest(self.binary, BINARY)}"
            )
        check_form(self.weights)

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        if self.precision == "plan":
            require_four(plan, self.weights, self.format)
        if self.precision == "plan" and plan.nodes:
            return quantized(graph, plan, here(self.target)[0])
        return lower_float(graph, self.precision)

    def write(self, simulation: Graph, folder: Path) -> Census:
        model = self._model(simulation)
        integers = simulation.dialect in TARGETS[self.target].forms.values()
        notes = [] if integers else self._bits(model)
        left_bytes = store_half(model.graph) if self.precision == "float16" else 0
        if simulation.dialect == TARGETS[self.target].name:
            name_pools(model.graph)
        self._store(model, simulation, folder / MODEL)
        notes += [f"{left_bytes} bytes of biases and constants stay float32"] if left_bytes else []
        if integers:
            hold_integers(folder / MODEL, simulation)
            notes += [*fused(folder / MODEL, simulation), *here(self.target)[1], *transposed(simulation)]
            if packs(self.weights, simulation):
                notes += hold_packed(packed_values(folder / MODEL), simulation, integers_too=True)
            notes += self._bits(model)  # the engine counted fused operators in a file without ours
            self._store(model, simulation, folder / MODEL)
        return census(folder / MODEL, notes)

    def _bits(self, model: onnx.ModelProto) -> list[str]:
        return use_binary(model) if self.binary == "packed" else []

    def _store(self, model: onnx.ModelProto, simulation: Graph, path: Path) -> None:
        slim(model)
        if self.normalize:
            _describe(model, simulation)
        path.write_bytes(_checked(model))

    def _model(self, simulation: Graph) -> onnx.ModelProto:
        forms = TARGETS[self.target].forms
        packed = simulation.dialect in forms.values() and packs(self.weights, simulation) and bool(planned(simulation))
        opset = max(self.opset, PACKED_OPSET) if packed else self.opset
        words = (
            translations() if simulation.dialect == forms["dynamic"] else clipping() if has_narrow(simulation) else {}
        )
        model = to_onnx(simulation, opset, words)
        if simulation.dialect == forms["dynamic"]:
            use_integer_products(model)
        if simulation.dialect != forms["static"] and simulation.dialect in forms.values():
            use_casts(model)
        if packed:
            pack(model)
        return model


def _describe(model: onnx.ModelProto, graph: Graph) -> None:
    facts = {
        "edgepack.labels": list(graph.labels),
        "edgepack.preprocessing": {name: asdict(how) for name, how in graph.preprocessing.items()},
    }
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))


def _checked(model: onnx.ModelProto) -> bytes:
    from onnx import checker

    if model.ByteSize() > LIMIT_BYTES:
        raise AssertionError("size was checked before the conversion")
    data: bytes = model.SerializeToString(deterministic=True)
    checker.check_model(data, full_check=True)
    return data
