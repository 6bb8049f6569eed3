"""OpenVINO's format: model.xml and model.bin."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgepack import contents
from edgepack.artifact import reserve
from edgepack.contracts import Census, Exporter, Graph
from edgepack.errors import Unsupported, require
from edgepack.export._dialects import exact_half, lower_float
from edgepack.export._narrow import narrow
from edgepack.export._onnx_form import to_onnx
from edgepack.export._openvino_dynamic import describe, require_rounding, simulated, unrounded
from edgepack.export._openvino_integer import OPENVINO, drop_zeros, hold_integers, set_group
from edgepack.export._openvino_packed import pack, packed_values, regroup, values
from edgepack.export._openvino_slim import slim
from edgepack.export._packed import check_form, hold_packed, packs_float, require_four
from edgepack.export._qdq import transposed

if TYPE_CHECKING:
    from edgepack.plan import Plan

MODEL = "model.xml"
# OpenVINO's converter multiplies constant factors (layer scale …) into weights, which moves them off the 16-bit
# grid; above this share of float32 bytes the graph is taken as it is. The engine fuses the same when it loads it.
FUSED_SHARE = 0.05
BYTES_PER_NODE = 2048  # of XML; real files take about half
OPSET = 20
REPORTING = ("convert_impl", "telemetry_utils", "utils")  # modules of the converter that report
# Kept whole by ONNX and unrolled step by step by OpenVINO's own reader of PyTorch programs.
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True, kw_only=True)
class Openvino(Exporter):
    """Write OpenVINO's intermediate representation (model.xml, model.bin).

    Where a plan has linear layers round at run time, the CPU engine does that by itself, in groups of a row's values
    whose size the file names; convolutions then read ranges from calibration.

    Attributes:
        weights: how weights of 4 bits are stored: ``packed``, two in a byte (i4), or ``fast``, the same values in bytes
            (i8). Left out: ``packed`` where activations are float, else ``fast``: the CPU engine computes layers with
            packed weights in float.
    """

    format: ClassVar[str] = "openvino"

    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form(self.weights)

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        if self.precision == "plan":
            require_four(plan, self.weights, self.format)
        if self.precision == "plan" and plan.nodes:
            return simulated(graph, plan, OPENVINO)
        return lower_float(graph, self.precision)

    def write(self, simulation: Graph, folder: Path) -> Census:
        ov = require("openvino", "openvino")
        stored, group = simulation, 0
        if simulation.dialect == OPENVINO.forms["dynamic"]:
            require_rounding(ov)
            stored, group = unrounded(simulation)
        model = _convert(ov, stored)
        if self.precision == "float16" and _store_half(ov, model) > FUSED_SHARE * _weight_bytes(model):
            model = _convert(ov, simulation, fuse=False)
            _store_half(ov, model)
        integers = simulation.dialect in OPENVINO.forms.values()
        packed = integers and packs_float(self.weights, simulation)
        if integers:
            drop_zeros(model)
            regroup(ov, model)
            narrow(ov, model, simulation)
        if packed:
            pack(ov, model)
        if packed or simulation.dialect in (OPENVINO.forms["float"], OPENVINO.forms["dynamic"]):
            set_group(model, group)
        _name(ov, model, simulation)
        if self.normalize:
            _describe(model, simulation)
        # OpenVINO reports a full disk as an error of its own, or not at all.
        reserve(folder, _weight_bytes(model) + BYTES_PER_NODE * len(model.get_ops()))
        ov.save_model(model, folder / MODEL, compress_to_fp16=False)
        slim(folder / MODEL, {spec.name for spec in (*simulation.inputs, *simulation.outputs)})
        notes = [*hold_integers(ov, folder / MODEL, simulation), *transposed(simulation)] if integers else []
        if packed:
            notes += hold_packed(packed_values(ov, folder / MODEL), simulation)
        if group:
            notes += describe(simulation, group)
        return _census(ov, folder / MODEL, notes)


def _convert(ov: Any, graph: Graph, fuse: bool = True) -> Any:
    try:
        with warnings.catch_warnings(), _quiet_root(), _unreported():
            warnings.simplefilter("ignore")
            if graph.dialect in OPENVINO.forms.values():
                # Its reader of ONNX makes FakeQuantize of the pairs, that of PyTorch programs does not.
                return ov.convert_model(io.BytesIO(to_onnx(graph, OPSET).SerializeToString()))
            if _recurrent(graph):
                return ov.Core().read_model(to_onnx(graph, OPSET).SerializeToString())
            return ov.convert_model(graph.program) if fuse else _convert_only(graph)
    except (RuntimeError, ov.frontend.OpConversionFailure) as error:
        raise Unsupported(_reason(error), "export to another format, or replace the operator") from error


def _convert_only(graph: Graph) -> Any:
    """What ``openvino.convert_model`` does first, without the rewriting that follows."""
    reader = require("openvino.frontend.pytorch.fx_decoder", "openvino").TorchFXPythonDecoder
    frontend = require("openvino.frontend", "openvino").FrontEndManager().load_by_framework("pytorch")
    decoder = reader.from_exported_program(graph.program)  # must outlive the conversion
    return frontend.convert(frontend.load(decoder))


@contextmanager
def _quiet_root() -> Iterator[None]:
    """OpenVINO's reader logs operators it need not look for to the root logger, which would also set that up."""
    root, silence = logging.getLogger(), logging.NullHandler()

    def drop(record: logging.LogRecord) -> bool:
        return False

    root.addHandler(silence)
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(silence)


@contextmanager
def _unreported() -> Iterator[None]:
    """OpenVINO's converter reports each use to its maker, unasked, from a process that it forks: not here."""
    nobody = require("openvino.tools.ovc.telemetry_stub", "openvino")
    modules: list[Any] = [require(f"openvino.tools.ovc.{name}", "openvino") for name in REPORTING]
    reporters = [module.tm for module in modules]
    for module in modules:
        module.tm = nobody
    try:
        yield
    finally:
        for module, reporter in zip(modules, reporters, strict=True):
            module.tm = reporter


def _recurrent(graph: Graph) -> bool:
    targets = (str(node.target) for node in graph.program.graph.nodes if node.op == "call_function")
    return any(target.removeprefix("aten.").partition(".")[0] in RECURRENT for target in targets)


def _reason(error: BaseException) -> str:
    names = re.findall(r"No conversion rule found for operations: ([^\n]+)", str(error))
    if names:
        return f"operator {', '.join(name.strip() for name in names)} has no OpenVINO form"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return f"OpenVINO cannot convert the network: {lines[-1] if lines else type(error).__name__}"


def _name(ov: Any, model: Any, graph: Graph) -> None:
    """Give inputs and outputs the graph's names, shapes and layouts, in the graph's order."""
    for port, spec in zip(model.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({spec.name})
        port.get_node().set_friendly_name(spec.name)
        if spec.layout is not None:
            port.get_node().set_layout(ov.Layout(spec.layout))
    for port, spec in zip(model.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({spec.name})
        port.get_node().set_friendly_name(f"{spec.name}/result")
    shapes = [[axis if isinstance(axis, int) else -1 for axis in spec.shape] for spec in graph.inputs]
    model.reshape({port: ov.PartialShape(shape) for port, shape in zip(model.inputs, shapes, strict=True)})


def _store_half(ov: Any, model: Any) -> int:
    """Store weights that lie on the 16-bit grid as float16, with a conversion to float32 behind them.

    Returns the bytes that stay float32.
    """
    left_bytes = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        half = exact_half(node.data)
        if half is None:
            left_bytes += node.get_byte_size()
            continue
        users = list(node.output(0).get_target_inputs())
        wide = ov.opset1.convert(ov.op.Constant(half), "f32")
        for user in users:
            user.replace_source_output(wide.output(0))
    return left_bytes


def _weight_bytes(model: Any) -> int:
    return sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")


def _describe(model: Any, graph: Graph) -> None:
    model.set_rt_info(json.dumps(list(graph.labels), ensure_ascii=False), ["edgepack", "labels"])
    left = {name: asdict(how) for name, how in graph.preprocessing.items()}
    model.set_rt_info(json.dumps(left, ensure_ascii=False), ["edgepack", "preprocessing"])


def _census(ov: Any, path: Path, found: Sequence[str] = ()) -> Census:
    model = ov.Core().read_model(path)
    operators = Counter(node.get_type_name() for node in model.get_ops())
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    weights: Counter[str] = Counter()
    for node in constants:
        kind = node.get_element_type()
        weights["int4" if kind == ov.Type.i4 else kind.to_dtype().name] += node.get_byte_size()
    left = operators["BatchNormInference"]
    notes = tuple(found)
    if left:
        notes += (f"{left} BatchNormInference nodes are left; the pass fold may help",)
    keys = (contents.key(values(node)) for node in constants)
    return Census(dict(operators), dict(weights), notes, tuple(filter(None, keys)))
