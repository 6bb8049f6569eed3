"""What integer TFLite files keep in float or on a grid of its own, because 8 bits shared would lose it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'edgepack[tflite-run]'")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from _tflite_integers import SHAPE, compressed, simulation_of  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.errors import InputError, Unsupported  # noqa: E402
from edgepack.export._tflite_copies import OWN, with_copies  # noqa: E402
from edgepack.export._tflite_ranges import harmonized  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import export  # noqa: E402
from edgepack.exporting import simulation_of as simulation_again  # noqa: E402
from edgepack.graph import fixed_batch, run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


@pytest.mark.parametrize(("channels", "rows", "stays"), [(3, 16, True), (5, 16, False), (3, 17, False)])
def test_a_narrow_convolution_of_an_image_stays_float(tmp_path: Path, channels: int, rows: int, stays: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(channels, rows, 3), nn.ReLU(), nn.Conv2d(rows, 4, 1))
    values = np.random.default_rng(0).standard_normal((24, channels, 8, 8)).astype(np.float32)
    task = Task((Input("x", (1, channels, 8, 8), layout="NCHW"),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(module.eval(), task, [Quantize()], tmp_path, Silent())
    manifest = export(tmp_path, [Tflite()], Silent())[0].artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    left = 4 * rows * (channels * 9 + 1) if stays else 0
    assert manifest.census["weight_bytes"].get("float32", 0) == left
    assert manifest.census["operators"]["QUANTIZE"] == 1
    assert ("1 convolution with few channels of an image in float" in manifest.census["notes"]) == stays
    assert manifest.census["notes"][-1].endswith("in 1 partition")


@pytest.mark.parametrize("channels", [15, 16])
def test_a_narrow_depthwise_convolution_stays_float(tmp_path: Path, channels: int) -> None:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(channels, channels, 3, groups=channels)
    module = nn.Sequential(nn.Conv2d(5, channels, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(channels, 4, 1))
    compressed(tmp_path, module)
    manifest = export(tmp_path, [Tflite()], Silent())[0].artifact.manifest
    left = channels < 16
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    assert manifest.census["weight_bytes"].get("float32", 0) == left * 4 * channels * 10
    assert manifest.census["operators"]["QUANTIZE"] == 1 + left
    assert ("1 depthwise convolution with few channels in float" in manifest.census["notes"]) == left
    assert manifest.census["notes"][-1].endswith("in 1 partition")


class Distilling(nn.Module):
    """A concatenation of something small that others read too, of something small that only it reads, of much."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.alone = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)
        self.last = nn.Conv2d(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.first(x), 0.1)
        large = 20 * self.second(y[:, 2:])
        return self.last(torch.cat([y[:, :2], large, self.alone(y)], 1))


def test_a_concatenation_does_not_coarsen_what_others_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Distilling()
    source = compressed(tmp_path, module, equalize=False)
    graph, plan = with_copies(fixed_batch(source.graph), source.plan)
    (copy,) = (name for name, entry in plan.nodes.items() if OWN in entry)
    ends = {name: entry.get("range") for name, entry in harmonized(graph, plan).nodes.items()}
    assert ends[copy] == ends["cat"] == ends["conv2d_2"] != ends["leaky_relu"]
    assert (
        ends["leaky_relu"]["high"] < 1.25 * source.plan.nodes["leaky_relu"]["range"]["high"] < ends["cat"]["high"] / 5
    )
    manifest = export(tmp_path, [Tflite()], Silent())[0].artifact.manifest
    assert manifest.census is not None
    assert manifest.census["operators"]["QUANTIZE"] == 2
    assert manifest.census["notes"][-1].endswith("in 1 partition")
    assert manifest.parity.rounded_otherwise is not None
    assert manifest.parity.rounded_otherwise < 1e-3


class Sharpen(nn.Module):
    """Super-resolution: corrections are added to features of the picture itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.last = nn.Conv2d(24, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.pixel_shuffle(self.last(self.body(y) + y), 2)


def test_a_picture_that_skips_the_network_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = np.random.default_rng(0).random((24, 3, 8, 8)).astype(np.float32)
    task = Task((Input("x", (1, 3, 8, 8), layout="NCHW"),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(Sharpen().eval(), task, [Quantize()], tmp_path, Silent())
    manifest = export(tmp_path, [Tflite()], Silent())[0].artifact.manifest
    assert manifest.census is not None
    assert manifest.census["weight_bytes"]["float32"] >= 4 * (24 * 27 + 12 * 24 * 9)
    assert manifest.census["weight_bytes"]["int8"] == 24 * 24 * 9
    assert (
        "the first and the last convolution and the sum that joins them in float, for the image's sake"
        in (manifest.census["notes"])
    )
    assert manifest.parity.status == "checked"


def test_one_compressed_network_gives_files_of_several_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = np.random.default_rng(0).random((8, 3, 8, 8)).astype(np.float32)
    image = Input("x", (1, 3, 8, 8), layout="NCHW", dynamic=("batch", "height", "width"))
    task = Task((image,), calibration=Samples(values))  # type: ignore[arg-type]
    module = Sharpen().eval()
    compress(module, task, [Quantize()], tmp_path, Silent())
    with pytest.raises(Unsupported, match=r"any height and width, but a TFLite file has fixed shapes") as refused:
        export(tmp_path, [Tflite()], Silent())
    assert refused.value.hint.startswith("sizes = {height = 64, width = 64} in this export")
    for size in ((6, 8), (12, 20)):
        exporter = Tflite(name="one", layout="NHWC", sizes=dict(zip(("height", "width"), size, strict=True)))
        artifact = export(tmp_path, [exporter], Silent())[0].artifact
        assert artifact.manifest.inputs[0].shape == (1, *size, 3)
        assert artifact.manifest.parity.status == "checked"
        golden = artifact.golden()
        wanted = module(torch.from_numpy(np.moveaxis(golden.inputs["x"], -1, 1).copy())).detach().numpy()
        np.testing.assert_allclose(golden.original["output"], wanted, atol=1e-6)
        near = sqnr_db(golden.simulation["output"], wanted)
        assert near is not None
        assert near > 30
        assert simulation_again(artifact).inputs == artifact.manifest.inputs
    with pytest.raises(InputError, match=r"sizes names 'hight', which is no dynamic axis of the network: batch, hei"):
        export(tmp_path, [Tflite(sizes={"hight": 8})], Silent())


class Whisper(nn.Module):
    """Two blocks whose results are far below the steps of what they are added to, as those of a new ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, 8, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        return x.mean((2, 3))


def test_sums_whose_parts_8_bits_would_not_notice_stay_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Whisper()
    for parameter in module.blocks.parameters():
        parameter.data *= 1e-5
    source = compressed(tmp_path, module, equalize=False)
    manifest = export(tmp_path, [Tflite()], Silent())[0].artifact.manifest
    assert manifest.census is not None
    assert manifest.census["notes"][-1].endswith("in 1 partition")
    assert manifest.parity.status == "checked"
    x = np.random.default_rng(5).standard_normal((4, *SHAPE[1:])).astype(np.float32)
    simulation = simulation_of(source)
    first, second = (node for node in simulation.program.graph.nodes if str(node.target) == "aten.add.Tensor")
    assert first in second.all_input_nodes  # not rounded between
    near = sqnr_db(run_graph(simulation, {"x": x})["output"], run_graph(source.graph, {"x": x})["output"])
    assert near is not None
    assert near > 40
