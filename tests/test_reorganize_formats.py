"""Networks with fewer tokens in every format: constant choices, plain operators, and the ranking in float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from _networks import ZOO  # noqa: E402
from _samples import Samples  # noqa: E402
from edgepack import api, parts, usercode  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.fold import Fold  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compress.reorganize import Reorganize  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

FORBIDDEN = ("Scatter", "NonZero", "If", "Loop", "SCATTER", "WHERE", "WHILE", "scatter", "non_zero", "cond", "while")
NEEDS = {"onnx": "onnxscript", "openvino": "openvino", "tflite": "litert_torch", "coreml": "coremltools"}


def network() -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = usercode.load("models.py:VisionTransformer", ZOO)(width=32, depth=4, heads=4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def task() -> Task:
    pictures = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    return Task((Input("x", (1, 3, 32, 32)),), calibration=Samples(pictures))  # type: ignore[arg-type]


def exported(tmp_path: Path, format: str, *more: Any, **options: Any) -> Artifact:
    pytest.importorskip(NEEDS.get(format, "onnxscript"), reason=f"pip install 'edgepack[{format}]'")
    out = tmp_path / "out"
    api.compress(network(), task(), [Fold(), Reorganize(keep_rate=0.5), *more], out=out)
    [result] = api.export(out, [parts.find(Exporter, format)(**options)])
    return result.artifact


def operators(artifact: Artifact) -> Counter[str]:
    assert artifact.manifest.census is not None
    return Counter(artifact.manifest.census["operators"])


@pytest.mark.parametrize(
    "format, options",
    [
        ("onnx", {}),
        pytest.param("openvino", {}, marks=pytest.mark.slow),
        pytest.param("tflite", {}, marks=pytest.mark.slow),
        pytest.param("coreml", {"precision": "float32"}, marks=pytest.mark.slow),
        pytest.param("tensorrt", {}, marks=pytest.mark.slow),
    ],
)
def test_files_hold_plain_operators_and_compute_the_cut_network(
    tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    artifact = exported(tmp_path, format, **options)
    found = operators(artifact)
    assert not [name for name in found if name.startswith(FORBIDDEN)]
    assert sum(count for name, count in found.items() if name.lower().startswith("topk")) == 3
    parity = artifact.manifest.parity
    assert parity.status == "checked"
    assert parity.max_rel is not None
    assert parity.max_rel <= 1e-5
    assert parity.margin is not None
    assert parity.margin > 0


def test_onnx_chooses_constant_numbers_and_only_the_batch_is_dynamic(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
    model = onnx.load(exported(tmp_path, "onnx").file(".onnx"))
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    chosen = [int(constants[node.input[1]].item()) for node in model.graph.node if node.op_type == "TopK"]
    assert chosen == [32, 17, 9]
    dims = [dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    assert len(dims) == 1


@pytest.mark.slow
def test_tflite_gathers_whole_rows_and_breaks_the_delegate_three_times(tmp_path: Path) -> None:
    artifact = exported(tmp_path, "tflite")
    found = operators(artifact)
    assert found["GATHER_ND"] + found["GATHER"] == 3
    assert not {"LESS", "SELECT", "SELECT_V2", "GREATER_EQUAL"} & set(found)
    assert artifact.manifest.census is not None
    assert any("in 4 partitions" in note for note in artifact.manifest.census["notes"])


@pytest.mark.parametrize("activations", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_ranking_stays_float_when_the_rest_is_int8(tmp_path: Path, activations: str) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
    artifact = exported(tmp_path, "onnx", Quantize(activations=activations, explain=False))
    assert artifact.manifest.dialect.startswith(("u8", "d8"))
    graph = onnx.load(artifact.file(".onnx")).graph
    makers = {name: node for node in graph.node for name in node.output}
    rankings = [node for node in graph.node if node.op_type == "TopK"]
    assert len(rankings) == 3
    for node in rankings:
        passed = []
        while node.op_type != "Softmax":  # up to it, one operator reads another
            node = makers[node.input[0]]
            passed.append(node.op_type)
        assert not {"QuantizeLinear", "DequantizeLinear", "MatMulInteger"} & set(passed)
        assert "ReduceMean" in passed
        product = makers[node.input[0]]
        assert product.op_type == "MatMul"
        assert "QuantizeLinear" not in {makers[name].op_type for name in product.input if name in makers}
    parity = artifact.manifest.parity
    assert parity.status == "checked"
    assert parity.sqnr_original_db is not None
