from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[tensorrt]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")

from torch import nn  # noqa: E402

from edgepack import contents, parts  # noqa: E402
from edgepack.artifact import Artifact, Manifest, describe_files  # noqa: E402
from edgepack.contracts import (  # noqa: E402
    FLOAT_LIMIT,
    Census,
    Exporter,
    Graph,
    Runtime,
)
from edgepack.errors import InputError, Unsupported  # noqa: E402
from edgepack.front import with_front  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.parity import max_relative  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402
from onnx import numpy_helper  # noqa: E402

IMAGE = (1, 3, 8, 8)


def exporter(**options) -> Exporter:
    return parts.find(Exporter, "tensorrt")(**options)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.norm2 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.gelu(self.up(torch.relu(self.norm(self.conv(x)))))
        y = nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear")
        return self.head(self.norm2(y.mean((2, 3))))


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    image = Input("x", IMAGE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), scale=255.0)
    return capture(Net().eval(), Task(inputs=(image,)))


def written(graph: Graph, folder: Path, part: Exporter) -> tuple[Artifact, Graph, Census]:
    simulation = part.lower(with_front(graph, part.layout, part.normalize), Plan())
    folder.mkdir(exist_ok=True)
    census = part.write(simulation, folder)
    manifest = Manifest("tensorrt", "t", "float32", simulation.inputs, simulation.outputs, describe_files(folder))
    return Artifact(folder, manifest), simulation, census


def settings(artifact: Artifact) -> dict:
    return json.loads((artifact.folder / "tensorrt.json").read_text(encoding="utf-8"))


OPTIONS = {
    "float32": {},
    "float16": {"precision": "float16", "batch": [1, 8, 32], "workspace_mb": 256},
    "pixels": {"normalize": True, "compute": "tf32"},
}


@pytest.fixture(scope="module")
def exported(graph, tmp_path_factory) -> dict[str, tuple[Artifact, Graph, Census]]:
    root = tmp_path_factory.mktemp("exported")
    return {name: written(graph, root / name, exporter(**options)) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_onnx_runtime_proves_the_numbers(exported, name):
    artifact, simulation, census = exported[name]
    random = np.random.default_rng(0)
    x = random.standard_normal((3, *IMAGE[1:])).astype(np.float32)
    if name == "pixels":
        x = random.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    session = parts.find(Runtime, "onnxruntime")().load(artifact, threads=1)
    found, wanted = session.run({"x": x})["output"], run_graph(simulation, {"x": x})["output"]
    session.close()
    assert max_relative(found, wanted) <= FLOAT_LIMIT / 10
    assert census.operators["Conv"] == census.operators["ConvTranspose"] == 1
    assert "BatchNormalization" not in census.operators
    assert sorted(artifact.manifest.files) == ["model.onnx", "tensorrt.json"]


def test_the_census_is_that_of_the_file(exported):
    artifact, _, census = exported["float32"]
    stored = onnx.load(artifact.folder / "model.onnx").graph.initializer
    assert sum(census.weight_bytes.values()) == sum(len(tensor.raw_data) for tensor in stored)
    keys = [contents.key(numpy_helper.to_array(tensor)) for tensor in stored]
    assert list(census.contents) == [key for key in keys if key is not None]
    half = exported["float16"][2]
    assert half.weight_bytes["float16"] > half.weight_bytes["float32"]
    assert half.notes == (f"{half.weight_bytes['float32']} bytes of biases and constants stay float32",)
    assert len(half.contents) == len(census.contents)


def test_pixels_are_cast_before_anything_else(exported):
    nodes = onnx.load(exported["pixels"][0].folder / "model.onnx").graph.node
    assert [node.op_type for node in nodes if "x" in node.input] == ["Cast"]
    assert sum(node.op_type == "Cast" for node in nodes) == 1


def test_settings(exported):
    assert {name: settings(exported[name][0])["compute"] for name in OPTIONS} == {
        "float32": "float32",
        "float16": "float16",
        "pixels": "tf32",
    }
    found = settings(exported["float16"][0])
    assert (found["strongly_typed"], found["workspace_mb"]) == (True, 256)
    assert found["profiles"] == {"x": {"min": [1, 3, 8, 8], "opt": [8, 3, 8, 8], "max": [32, 3, 8, 8]}}
    assert found["tensorrt"] == ">=10.9,<12"
    assert set(found["timing_cache_key"]) < set(found["engine_key"])
    plain = settings(exported["float32"][0])
    assert (plain["workspace_mb"], plain["profiles"]["x"]["max"][0]) == (None, 64)


def test_every_dynamic_axis_needs_sizes(tmp_path):
    net = nn.Conv2d(3, 4, 3, padding=1).eval()
    wide = capture(net, Task(inputs=(Input("x", (1, 3, 32, 32), dynamic=("batch", "height", "width")),)))
    with pytest.raises(Unsupported, match="needs the sizes of the dynamic axis 'height' of input 'x'") as caught:
        exporter(axes={"width": (32, 32, 64)}).write(wide, tmp_path)
    assert caught.value.hint == "axes = { height = [smallest, usual, largest] }"
    with pytest.raises(Unsupported, match="no input has a dynamic axis 'hight'") as caught:
        exporter(axes={"hight": (32, 32, 64)}).write(wide, tmp_path)
    assert "did you mean 'height'" in caught.value.hint
    ranges = {"height": (16, 32, 48), "width": (32, 32, 64)}
    artifact, _, _ = written(wide, tmp_path, exporter(axes=ranges))
    assert settings(artifact)["profiles"]["x"]["max"] == [64, 3, 48, 64]
    fixed = capture(net, Task(inputs=(Input("x", (2, 3, 8, 8), dynamic=()),)))
    assert settings(written(fixed, tmp_path / "f", exporter())[0])["profiles"] == {}


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"compute": "int8"}, "compute is one of float32, tf32, float16, not 'int8'"),
        ({"batch": (1, 2)}, r"batch is three whole numbers \(smallest, usual, largest\)"),
        ({"batch": (0, 1, 2)}, "batch must rise from smallest to largest and start at 1 or more"),
        ({"axes": {"height": (64, 32, 128)}}, r"axes\.height must rise"),
        ({"axes": {"batch": (1, 1, 8)}}, "'batch' go into the option batch"),
        ({"workspace_mb": 0}, "workspace_mb is at least 1, not 0"),
        ({"precision": "int8"}, "precision is 'plan', 'float32' or 'float16'"),
    ],
)
def test_options_are_checked(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        exporter(**options)


def test_a_plan_of_another_making_is_refused(graph):
    plan = Plan()
    plan.nodes["conv"] = {"weight": "int8"}
    with pytest.raises(InputError, match="the plan does not say which operator 'conv' is"):
        exporter().lower(graph, plan)


def test_the_offender_is_named_in_an_export(tmp_path):
    class Sampled(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return nn.functional.max_pool2d(x, 2, return_indices=True)

    made = capture(Sampled().eval(), Task(inputs=(Input("x", IMAGE),), output_names=("y", "where")))
    with pytest.raises(Unsupported, match=r"MaxPool '.*max_pool.*': TensorRT does not return the indices"):
        exporter().write(made, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixelshuffle", "deconvolution", "1-D", "3-D", "attention", "lstm"])
def test_kinds_of_layers(tmp_path, kind):
    torch.manual_seed(0)
    net, shape = {
        "pixelshuffle": (nn.Sequential(nn.Conv2d(3, 12, 3, groups=3), nn.PixelShuffle(2)), (1, 3, 8, 8)),
        "deconvolution": (nn.ConvTranspose2d(3, 4, 4, 2, 1), (1, 3, 8, 8)),
        "1-D": (nn.Sequential(nn.Conv1d(3, 8, 5), nn.MaxPool1d(2)), (1, 3, 32)),
        "3-D": (nn.Conv3d(3, 4, 3), (1, 3, 8, 8, 8)),
        "attention": (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu"), (1, 6, 16)),
        "lstm": (nn.LSTM(8, 16, batch_first=True), (1, 5, 8)),
    }[kind]
    artifact, simulation, _ = written(
        capture(net.eval(), Task(inputs=(Input("x", shape),))), tmp_path / "a", exporter(precision="float16")
    )
    sizes = [2 if isinstance(axis, str) else axis for axis in simulation.inputs[0].shape]
    x = {"x": np.random.default_rng(0).standard_normal(sizes).astype(np.float32)}
    found = parts.find(Runtime, "onnxruntime")().load(artifact, threads=1).run(x)
    wanted = run_graph(simulation, x)
    assert math.isfinite(max(max_relative(found[name], wanted[name]) for name in wanted))
    assert max(max_relative(found[name], wanted[name]) for name in wanted) <= FLOAT_LIMIT
