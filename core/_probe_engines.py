"""Which kernels an engine chose for a model, in its own words."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from edgepack.errors import require

MOVES = ("Parameter", "Input", "Output", "Result", "Constant", "Const", "Reorder", "ReorderInput", "ReorderOutput")


def _onnxruntime(path: Path) -> tuple[str, ...]:
    """Operators of the graph that ONNX Runtime has optimized."""
    import onnx

    ort = require("onnxruntime", "onnx-run")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    return tuple(node.op_type for node in model.graph.node if node.op_type not in MOVES)


def _openvino(path: Path) -> tuple[str, ...]:
    """Layers of the compiled model with the precision each runs in."""
    ov = require("openvino", "openvino-run")
    compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    layers = [(fact["layerType"].astype(str), fact["runtimePrecision"].astype(str)) for fact in facts]
    return tuple(f"{layer} {precision}" for layer, precision in layers if layer not in MOVES)


def _tflite(path: Path) -> tuple[str, ...]:
    """``XNNPACK`` for each part that it takes, then TFLite's own operators where it takes nothing."""
    litert = require("ai_edge_litert.interpreter", "tflite-run")
    interpreter = litert.Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    names = [str(node["op_name"]) for node in interpreter._get_ops_details()]
    parts = names.count("DELEGATE")
    return ("XNNPACK",) * parts if parts else tuple(name for name in names if name != "QUANTIZE")


def _coreml(path: Path) -> tuple[str, ...]:
    """Operators of the program; which kernels a Mac takes, only a Mac tells."""
    proto = require("coremltools.proto.Model_pb2", "coreml-run")
    model = proto.Model()
    model.ParseFromString(path.read_bytes())
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    return tuple(operation.type for operation in block.operations if operation.type != "const")


KERNELS: Mapping[str, Callable[[Path], tuple[str, ...]]] = {
    "onnxruntime": _onnxruntime, "openvino": _openvino, "tflite": _tflite, "coreml": _coreml,
}  # fmt: skip
