"""A picture that is added to what a network makes of it: both ends of that way and the sum stay float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.export._onnx_integer import ONNX_RUNTIME  # noqa: E402
from edgepack.export._openvino_integer import OPENVINO  # noqa: E402
from edgepack.export._qdq import planned_integer, quantized  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import runtime_for, sqnr_db  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Sharpen(nn.Module):
    """Super-resolution: corrections, here of a thousandth, are added to features of the picture itself."""

    def __init__(self, last: int = 12, between: bool = False, block: bool = False) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.last = nn.Conv2d(24, last, 3, padding=1)
        self.between, self.block = between, block
        with torch.no_grad():
            for parameter in self.body.parameters():
                parameter.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        inner = F.relu(self.body(y)) + y if self.block else y
        y = self.body(inner) + y
        return F.pixel_shuffle(self.last(F.relu(y) if self.between else y), 2)


def images(count: int = 24) -> Any:
    return np.random.default_rng(count).random((count, 3, 8, 8)).astype(np.float32)


def source(folder: Path, module: nn.Module) -> Source:
    task = Task((Input("x", (1, 3, 8, 8), layout="NCHW"),), calibration=Samples(images()))  # type: ignore[arg-type]
    compress(module.eval(), task, [Quantize()], folder, Silent())
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("skip")
    return folder, source(folder, Sharpen())


@pytest.mark.parametrize(
    ("exporter", "note"),
    [
        (Onnx(), "1 QLinearConv; in float, where they serve better: 2 Conv"),
        (Onnx(name="front", layout="NHWC"), "1 QLinearConv; in float, where they serve better: 2 Conv"),
        (Onnx(name="arm", target="arm"), "1 QLinearConv; in float, where they serve better: 2 Conv"),
        (Openvino(), "runs 1 Convolution in 8 bits"),
    ],
)
def test_nothing_of_the_picture_is_rounded_on_its_way(made: tuple[Path, Source], exporter: Exporter, note: str) -> None:
    if exporter.format == "openvino":
        pytest.importorskip("openvino")
    artifact = export(made[0], [exporter], Silent())[0].artifact
    assert artifact.manifest.parity.status == "checked"
    assert artifact.manifest.census is not None
    assert note in artifact.manifest.census["notes"][0]
    assert artifact.manifest.census["weight_bytes"]["int8"] < 24 * 24 * 9 + 100
    x = images(1)
    session = runtime_for(exporter.format).load(artifact, 1)
    try:
        found = session.run({"x": np.moveaxis(x, 1, -1) if exporter.layout == "NHWC" else x})["output"]
    finally:
        session.close()
    near = sqnr_db(found, run_graph(made[1].graph, {"x": x})["output"])
    assert near is None or near > 75  # one value rounded in 8 bits on the way: about 45


def test_onnx_runtime_adds_to_integers_where_other_sums_read_the_picture(tmp_path: Path) -> None:
    """A float convolution would leave channels first, and every sum behind it with them."""
    made = source(tmp_path, Sharpen(block=True))
    simulation = quantized(made.graph, made.plan, ONNX_RUNTIME)
    assert planned_integer(simulation) == {"conv2d": 3}  # the first, which a fourth one computes in float, and two
    artifact = export(tmp_path, [Onnx()], Silent())[0].artifact
    assert artifact.manifest.census is not None
    assert artifact.manifest.census["notes"][0].endswith("3 QLinearConv; in float, where they serve better: 2 Conv")
    assert artifact.manifest.census["operators"]["Conv"] == 5
    x = {"x": images(1)}
    assert (sqnr_db(run_graph(simulation, x)["output"], run_graph(made.graph, x)["output"]) or 99) > 75
    assert planned_integer(quantized(made.graph, made.plan, OPENVINO)) == {"conv2d": 2}


@pytest.mark.parametrize("module", [Sharpen(last=20), Sharpen(between=True)], ids=["features", "relu"])
def test_other_sums_are_rounded(tmp_path: Path, module: nn.Module) -> None:
    """What makes more channels than an image has, or reads something else than the sum, is no end of a skip."""
    made = source(tmp_path, module)
    for dialect in (ONNX_RUNTIME, OPENVINO):
        assert planned_integer(quantized(made.graph, made.plan, dialect)) == {"conv2d": 3}
