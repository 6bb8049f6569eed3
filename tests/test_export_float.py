from __future__ import annotations

import errno
import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
ov = pytest.importorskip("openvino", reason="pip install 'edgepack[openvino]'")

from torch import nn  # noqa: E402

from _networks import Pair, resnet20  # noqa: E402
from edgepack import parts  # noqa: E402
from edgepack.artifact import Artifact, Manifest, describe_files  # noqa: E402
from edgepack.contracts import Census, Exporter, Graph, Runtime  # noqa: E402
from edgepack.errors import InputError, Unsupported  # noqa: E402
from edgepack.export._dialects import SMALL, exact_half, half_weights, lower_float  # noqa: E402
from edgepack.front import with_front  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "pt2"}


class Normed(nn.Module):
    """Every order of batch normalization that folds, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_norm = nn.ConvTranspose2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.grouped_norm = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)
        self.alone = nn.BatchNorm2d(8)
        self.spun = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        self.head, self.head_norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
                nn.init.uniform_(layer.weight, 0.5, 2.0)
                nn.init.normal_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up_norm(self.up(x)))
        x = torch.relu(self.grouped_norm(self.grouped(x)))
        return self.head_norm(self.head(self.spun(self.alone(x)).mean((2, 3))))


class Enlarge(nn.Module):
    """Super-resolution in small: any image size, channel attention, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.narrow, self.gate = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = nn.functional.leaky_relu(self.first(image), 0.05)
        y = self.narrow(torch.split(x, (4, 12), 1)[1])
        mean = y.mean((2, 3), keepdim=True)
        spread = (y - mean).pow(2).mean((2, 3), keepdim=True).pow(0.5)
        return nn.functional.pixel_shuffle(self.last(y * torch.sigmoid(self.gate(mean + spread)) + x), 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.out = nn.LSTM(8, 16, 2), nn.GRU(16, 16, bidirectional=True), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, (h, c) = self.lstm(x, (h, c))
        y, g = self.gru(x, h)
        return self.out(y), g, c


@functools.cache
def graph_of(name: str) -> Graph:
    torch.manual_seed(0)
    image = Input(
        "image", (1, 3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), scale=255.0,
        dynamic=("batch", "height", "width"),
    )  # fmt: skip
    state = {"shape": (2, 1, 16), "dynamic": {"batch": 1}}
    cases = {
        "normed": (Normed, (Input("x", (1, 3, 16, 16)),)),
        "enlarge": (Enlarge, (image,)),
        "pair": (Pair, (Input("ids", (1, 7), dtype="int64"), Input("x", (1, 8)))),
        "recurrent": (
            Recurrent,
            (Input("x", (5, 1, 8), dynamic={"batch": 1}), Input("h", **state), Input("c", **state)),
        ),
    }
    module, inputs = cases[name]
    return capture(module().eval(), Task(inputs=inputs, labels=("cat", "köter") if name == "enlarge" else ()))


def write(exporter: Exporter, graph: Graph, folder: Path) -> tuple[Artifact, Graph, Census]:
    if exporter.layout or exporter.normalize:
        graph = with_front(graph, exporter.layout, exporter.normalize)
    simulation = exporter.lower(graph, Plan())
    folder.mkdir()
    census = exporter.write(simulation, folder)
    manifest = Manifest(
        exporter.format, exporter.format, "float", simulation.inputs, simulation.outputs, describe_files(folder)
    )
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder), simulation, census


def exporter_of(name: str, **options: object) -> Exporter:
    return parts.find(Exporter, name)(**options)  # type: ignore[type-abstract]


def worst(artifact: Artifact, simulation: Graph, engine: str, sizes: dict[str, int]) -> float:
    """max|a−b| / max|b| over the outputs."""
    random = np.random.default_rng(0)
    arrays = {}
    for spec in simulation.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        scale = 255 if spec.dtype == "uint8" else 49
        arrays[spec.name] = (
            random.standard_normal(shape) if spec.dtype == "float32" else random.integers(0, scale, shape)
        ).astype(spec.dtype)
    session = parts.find(Runtime, engine)().load(artifact, threads=1)  # type: ignore[type-abstract]
    found, wanted = session.run(arrays), run_graph(simulation, arrays)
    session.close()
    assert list(found) == [spec.name for spec in simulation.outputs]
    errors = []
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        errors.append(float(np.abs(found[name].astype(np.float64) - value).max() / np.abs(value).max()))
    return max(errors)


CASES = [
    ("normed", {}, [{"batch": 1}, {"batch": 2}, {"batch": 5}]),
    pytest.param("normed", {"layout": "NHWC"}, [{"batch": 3}], marks=pytest.mark.slow),
    pytest.param("enlarge", {}, [{"batch": 1, "height": 20, "width": 31}], marks=pytest.mark.slow),
    (
        "enlarge",
        {"normalize": True},
        [{"batch": 1, "height": 33, "width": 24}, {"batch": 2, "height": 64, "width": 48}],
    ),
    pytest.param("pair", {}, [{"batch": 1}, {"batch": 5}], marks=pytest.mark.slow),
    ("recurrent", {}, [{"batch": 1}, {"batch": 3}]),
]


@pytest.mark.parametrize("format_name", sorted(ENGINES))
@pytest.mark.parametrize("name, options, sizes", CASES)
def test_computes_its_simulation(tmp_path, format_name, name, options, sizes):
    precision = "float16" if name == "normed" else "float32"
    exporter = exporter_of(format_name, precision=precision, **options)
    artifact, simulation, _ = write(exporter, graph_of(name), tmp_path / "a")
    engines = [ENGINES[format_name], *(["openvino"] if format_name == "onnx" else [])]
    for engine in engines:
        assert max(worst(artifact, simulation, engine, size) for size in sizes) <= 2e-6


def test_half_weights_fold_first_and_lie_on_the_grid():
    graph = graph_of("normed")
    half = half_weights(graph)
    targets = Counter(str(node.target) for node in half.program.graph.nodes)
    assert targets["aten.batch_norm.default"] == 1
    assert not [key for key in half.program.state_dict if "norm." in key]
    for tensor in half.program.state_dict.values():
        if tensor.ndim >= 2:
            assert torch.equal(tensor.half().float(), tensor)
    x = {"x": np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)}
    exact, rounded = run_graph(graph, x)["output"], run_graph(half, x)["output"]
    assert 0 < np.abs(exact - rounded).max() / np.abs(exact).max() < 2e-3


def test_float32_leaves_the_graph_alone():
    graph = graph_of("pair")
    assert lower_float(graph, "plan") is graph
    assert lower_float(graph, "float32") is graph


def test_exact_half_stores_only_what_it_keeps():
    size = SMALL + 1
    assert exact_half(np.full(size, 0.5, np.float32)) is not None
    assert exact_half(np.full(size, 0.1, np.float32)) is None
    assert exact_half(np.full(size, 1e6, np.float32)) is None
    assert exact_half(np.full(SMALL, 0.5, np.float32)) is None
    assert exact_half(np.full(size, 1, np.int64)) is None


def test_weight_beyond_float16_is_named():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        module[1].weight[0, 0] = -7e4
    graph = capture(module, Task(inputs=(Input("x", (1, 4)),)))
    with pytest.raises(Unsupported, match=r"parameter '1.weight' has a value of 7e\+04, beyond float16"):
        lower_float(graph, "float16")


def test_a_plan_that_cannot_be_written_is_refused():
    plan = Plan({"conv2d": {"operator": "conv2d", "bits": 8}})
    with pytest.raises(Unsupported, match=r"cannot write what the plan says about 'conv2d' \(bits\)"):
        exporter_of("pt2").lower(graph_of("pair"), plan)


def test_a_plan_is_left_aside_when_float32_is_asked_for():
    graph = graph_of("pair")
    plan = Plan({"conv2d": {"operator": "conv2d", "bits": 8}})
    assert exporter_of("pt2", precision="float32").lower(graph, plan) is graph


@pytest.mark.parametrize("format_name", ["onnx", "openvino", "tensorrt", "coreml", "tflite"])
def test_a_plan_of_another_making_is_refused(format_name):
    with pytest.raises(InputError, match="does not say which operator 'conv2d' is"):
        exporter_of(format_name).lower(graph_of("pair"), Plan({"conv2d": {"bits": 8}}))


class Eigen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x @ x.transpose(-1, -2))


@pytest.mark.parametrize("format_name, form", [("onnx", "ONNX"), ("openvino", "OpenVINO")])
def test_an_operator_without_a_form_is_named(tmp_path, format_name, form, capfd):
    graph = capture(Eigen().eval(), Task(inputs=(Input("x", (1, 4, 4)),)))
    with pytest.raises(Unsupported, match=rf"operator aten\._linalg_eigh.* has no {form} form"):
        write(exporter_of(format_name), graph, tmp_path / "a")
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def resnet() -> Graph:
    torch.manual_seed(0)
    return capture(resnet20().eval(), Task(inputs=(Input("x", (1, 3, 32, 32)),)))


FLOAT_BYTES = 269_722 * 4


def test_onnx_is_small_and_bare(tmp_path, resnet):
    artifact, _, census = write(exporter_of("onnx"), resnet, tmp_path / "a")
    assert artifact.size_bytes <= 1.02 * FLOAT_BYTES
    model = onnx.load(artifact.file(".onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 20)]
    assert not model.metadata_props
    assert not model.graph.value_info
    assert not any(node.name or node.doc_string or node.metadata_props for node in model.graph.node)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert (model.graph.input[0].name, shape[0].dim_param, shape[1].dim_value) == ("x", "batch", 3)
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert census.operators["Conv"] == 19
    assert "BatchNormalization" not in census.operators
    assert sum(census.weight_bytes.values()) < artifact.size_bytes


@pytest.mark.parametrize("format_name, structure_bytes", [("onnx", 10_000), ("openvino", 45_000)])
def test_float16_halves_the_files(tmp_path, resnet, format_name, structure_bytes):
    artifact, _, census = write(exporter_of(format_name, precision="float16"), resnet, tmp_path / "a")
    assert census.weight_bytes["float16"] > 20 * census.weight_bytes["float32"]
    assert artifact.size_bytes < 0.5 * FLOAT_BYTES + structure_bytes


class Scaled(nn.Module):
    """A layer scale behind a permutation, which OpenVINO multiplies into the weights before it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1)
        self.gamma = nn.Parameter(torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(nn.functional.gelu(self.wide(x))) * self.gamma.reshape(1, -1, 1, 1)


def test_openvino_keeps_scaled_weights_in_16_bits(tmp_path):
    graph = capture(Scaled().eval(), Task(inputs=(Input("x", (1, 16, 6, 6)),)))
    artifact, simulation, census = write(exporter_of("openvino", precision="float16"), graph, tmp_path / "a")
    assert census.weight_bytes["float16"] >= 2 * 64 * 16 * 2
    assert census.weight_bytes["float32"] < 500
    assert worst(artifact, simulation, "openvino", {"batch": 3}) <= 2e-6


def test_equal_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.twin = nn.Parameter(self.weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.weight) @ self.twin

    graph = capture(Tied().eval(), Task(inputs=(Input("x", (1, 64)),)))
    artifact, simulation, census = write(exporter_of("onnx"), graph, tmp_path / "a")
    assert census.weight_bytes["float32"] == 64 * 64 * 4
    assert worst(artifact, simulation, "onnxruntime", {"batch": 2}) < 1e-6


@pytest.mark.slow
def test_opset_is_an_option(tmp_path):
    artifact, _, _ = write(exporter_of("onnx", opset=18), graph_of("pair"), tmp_path / "a")
    assert onnx.load(artifact.file(".onnx")).opset_import[0].version == 18
    with pytest.raises(ValueError, match="opset is 18 to 23, not 9"):
        exporter_of("onnx", opset=9)


@pytest.mark.slow
def test_labels_and_preprocessing_travel_when_baked_in(tmp_path):
    graph = graph_of("enlarge")
    artifact, _, _ = write(exporter_of("onnx", normalize=True), graph, tmp_path / "onnx")
    facts = {item.key: json.loads(item.value) for item in onnx.load(artifact.file(".onnx")).metadata_props}
    assert facts == {"edgepack.labels": ["cat", "köter"], "edgepack.preprocessing": {}}
    artifact, _, _ = write(exporter_of("openvino", normalize=True), graph, tmp_path / "openvino")
    model = ov.Core().read_model(artifact.file(".xml"))
    assert json.loads(model.get_rt_info(["edgepack", "labels"]).astype(str)) == ["cat", "köter"]
    assert str(model.inputs[0].get_node().get_layout()) == "[N,H,W,C]"
    assert model.inputs[0].get_element_type() == ov.Type.u8


@pytest.mark.slow
def test_openvino_keeps_names_and_dynamic_axes(tmp_path):
    artifact, _, _ = write(exporter_of("openvino"), graph_of("recurrent"), tmp_path / "a")
    model = ov.Core().read_model(artifact.file(".xml"))
    assert [port.get_names() for port in model.inputs] == [{"x"}, {"h"}, {"c"}]
    assert str(model.inputs[0].get_partial_shape()) == "[5,?,8]"
    assert [port.get_names() for port in model.outputs] == [{"output_0"}, {"output_1"}, {"output_2"}]


def test_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(folder: Path, size_bytes: int) -> None:
        assert size_bytes > 3980
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgepack.export.openvino.reserve", full)
    with pytest.raises(OSError, match="No space left"):
        write(exporter_of("openvino"), graph_of("pair"), tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.slow
def test_writing_twice_gives_the_same_bytes(tmp_path):
    for format_name in ("onnx", "openvino"):
        one, _, _ = write(exporter_of(format_name), graph_of("pair"), tmp_path / f"{format_name}1")
        two, _, _ = write(exporter_of(format_name), graph_of("pair"), tmp_path / f"{format_name}2")
        assert one.manifest.files == two.manifest.files
