"""Linear layers whose activations OpenVINO rounds at run time: the grid against the engine, places, refusals, proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ov = pytest.importorskip("openvino")
pytest.importorskip("onnx")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack import models  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.errors import EdgepackError, Unsupported  # noqa: E402
from edgepack.export import _openvino_dynamic as dynamic  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.runtimes.openvino import Openvino as Engine  # noqa: E402
from edgepack.stepwise import stepwise  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
VALUES = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)


def rounds() -> bool:
    try:
        dynamic.require_rounding(ov)
    except Unsupported:
        return False
    return True


needs_rounding = pytest.mark.skipif(not rounds(), reason="OpenVINO rounds nothing at run time on this processor")


class Tokens(nn.Module):
    """Patches as tokens, three layers on rows that groups of 64 divide, one on rows of 20."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        self.norm = nn.LayerNorm(64)
        self.wide, self.back = nn.Linear(64, 192), nn.Linear(192, 64)
        self.narrow, self.last = nn.Linear(64, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.back(F.gelu(self.wide(self.norm(x))))
        return self.last(F.relu(self.narrow(x.mean(1))))


def compressed(module: nn.Module, folder: Path, activations: str = "dynamic") -> Path:
    torch.manual_seed(0)
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(VALUES))  # type: ignore[arg-type]
    compress(module.eval(), task, [Quantize(activations=activations, explain=False)], folder, Silent())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return compressed(Tokens(), tmp_path_factory.mktemp("openvino-dynamic"))


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return export(folder, [Openvino()], Silent())[0].artifact


def product(group: int, columns: int, rows: int) -> tuple[Any, Any]:
    """The engine's product of random rows with integer weights, and that of rows rounded here by the formula."""
    numbers = np.random.default_rng(columns)
    x = numbers.standard_normal((rows, columns)).astype(np.float32)
    whole = numbers.integers(-127, 128, (24, columns)).astype(np.int8)
    given = ov.opset13.parameter(x.shape, np.float32)
    scale = ov.opset13.constant(np.full((24, 1), 0.01, np.float32))
    wide = ov.opset13.multiply(ov.opset13.convert(ov.opset13.constant(whole), "f32"), scale)
    model = ov.Model([ov.opset13.matmul(given, wide, False, True)], [given])
    dynamic.set_group(model, group)
    found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    cut = x.astype(np.float64).reshape(rows, -1, group)
    step = np.abs(cut).max(-1, keepdims=True) / 127
    return found, (np.rint(cut / step) * step).reshape(rows, columns) @ (whole.T * 0.01)


@needs_rounding
@pytest.mark.parametrize(("group", "columns", "rows"), [(32, 96, 5), (64, 64, 1), (64, 192, 17), (128, 384, 9)])
def test_the_engine_rounds_groups_of_a_row(group: int, columns: int, rows: int) -> None:
    found, wanted = product(group, columns, rows)
    level = sqnr_db(found, wanted)
    assert level is not None
    assert level > 70


@needs_rounding
def test_the_file_is_proved_product_by_product(artifact: Artifact) -> None:
    manifest = artifact.manifest
    assert manifest.dialect == "d8s8-openvino"
    assert manifest.parity.status == "checked"
    assert manifest.parity.rounded is not None
    assert manifest.parity.rounded >= 3
    assert manifest.census is not None
    assert manifest.census["weight_bytes"]["int8"] == 3 * 16 * 64 + 2 * 64 * 192 + 64 * 20
    (note,) = [note for note in manifest.census["notes"] if "at run time" in note]
    assert note.startswith("3 linear layers round what they read in groups of 64 values at run time")
    assert note.endswith("; 1 others, whose rows no group divides, are float")
    model = ov.Core().read_model(artifact.file(".xml"))
    assert model.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).astype(str) == "64"


@needs_rounding
def test_a_wrong_product_is_found(artifact: Artifact, source: Source) -> None:
    """Against a simulation with other scales of ten output channels, by its name."""
    simulation = Openvino().lower(source.graph, source.plan)
    steps = Engine().trace(artifact, {"x": VALUES[:2]})
    assert stepwise(simulation, {"x": VALUES[:2]}, steps).fault is None
    (name,) = [name for name in simulation.program.state_dict if name == "wide.weight_scale"]
    scale = simulation.program.state_dict[name].clone()
    scale[:10] *= 1.05
    simulation.program.state_dict[name] = scale
    fault = stepwise(simulation, {"x": VALUES[:2]}, steps).fault
    assert fault is not None
    assert "linear of 'wide'" in str(fault)


def test_simulation_is_near_the_float_network(source: Source) -> None:
    x = {"x": np.random.default_rng(5).standard_normal((32, 3, 8, 8)).astype(np.float32)}
    simulation = Openvino().lower(source.graph, source.plan)
    found = sqnr_db(run_graph(simulation, x)["output"], run_graph(source.graph, x)["output"])
    assert found is not None
    assert found > 30


def test_what_the_file_holds_computes_without_rounding(source: Source) -> None:
    stored, group = dynamic.unrounded(Openvino().lower(source.graph, source.plan))
    names = {str(node.target) for node in stored.program.graph.nodes}
    assert group == 64
    assert not [name for name in names if "per_token" in name]


def test_rows_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    made = Source.open(compressed(module, tmp_path) / "compressed")
    sentence = r"groups of at least 32 values, which divide the rows of no linear layer here \(linear, linear_1\)"
    with pytest.raises(Unsupported, match=sentence) as caught:
        Openvino().lower(made.graph, made.plan)
    assert caught.value.hint == "activations = 'static' in quantize"


@pytest.mark.slow
def test_operators_on_weights_alone_may_be_gone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models.prepare_torchvision()
    network = pytest.importorskip("timm").create_model("convnext_atto", num_classes=10).eval()
    values = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    task = Task((Input("x", (1, 3, 32, 32)),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(network, task, [Quantize(activations="dynamic", explain=False)], tmp_path, Silent())
    found = Source.open(tmp_path / "compressed")
    assert "reshape" in {entry["operator"] for entry in found.plan.nodes.values()}
    assert Openvino().lower(found.graph, found.plan).dialect.startswith("d8")


def test_convolutions_alone_read_ranges_from_calibration(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    made = export(compressed(module, tmp_path), [Openvino()], Silent())[0].artifact
    assert made.manifest.dialect == "u8s8-openvino"


def test_an_engine_that_does_not_round_is_refused(source: Source, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dynamic, "set_group", lambda model, size: model.set_rt_info("0", ["runtime_options",
                        "DYNAMIC_QUANTIZATION_GROUP_SIZE"]))  # fmt: skip
    with pytest.raises(EdgepackError, match="rounds no activations at run time on this processor"):
        Openvino().write(Openvino().lower(source.graph, source.plan), tmp_path)
