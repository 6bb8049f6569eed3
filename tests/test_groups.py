"""4-bit weights with a scale per group of columns: what the pass makes of them, and what files hold."""

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
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress._gptq import round_in_turn  # noqa: E402
from edgepack.compress._grid import group_scale, round_to, weight_scale  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.errors import ParityError, Unsupported  # noqa: E402
from edgepack.export.c import C  # noqa: E402
from edgepack.export.coreml import Coreml  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.export.tensorrt import Tensorrt  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
GROUP = 16
GROUPED = {"point": (24, 2), "tokens": (48, 3), "head": (5, 3)}


class Layers(nn.Module):
    """Layers whose rows can be cut into groups of 16, and layers whose rows cannot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.wide = nn.Conv2d(8, 32, 3, padding=1)
        self.point = nn.Conv2d(32, 24, 1)
        self.depth = nn.Conv2d(24, 24, 1, groups=24)
        self.odd = nn.Linear(24, 48)  # 24 columns are no whole groups
        self.tokens = nn.Linear(48, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.wide(torch.relu(self.first(x))))
        y = torch.relu(self.depth(torch.relu(self.point(y))))
        y = torch.relu(self.tokens(torch.relu(self.odd(y.flatten(2).transpose(1, 2)))))
        return self.head(y.mean(1))


def samples(count: int = 24) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("groups")
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(samples()))  # type: ignore[arg-type]
    compress(Layers().eval(), task, [Quantize(weight_bits=4, group_size=GROUP, explain=False)], out, Silent())
    return out


def written(folder: Path, exporter: Exporter) -> Artifact:
    artifact = export(folder, [exporter], Silent())[0].artifact
    assert artifact.manifest.parity.status == "checked"
    assert artifact.manifest.parity.max_rel is not None
    assert artifact.manifest.parity.max_rel < 1e-5
    return artifact


def scales(folder: Path) -> dict[str, np.ndarray]:
    """Layer → scales as planned, in the order of the network."""
    source = Source.open(folder / "compressed")
    names = [name for name, entry in source.plan.nodes.items() if "weight" in entry]
    found = [source.plan.tensors[f"{name}/weight_scale"] for name in names]
    return dict(zip(["first", "wide", "point", "depth", "odd", "tokens", "head"], found, strict=True))


def test_rows_that_can_be_cut_have_a_scale_per_group_and_the_others_one(folder: Path) -> None:
    found = {name: scale.shape for name, scale in scales(folder).items()}
    assert found == {"first": (8,), "wide": (32,), "depth": (24,), "odd": (48,), **GROUPED}
    entries = [entry["weight"] for entry in Source.open(folder / "compressed").plan.nodes.values() if "weight" in entry]
    assert [entry.get("group_size") for entry in entries] == [None, None, GROUP, None, None, GROUP, GROUP]
    notes = Artifact.open(folder / "compressed").manifest.history[0]["notes"]
    assert any("3 with a scale per 16 columns" in note for note in notes)


def test_every_group_lies_on_its_own_grid(folder: Path) -> None:
    state = Source.open(folder / "compressed").graph.program.state_dict
    for name in GROUPED:
        groups = state[f"{name}.weight"].detach().reshape(-1, GROUP).numpy()
        whole = groups / scales(folder)[name].reshape(-1, 1)
        np.testing.assert_allclose(whole, whole.round(), atol=1e-4)
        assert np.abs(whole).max() < 7.01


def test_scales_of_groups_are_those_of_rows_of_that_many_columns() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 48) * torch.logspace(-1, 1, 48)
    scale = group_scale(weight, 7, 16)
    for row in range(6):
        for group in range(3):
            part = weight[row : row + 1, 16 * group : 16 * group + 16]
            assert scale[row, group] == weight_scale(part, top=7)[0]
    fine, coarse = ((round_to(weight, s, 7) - weight).square().sum() for s in (scale, weight_scale(weight, top=7)))
    assert fine < 0.55 * coarse


def test_columns_in_turn_know_groups() -> None:
    """With moments of one, columns do not depend on each other, and the nearest values are the best."""
    torch.manual_seed(0)
    weight = torch.randn(6, 32, 1, 1)
    scale = group_scale(weight, 7, 16)
    independent = round_in_turn(weight, scale, torch.eye(32, dtype=torch.float64)[None], 7)
    torch.testing.assert_close(independent, round_to(weight, scale, 7))
    x = torch.randn(200, 4) @ torch.randn(4, 32) + 0.1 * torch.randn(200, 32)
    in_turn = round_in_turn(weight, scale, (x.T @ x).double()[None], 7)
    errors = [(x @ (w - weight).flatten(1).T).square().sum() for w in (in_turn, round_to(weight, scale, 7))]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    "exporter",
    [Onnx(), Onnx(weights="fast", name="onnx-fast"), Openvino(), Coreml(target="iOS18")],
    ids=lambda e: e.name,
)
def test_files_hold_groups(folder: Path, exporter: Exporter) -> None:
    pytest.importorskip({"openvino": "openvino", "coreml": "coremltools"}.get(exporter.format, "onnx"))
    artifact = written(folder, exporter)
    census = artifact.manifest.census
    assert census is not None
    four = 32 * 8 * 9 + 24 * 32 + 24 + 48 * 24 + 48 * 48 + 5 * 48
    packed = exporter.name != "onnx-fast"
    assert census["weight_bytes"].get("int4", 0) == (four // 2 if packed else 0)
    assert ("lie in 4 bits: smaller, not faster" in " ".join(census["notes"])) == packed
    if exporter.format == "coreml":
        assert census["operators"]["constexpr_blockwise_shift_scale"] == 7


def test_onnx_computes_integers_times_their_groups(folder: Path) -> None:
    """The head's weight, found in the file and made float by hand."""
    model = onnx.load(written(folder, Onnx()).file(".onnx"))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    integers = next(a for a in stored.values() if a.shape == (15, GROUP) and a.dtype != np.float32)
    weight = Source.open(folder / "compressed").graph.program.state_dict["head.weight"].detach().numpy()
    by_hand = (integers.astype(np.float32) * scales(folder)["head"].reshape(-1, 1)).reshape(5, 48)
    np.testing.assert_allclose(by_hand, weight, rtol=1e-6)


def test_openvino_keeps_weights_of_linear_layers_packed_in_memory(folder: Path) -> None:
    ov = pytest.importorskip("openvino")
    path = written(folder, Openvino()).file(".xml")
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    products = [str(one["runtimePrecision"].astype(str)) for one in found
                if str(one["layerType"].astype(str)) == "FullyConnected"]  # fmt: skip
    assert products == ["i4"] * 3


def test_a_wrong_scale_in_a_file_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from edgepack.export import _openvino_packed

    plain = _openvino_packed._factors

    def wrong(product: Any) -> Any:
        found = plain(product)
        return found if found is None or found[1].data.size != 15 else (found[0], Reversed(found[1].data[::-1]))

    class Reversed:
        def __init__(self, data: np.ndarray) -> None:
            self.data = data

    monkeypatch.setattr(_openvino_packed, "_factors", wrong)
    with pytest.raises(ParityError):
        export(folder, [Openvino(name="wrong")], Silent())


@pytest.mark.parametrize("exporter", [Tflite(), Coreml(), C()], ids=lambda e: e.format)
def test_formats_without_groups_refuse(folder: Path, exporter: Exporter) -> None:
    source = Source.open(folder / "compressed")
    with pytest.raises(Unsupported, match=r"no weights with a scale per group of columns \(\w+\.weight\)") as error:
        exporter.lower(source.graph, source.plan)
    assert error.value.exit_status == 7
    assert error.value.hint == "leave group_size out in quantize"


def test_tensorrt_refuses_float_activations_first(folder: Path) -> None:
    source = Source.open(folder / "compressed")
    with pytest.raises(Unsupported):
        Tensorrt().lower(source.graph, source.plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 24}, "group_size is a power of two from 16, not 24"),
        ({"group_size": 8}, "group_size is a power of two from 16, not 8"),
        ({"group_size": 32}, "group_size needs weight_bits = 4 and float activations"),
        ({"group_size": 32, "weight_bits": 4, "activation_bits": 8}, "group_size needs weight_bits = 4 and float"),
        ({"group_size": 32, "weight_bits": 8}, "group_size needs weight_bits = 4"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)
