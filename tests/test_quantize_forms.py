"""Transformers in eight bits: activations rounded in fixed ranges, in ranges found at run time, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.errors import Unsupported  # noqa: E402
from edgepack.export._onnx_integer import ONNX_RUNTIME  # noqa: E402
from edgepack.export._openvino_dynamic import require_rounding  # noqa: E402
from edgepack.export._openvino_integer import OPENVINO  # noqa: E402
from edgepack.export._qdq import quantized  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

FORMS: dict[str, dict[str, Any]] = {"static": {}, "dynamic": {"activations": "dynamic"}, "float": {"weight_bits": 8}}


class Transformer(nn.Module):
    """Patches by a convolution, one encoder layer with torch's attention, a head on the first token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2))[:, 0])


class Token(Transformer):
    """With a class token a hundred times smaller than the patches beside it, and norms before the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(0.01 * torch.randn(1, 1, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        return self.head(self.layer(x)[:, 0])


def network() -> nn.Module:
    torch.manual_seed(0)
    return Transformer().eval()


def samples(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def made(folder: Path, module: nn.Module, **options: Any) -> Source:
    task = Task((Input("x", (1, 3, 16, 16)),), calibration=Samples(samples(24, 0)))  # type: ignore[arg-type]
    compress(module, task, [Quantize(**options)], folder, Silent())
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    made(folder, network(), **FORMS[request.param])
    return request.param, folder


KERNELS = {
    "static": ("3 MatMulIntegerToFloat",),
    "dynamic": ("5 DynamicQuantizeMatMul",),
    "float": ("computes in float",),
}


def test_onnx_file_of_each_form_and_what_onnx_runtime_makes_of_it(form: tuple[str, Path]) -> None:
    kind, folder = form
    manifest = export(folder, [Onnx()], Silent())[0].artifact.manifest
    assert manifest.dialect == ONNX_RUNTIME.forms[kind]
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    assert all(word in " ".join(manifest.census["notes"]) for word in KERNELS[kind])
    assert manifest.census["weight_bytes"]["int8"] >= 32 * 96 + 32 * 32 + 2 * 32 * 64 + 32 * 5
    if kind == "float":
        assert manifest.parity.max_rel is not None
        assert manifest.parity.max_rel < 1e-5


def test_openvino_file_of_each_form(form: tuple[str, Path]) -> None:
    ov = pytest.importorskip("openvino")
    kind, folder = form
    if kind == "dynamic":
        try:
            require_rounding(ov)
        except Unsupported as error:
            pytest.skip(error.message)
    manifest = export(folder, [Openvino()], Silent())[0].artifact.manifest
    assert manifest.dialect == OPENVINO.forms[kind]
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    if kind == "float":
        assert manifest.parity.max_rel is not None
        assert manifest.parity.max_rel < 1e-5
    if kind == "static":
        assert "1 Convolution, 5 FullyConnected in 8 bits" in manifest.census["notes"][0]
    if kind == "dynamic":
        assert "5 linear layers round what they read in groups of 32 values" in manifest.census["notes"][-1]


def test_each_form_is_near_the_float_network(form: tuple[str, Path]) -> None:
    kind, folder = form
    source = Source.open(folder / "compressed")
    x = {"x": samples(64, 5)}
    with torch.no_grad():
        original = network()(torch.from_numpy(x["x"])).numpy()
    found = sqnr_db(run_graph(quantized(source.graph, source.plan, ONNX_RUNTIME), x)["output"], original)
    assert found is not None
    assert found > {"static": 30, "dynamic": 33, "float": 38}[kind]


def test_a_small_token_is_not_lost_when_biases_are_corrected(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = Token().eval()
    x = samples(32, 5)
    with torch.no_grad():
        original = module(torch.from_numpy(x)).numpy()
    source = made(tmp_path, module)
    weights, static = (
        sqnr_db(run_graph(graph, {"x": x})["output"], original)
        for graph in (source.graph, quantized(source.graph, source.plan, ONNX_RUNTIME))
    )
    assert weights is not None
    assert static is not None
    assert weights > 30
    assert static > 25


def test_a_found_range_is_that_of_onnx(tmp_path: Path) -> None:
    """One linear layer against DynamicQuantizeLinear's definition, written out in NumPy."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Flatten(2), nn.Linear(256, 8, bias=False)).eval()
    source = made(tmp_path, module, activations="dynamic", rounding="nearest", bias_correct=False)
    x = samples(4, 7)
    weight = module[1].weight.detach().numpy()
    scale = next(iter(source.plan.tensors.values()))[:, None]
    weight = np.clip(np.rint(weight / scale), -127, 127) * scale
    rows = x.reshape(4, 3, 256)
    step = np.float32((rows.max() - rows.min()) / np.float32(255))
    zero = np.rint(-rows.min() / step)
    rounded = (np.clip(np.rint(rows / step) + zero, 0, 255) - zero) * step
    expected = rounded @ weight.T
    found = run_graph(quantized(source.graph, source.plan, ONNX_RUNTIME), {"x": x})["output"]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    artifact = export(tmp_path, [Onnx()], Silent())[0].artifact
    session = ort.InferenceSession(str(artifact.file(".onnx")), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=2e-4)


def test_values_that_a_norm_hands_on_unrounded(tmp_path: Path) -> None:
    """The residual sum reads what the norm computed, the linear layer what was rounded."""
    source = made(tmp_path, network())
    graph = quantized(source.graph, source.plan, ONNX_RUNTIME).program.graph
    norm = graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)[0]
    names = {str(user.target).partition(".")[0] for user in norm.users}
    assert names == {"quantized_decomposed", "aten"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "weight_bits": 8}, "bits is for weights and activations; give it, or weight_bits"),
        ({"activation_bits": 8}, "activation_bits needs weight_bits"),
        ({"weight_bits": 5}, "weight_bits is 4 or 8, not 5"),
        ({"weight_bits": 8, "activations": "dynamic"}, "weight_bits without activation_bits leaves them float"),
        ({"activations": "now"}, "activations is one of static, dynamic, auto, not 'now'"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


@pytest.mark.parametrize(
    ("options", "form"),
    [({}, "static"), ({"weight_bits": 8, "activation_bits": 8}, "static"), ({"weight_bits": 8}, "float")],
)
def test_what_options_mean(options: dict[str, Any], form: str) -> None:
    assert Quantize(**options).form == form
