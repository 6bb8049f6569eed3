"""What OpenVINO's engine makes of integer residual networks: eight bits from one convolution to the next."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
ov = pytest.importorskip("openvino", reason="pip install 'edgepack[openvino]'")
pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
SHAPE = (1, 3, 32, 32)


class Shortcuts(nn.Module):
    """A stem with a pool, a block whose shortcut is a convolution, and one whose shortcut is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.one, self.two = nn.Conv2d(32, 32, 3, 2, 1), nn.Conv2d(32, 64, 1)
        self.shortcut = nn.Conv2d(32, 64, 1, 2)
        self.three, self.four = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1)
        self.last = nn.Conv2d(64, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.two(F.relu(self.one(x))) + self.shortcut(x))
        x = F.relu(self.four(F.relu(self.three(x))) + x)
        return self.last(x)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shortcuts")
    values = np.random.default_rng(0).standard_normal((16, *SHAPE[1:])).astype(np.float32)
    task = Task((Input("x", SHAPE, layout="NCHW"),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(Shortcuts().eval(), task, [Quantize(explain=False)], folder, Silent())
    return export(folder, [Openvino()], Silent())[0].artifact


def test_no_floats_between_convolutions(made: Artifact) -> None:
    assert made.manifest.parity.status == "checked"
    model = ov.Core().read_model(made.file(".xml"))
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [{key: value.astype(str) for key, value in node.get_rt_info().items()}
             for node in compiled.get_runtime_model().get_ordered_ops()]  # fmt: skip
    convolutions = [fact for fact in facts if fact["layerType"] == "Convolution"]
    if {fact["runtimePrecision"] for fact in convolutions} != {"u8"}:
        pytest.skip("this processor has no 8-bit convolutions of OpenVINO")
    assert len(convolutions) == 7
    assert [fact["outputPrecisions"] for fact in convolutions].count("f32") == 1  # the network's result
    assert [fact["outputPrecisions"] for fact in facts if fact["layerType"] == "Pooling"] == ["u8"]


def test_the_shortcut_is_rounded_around_zero_and_the_pool_reads_integers(made: Artifact) -> None:
    graph = Openvino().lower(*_source(made)).program.graph
    (pool,) = [node for node in graph.nodes if "max_pool2d" in str(node.target)]
    assert "dequantize_per_tensor" in str(pool.args[0].target)
    assert all("quantize" not in str(user.target) for user in pool.users)
    sums = [node for node in graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert ["conv2d" in str(node.args[0].target) for node in sums] == [True, True]  # computed with the sum
    shortcut = sums[0].args[1]
    assert "conv2d" in str(shortcut.args[0].args[0].target)
    assert shortcut.args[2] == 128
    assert "relu" in str(sums[1].args[1].args[0].args[0].target)


def _source(made: Artifact) -> tuple:
    source = Source.open(made.folder.parent / "compressed")
    return source.graph, source.plan


def test_the_converter_reports_to_nobody(made: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float files and integer ones are read by different readers; neither may start what calls home."""
    telemetry = pytest.importorskip("openvino_telemetry")
    asked: list[str] = []
    for name in ("init", "send_event", "send_error", "start_session"):
        monkeypatch.setattr(telemetry.Telemetry, name, lambda *_, name=name, **__: asked.append(name))
    folder = made.folder.parent
    for precision in ("plan", "float32"):
        export(folder, [Openvino(name=f"{precision}-unreported", precision=precision)], Silent())
    assert not asked
