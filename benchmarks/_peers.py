"""What the engines' own tools make of a network: the files beside which edgepack's are put.

Each tool is called as its documentation says, on the same float network and the same calibration samples.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cases import Array, Case, Fold

from edgepack.artifact import MANIFEST, Artifact, Manifest, describe_files, replacing
from edgepack.contracts import TensorSpec
from edgepack.export._tflite_form import quiet

BATCH, BATCH_LARGE = 32, 4  # images at once; of large ones few, for the tools hold all results of a batch
PERCENTILE = 99.99
SMALL = 32  # images whose histograms are made of all samples at once, which takes gigabytes for larger ones
METHODS = ("MinMax", "Percentile")
PRODUCTS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Peer:
    """One way of calling one tool.

    Attributes:
        name: in the tables.
        format: of its file.
        make: writes the file into a folder.
        packages: whose versions decide.
        suits: which networks it is for.
    """

    name: str
    format: str
    make: Callable[[Case, Fold, Path], None]
    packages: tuple[str, ...]
    suits: Callable[[Case], bool] = lambda case: True

    def artifact(self, case: Case, number: int) -> Artifact:
        """Its file for one fold, made once."""
        folder = case.folder / f"{number}-{self.name.replace(' ', '-').replace('/', '-').lower()}"
        if not (folder / MANIFEST).exists():
            with quiet(), redirect_stderr(io.StringIO()), replacing(folder) as temporary:
                self.make(case, case.folds[number], temporary)
                describe(temporary, self.format, case)
        return Artifact.open(folder)


def describe(folder: Path, format: str, case: Case) -> None:
    """A manifest for a foreign file, so that edgepack's engines run it."""
    shape: tuple[int | str, ...] = tuple(case.item.dynamic_axes.get(a, size) for a, size in enumerate(case.item.shape))
    if format == "tflite":
        dtype = _tflite_dtype(folder / "model.tflite")
        shape = (1, *shape[2:], shape[1])
        specs = TensorSpec("args_0", dtype, shape, "NHWC"), TensorSpec("output_0", dtype, (1, "classes"))
    else:
        specs = TensorSpec("input", "float32", shape, "NCHW"), TensorSpec("output", "float32", ("batch", "classes"))
    manifest = Manifest(format, folder.name, "theirs", specs[:1], specs[1:], describe_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _tflite_dtype(path: Path) -> str:
    from ai_edge_litert.interpreter import Interpreter

    return str(np.dtype(Interpreter(str(path)).get_input_details()[0]["dtype"]))


# --- the float network in the formats that the tools read ----------------------------------------------------------


def float_onnx(case: Case) -> Path:
    path = case.folder / "float.onnx"
    if not path.exists():
        axes = {axis: torch.export.Dim(name, min=1) for axis, name in case.item.dynamic_axes.items()}
        size = [2, *case.item.shape[1:]]
        torch.onnx.export(
            case.module, (torch.zeros(size),), str(path), dynamo=True, external_data=False, verbose=False,
            input_names=["input"], output_names=["output"], dynamic_shapes=(axes,),
        )  # fmt: skip
    return path


def float_tflite(case: Case) -> Path:
    import litert_torch

    path = case.folder / "float.tflite"
    if not path.exists():
        last = litert_torch.to_channel_last_io(case.module, args=[0]).eval()
        _, channels, height, width = case.item.shape
        litert_torch.convert(last, (torch.zeros(1, height, width, channels),)).export(str(path))
    return path


# --- ONNX Runtime --------------------------------------------------------------------------------------------------


class Reader:
    """Calibration samples as ``quantize_static`` reads them, a batch at a time so that memory stays bounded."""

    def __init__(self, samples: Array) -> None:
        most = BATCH if max(samples.shape[1:]) <= SMALL else BATCH_LARGE
        size = next(size for size in range(most, 0, -1) if len(samples) % size == 0)
        self.batches = np.split(samples, len(samples) // size)
        self.set_range(0, len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest: Iterator[Array] = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.rest, None)
        return None if batch is None else {"input": batch}


def onnxruntime_static(method: str, only: Sequence[str] | None, case: Case, fold: Fold, folder: Path) -> None:
    """QDQ, unsigned activations, signed weights per channel, after ``quant_pre_process``."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static, shape_inference

    prepared = case.folder / "prepared.onnx"
    if not prepared.exists():
        shape_inference.quant_pre_process(str(float_onnx(case)), str(prepared))
    reader = Reader(fold.calibration)
    extra: dict[str, Any] = {"CalibStridedMinMax": len(reader) if max(case.item.shape) <= SMALL else 1}
    if method == "Percentile":
        extra["CalibPercentile"] = PERCENTILE
    quantize_static(
        str(prepared), str(folder / "model.onnx"), reader, quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method), op_types_to_quantize=None if only is None else list(only),
        extra_options=extra,
    )  # fmt: skip


# --- OpenVINO ------------------------------------------------------------------------------------------------------


def nncf_static(kind: str | None, case: Case, fold: Fold, folder: Path) -> None:
    import nncf

    import openvino as ov

    model = ov.convert_model(str(float_onnx(case)))
    samples = nncf.Dataset(list(np.split(fold.calibration, len(fold.calibration))))
    options = {} if kind is None else {"model_type": getattr(nncf.ModelType, kind)}
    quantized = nncf.quantize(model, samples, subset_size=len(fold.calibration), **options)
    ov.save_model(quantized, str(folder / "model.xml"))


# --- TFLite --------------------------------------------------------------------------------------------------------


def ai_edge(recipe: str, case: Case, fold: Fold, folder: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer import recipe as recipes

    path = str(float_tflite(case))
    tool = quantizer.Quantizer(path, getattr(recipes, recipe)())
    found = None
    if tool.need_calibration:
        signature = next(iter(Interpreter(path).get_signature_list()))
        images = np.ascontiguousarray(np.moveaxis(fold.calibration, 1, -1))
        found = tool.calibrate({signature: [{"args_0": image[None]} for image in images]}, num_threads=1)
    tool.quantize(found).export_model(str(folder / "model.tflite"))


# --- PyTorch -------------------------------------------------------------------------------------------------------


def pt2e(case: Case, fold: Fold) -> Callable[[Array], Array]:
    """torchao's PT2E with XNNPACK's quantizer: the network with rounding in it, computed by PyTorch; not a file."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

        axes = {axis: torch.export.Dim(name, min=1) for axis, name in case.item.dynamic_axes.items()}
        example = (torch.from_numpy(fold.calibration[:2]),)
        program = torch.export.export(case.module, example, dynamic_shapes=(axes,)).module(check_guards=False)
        how = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(program, how)
        with torch.no_grad():
            for batch in torch.from_numpy(fold.calibration).split(BATCH):
                prepared(batch)
            module = convert_pt2e(prepared)

    def call(images: Array) -> Array:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(images)).numpy())

    return call


ORT, NNCF, AI_EDGE = ("onnx", "onnxruntime"), ("onnxruntime", "nncf", "openvino"), ("litert-torch", "ai-edge-quantizer")
PEERS = (
    *(Peer(f"quantize_static {method}", "onnx", partial(onnxruntime_static, method, None), ORT) for method in METHODS),
    *(Peer(f"quantize_static {method}, Conv/MatMul/Gemm only", "onnx", partial(onnxruntime_static, method, PRODUCTS),
           ORT, lambda case: case.linear) for method in METHODS),
    Peer("NNCF", "openvino", partial(nncf_static, None), NNCF, lambda case: not case.transformer),
    Peer("NNCF, transformer", "openvino", partial(nncf_static, "TRANSFORMER"), NNCF, lambda case: case.transformer),
    Peer("ai-edge-quantizer static", "tflite", partial(ai_edge, "static_wi8_ai8"), AI_EDGE),
    Peer("ai-edge-quantizer dynamic", "tflite", partial(ai_edge, "dynamic_wi8_afp32"), AI_EDGE),
)  # fmt: skip
PT2E = "torchao PT2E"
