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


KERNELS: Mapping[str, Callable[[Path], tuple[str, ...]]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
