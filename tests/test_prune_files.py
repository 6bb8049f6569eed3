"""Pruned networks from files and as files: their parameters fall, alone and between other passes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("torch_pruning", reason="pip install 'edgepack[prune]'")
from _pruning import ITEM, ONE, TASK, data, gap, net, prune  # noqa: E402
from edgepack import models  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.prune import Prune  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Exporter, Pass  # noqa: E402
from edgepack.exporting import export  # noqa: E402
from edgepack.parts import find  # noqa: E402
from edgepack.profiling import write_module  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.recipe import build  # noqa: E402
from edgepack.task import Task  # noqa: E402


def numbers_in(file: Path) -> int:
    """Of all constants of an ONNX file."""
    onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
    return sum(math.prod(item.dims) for item in onnx.load(file).graph.initializer)


def test_parameters_in_the_file_fall(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'edgepack[onnx]'")
    found, run = prune(net(), tmp_path, TASK, size_ratio=0.5)
    write_module(found, TASK, tmp_path / "out", "onnx")
    assert numbers_in(tmp_path / "out" / "model.onnx") <= 0.51 * run.findings["channels"]["parameters"][0]


def residual_onnx(path: Path) -> None:
    """A stem, a block with a shortcut, a classifier, as another tool would write them."""
    pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
    from _lifting import N, write

    random = np.random.default_rng(0)
    sizes = {"stem": (16, 3, 3, 3), "wide": (32, 16, 3, 3), "thin": (16, 32, 1, 1), "head": (5, 16)}
    constants = {name: random.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    constants |= {f"{name}.bias": random.normal(0, 0.3, size[0]).astype(np.float32) for name, size in sizes.items()}
    nodes = [
        N("Conv", ["x", "stem", "stem.bias"], ["a"], pads=[1, 1, 1, 1]), N("Relu", ["a"], ["b"]),
        N("Conv", ["b", "wide", "wide.bias"], ["c"], pads=[1, 1, 1, 1]), N("Relu", ["c"], ["d"]),
        N("Conv", ["d", "thin", "thin.bias"], ["e"]), N("Add", ["b", "e"], ["f"]),
        N("GlobalAveragePool", ["f"], ["g"]), N("Flatten", ["g"], ["h"]),
        N("Gemm", ["h", "head", "head.bias"], ["y"], transB=1),
    ]  # fmt: skip
    write(path, nodes, {"x": ("batch", 3, 12, 12)}, constants)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # of PyTorch's own copies
@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_networks_from_files_are_pruned_alike(tmp_path: Path, name: str) -> None:
    if name == "net.onnx":
        residual_onnx(tmp_path / name)
    else:
        axes = {"x": {0: torch.export.Dim.DYNAMIC}}
        torch.export.save(torch.export.export(net(), (ONE.repeat(2, 1, 1, 1),), dynamic_shapes=axes), tmp_path / name)
    module = models.load(name, tmp_path)
    found, run = prune(module, tmp_path, TASK, macs_ratio=0.6)
    before, after = run.findings["channels"]["macs"]
    assert 0.4 * before < after <= 0.6 * before
    assert gap(module, found, run, TASK) <= 1e-5
    assert {row["layer"] for row in run.findings["channels"]["layers"]} >= {"stem", "wide"}


@pytest.mark.slow
def test_between_fold_and_quantize_down_to_the_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'edgepack[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
    task = Task((ITEM,), calibration=data(16))
    fold, quantize = build(Pass, {"use": "fold"}), build(Pass, {"use": "quantize", "explain": False})
    compress(net(), task, [fold, quantize], tmp_path / "dense", Silent())
    found = compress(net(), task, [fold, Prune(targets=(), size_ratio=0.5), quantize], tmp_path / "pruned", Silent())
    history = found.manifest.history
    assert [entry["part"] for entry in history] == ["fold", "prune", "quantize"]
    assert history[1]["after"]["values"] <= 0.5 * history[1]["before"]["values"]
    for name in ("dense", "pruned"):
        export(tmp_path / name, [find(Exporter, "onnx")()], Silent())  # checked against its simulation
    sizes = [numbers_in(tmp_path / name / "onnx" / "model.onnx") for name in ("dense", "pruned")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "tflite"])
def test_other_files_become_smaller_too(tmp_path: Path, format: str) -> None:
    for package in {"openvino": ("openvino",), "tflite": ("litert_torch", "ai_edge_litert")}[format]:
        pytest.importorskip(package, reason=f"pip install 'edgepack[{format}]'")
    sizes = []
    for name, passes in (("dense", []), ("pruned", [Prune(targets=(), size_ratio=0.5)])):
        compress(net(), TASK, passes, tmp_path / name, Silent())
        export(tmp_path / name, [find(Exporter, format)()], Silent())
        sizes.append(sum(Artifact.open(tmp_path / name / format).manifest.census["weight_bytes"].values()))
    assert sizes[1] < 0.6 * sizes[0]
