"""4-bit activations: which they are, their ranges, and files that really saturate at 16 levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress._activations import grid, last_layers  # noqa: E402
from edgepack.compress._ranges import BINS, METHODS, Histogram  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.errors import Unsupported  # noqa: E402
from edgepack.export.c import C  # noqa: E402
from edgepack.export.coreml import Coreml  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.export.tensorrt import Tensorrt  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import capture, fixed_batch, load_graph, run_graph  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
SHAPE = (1, 3, 8, 8)


class Net(nn.Module):
    """ReLUs, a shortcut, a leaky ReLU, maxima, and a function whose values lie on both sides of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.two, self.three = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.four, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.relu(x + self.two(F.leaky_relu(self.one(x), 0.1)))
        return self.head(F.relu(self.four(torch.tanh(self.three(x)))).mean((2, 3)))


def samples(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("four")
    task = Task((Input("x", SHAPE),), calibration=Samples(samples(32, 0)))  # type: ignore[arg-type]
    compress(Net().eval(), task, [Quantize(explain=False, weight_bits=4, activation_bits=4)], out, Silent())
    return out


def test_what_layers_with_four_bits_multiply_has_four_bits(folder: Path) -> None:
    nodes = Source.open(folder / "compressed").plan.nodes
    bits = {name: (entry["range"]["bits"], entry.get("weight", {}).get("bits")) for name, entry in nodes.items()}
    assert bits == {
        "input:x": (8, None), "conv2d": (8, 8), "relu": (4, None), "max_pool2d": (4, None), "conv2d_1": (8, 4),
        "leaky_relu": (4, None), "conv2d_2": (8, 4), "add": (8, None), "relu_1": (4, None), "conv2d_3": (8, 4),
        "tanh": (4, None), "conv2d_4": (8, 4), "relu_2": (8, None), "mean": (8, None), "linear": (8, 8),
    }  # fmt: skip


def written(folder: Path, exporter: Exporter) -> Artifact:
    artifact = export(folder, [exporter], Silent())[0].artifact
    assert artifact.manifest.parity.status == "checked"
    return artifact


def test_onnx_clips_bytes_between_integer_operators(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    artifact = written(folder, Onnx())
    assert "QLinearConv" in artifact.manifest.census["notes"][0]  # type: ignore[index]
    model = onnx.load(artifact.file(".onnx"))
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == 4
    for clip in clips:
        model.graph.output.append(onnx.helper.make_tensor_value_info(clip.output[0], onnx.TensorProto.UINT8, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run([clip.output[0] for clip in clips], {"x": 3 * samples(16, 1)})
    assert [(array.dtype, array.max()) for array in found] == [(np.dtype(np.uint8), 15)] * 4
    assert all(len(np.unique(array)) > 8 for array in found)


def test_signed_bytes_saturate_too(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    artifact = written(folder, Onnx(name="arm", target="arm"))
    model = onnx.load(artifact.file(".onnx"))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    clips = [[int(constants[name]) for name in node.input[1:]] for node in model.graph.node if node.op_type == "Clip"]
    assert clips == [[-128, -113]] * 4


def test_openvino_has_sixteen_levels(folder: Path) -> None:
    ov = pytest.importorskip("openvino")
    artifact = written(folder, Openvino())
    nodes = ov.Core().read_model(artifact.file(".xml")).get_ops()
    levels = [node.get_attributes()["levels"] for node in nodes if node.get_type_name() == "FakeQuantize"]
    assert sorted(levels) == [16, 16, 16, 16, 256, 256]


def test_c_computes_with_sixteen_levels(folder: Path) -> None:
    needs_compiler()
    artifact = written(folder, C())
    source = Source.open(folder / "compressed")
    simulation = C().lower(fixed_batch(source.graph), source.plan)
    narrow = [node.args[3:5] for node in simulation.program.graph.nodes if "quantize_per_tensor" in str(node.target)
              and "dequantize" not in str(node.target) and node.args[4] - node.args[3] == 15]  # fmt: skip
    assert set(narrow) == {(-128, -113)}
    assert len(narrow) >= 4
    assert artifact.manifest.dialect == "s8s8-c"


@pytest.mark.parametrize(
    ("exporter", "package"),
    [(Tflite(layout="NHWC"), "litert_torch"), (Coreml(target="iOS18"), "coremltools"), (Tensorrt(), "onnx")],
)
def test_other_formats_refuse(folder: Path, exporter: Exporter, package: str) -> None:
    source = Source.open(folder / "compressed")
    with pytest.raises(Unsupported, match="no activations of 4 bits") as found:
        exporter.lower(source.graph, source.plan)
    assert found.value.exit_status == 7
    assert "activation_bits = 8" in str(found.value.hint)


def test_files_agree_with_each_other(folder: Path) -> None:
    """Two engines, two ways to say it: the same classes but for ties."""
    source = Source.open(folder / "compressed")
    x = {"x": samples(64, 2)}
    found = []
    for exporter in (Onnx(), C()):
        found.append(run_graph(exporter.lower(source.graph, source.plan), x)["output"])
    exact = run_graph(load_graph(folder / "compressed", Artifact.open(folder / "compressed").manifest), x)["output"]
    noise = np.square(found[0] - found[1]).mean() / exact.var(0).mean()
    assert noise < np.square(found[0] - exact).mean() / exact.var(0).mean()
    assert np.square(found[0] - exact).mean() < 0.5 * exact.var(0).mean()


@pytest.mark.parametrize("method", ["normal", "laplace"])
def test_range_of_few_levels_is_as_good_as_any(method: str) -> None:
    """Beside actual rounding of a million values in 200 symmetric ranges."""
    values = getattr(np.random.default_rng(0), method)(size=1_000_000).astype(np.float32)
    counts, _ = np.histogram(values, BINS, (values.min(), values.max()))
    low, high = METHODS["mse"](Histogram(float(values.min()), float(values.max()), counts), 1.0, 16)
    tensor = torch.from_numpy(values)

    def error(low: float, high: float) -> float:
        return float((torch.fake_quantize_per_tensor_affine(tensor, *grid(low, high, 4)) - tensor).square().mean())

    best = min(error(-end, end) for end in np.linspace(1.0, 8.0, 200))
    assert error(low, high) < 1.05 * best
    assert error(low, high) < 0.9 * error(*METHODS["mse"](Histogram(-9.0, 9.0, counts), 1.0, 256))


@pytest.mark.parametrize(("low", "high", "bits"), [(0.0, 3.0, 4), (-1.0, 2.0, 4), (-2.0, 0.0, 4), (0.0, 0.0, 8)])
def test_grids_of_few_bits(low: float, high: float, bits: int) -> None:
    step, zero, first, last = grid(low, high, bits)
    assert (first, last) == (0, 2**bits - 1)
    assert first <= zero <= last
    assert abs((last - zero) * step - high) <= (step / 2 + 1e-9 if high > low else 255)


def test_last_layer_is_one_even_where_shortcuts_lead_to_the_output() -> None:
    class Shortcuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x.mean((2, 3))

    graph = capture(Shortcuts().eval(), Task((Input("x", SHAPE),))).program.graph
    (last,) = last_layers(graph)
    assert last.name == "conv2d_2"
