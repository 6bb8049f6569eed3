"""Activations that LiteRT rounds at run time: the proof product by product, and the limit of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'edgepack[tflite-run]'")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Graph  # noqa: E402
from edgepack.export._alignment import aligned  # noqa: E402
from edgepack.export._tflite_dynamic import forms_of  # noqa: E402
from edgepack.export._tflite_integer import TFLITE  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export, simulation_of  # noqa: E402
from edgepack.graph import nudged, run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.runtimes.tflite import Tflite as Engine  # noqa: E402
from edgepack.stepwise import stepwise  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
VALUES = np.random.default_rng(0).standard_normal((24, 3, 16, 16)).astype(np.float32)
WIDTH, HEADS = 32, 2


class Block(nn.Module):
    """Norms before attention and before the layers behind it."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.one, self.two, self.activation = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), activation()
        self.query, self.key, self.value, self.back = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH))  # its change of shape is no operator of the file

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        heads = [layer(y).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        x = x + self.back(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.narrow(self.activation(self.wide(self.two(x)))) * self.gain.reshape(1, 1, -1)


class Transformer(nn.Module):
    """A convolution for patches, blocks with an activation that engines compute in the product and one they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.out = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 10)
        self.blocks = nn.Sequential(Block(nn.ReLU), Block(nn.GELU))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.out(x.mean(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("tflite-dynamic")
    task = Task((Input("x", (1, 3, 16, 16), layout="NCHW"),), calibration=Samples(VALUES))  # type: ignore[arg-type]
    plain = Quantize(activations="dynamic", equalize=False, explain=False, bias_correct=False, rounding="nearest")
    compress(Transformer().eval(), task, [plain], made, Silent())
    return made


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return export(folder, [Tflite()], Silent())[0].artifact


@pytest.fixture(scope="module")
def simulation(artifact: Artifact) -> Graph:
    return simulation_of(artifact)


def test_the_file_is_proved_product_by_product(artifact: Artifact) -> None:
    parity = artifact.manifest.parity
    assert artifact.manifest.dialect == "d8s8-tflite"
    assert parity.status == "checked"
    assert parity.rounded == 1 + 2 * 6 + 1
    assert artifact.manifest.census is not None
    assert artifact.manifest.census["notes"][-1].endswith("in 1 partition")


def test_every_product_is_the_engines_where_it_reads_the_same(artifact: Artifact, simulation: Graph) -> None:
    """Ranges of rows, their zeros and the order of the sums, to the last digits of float32."""
    for sample in VALUES[:4, None]:
        steps = Engine().trace(artifact, {"x": sample})
        found = stepwise(simulation, {"x": sample}, steps)
        assert found.fault is None
        assert (found.compared, found.absent) == (14, 0)


@pytest.mark.parametrize("name", ["patches", "blocks.0.query", "blocks.0.wide", "blocks.1.narrow"])
def test_a_wrong_product_is_found(artifact: Artifact, source: Source, name: str) -> None:
    simulation = Tflite().lower(source.graph, source.plan)
    steps = Engine().trace(artifact, {"x": VALUES[:1]})
    (key,) = [key for key in simulation.program.state_dict if key == f"{name}.weight_scale"]
    scale = simulation.program.state_dict[key].clone()
    scale[:5] *= 1.03
    simulation.program.state_dict[key] = scale
    fault = stepwise(simulation, {"x": VALUES[:1]}, steps).fault
    assert fault is not None
    assert f"of {name!r}" in str(fault)


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source.open(folder / "compressed")


def test_what_rounding_at_run_time_does_sets_the_limit(artifact: Artifact, simulation: Graph) -> None:
    """Units in the last place make values, steps and zeros of rows round the other way."""
    golden = artifact.golden()
    moved = run_graph(nudged(simulation), golden.inputs)["output"]
    own = sqnr_db(moved, golden.simulation["output"])
    assert own is not None
    assert 40 < own < 140
    assert artifact.manifest.parity.least_db == pytest.approx(min(45.0, own - 6))


class Mixed(nn.Module):
    """Convolutions of integers and of floats: beside each, how TFLite is to round what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)  # an image: static
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)  # the stem's integers: static
        self.one = nn.LayerNorm(WIDTH)
        self.wide = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)  # floats, many taps: dynamic
        self.few = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)  # floats, few taps: float
        self.up, self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.Conv2d(2 * WIDTH, WIDTH, 1)  # floats: dynamic
        self.groups = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4)  # not one channel each: static
        self.halves = nn.Conv2d(WIDTH, WIDTH, 1, stride=2)  # not every point: static
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.point(F.relu(self.stem(x))).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.down(F.gelu(self.up(F.gelu(self.few(self.wide(x))))))
        return self.out(F.gelu(self.halves(F.gelu(self.groups(F.gelu(x))))).mean((2, 3)))


def test_convolutions_of_floats_are_rounded_where_that_is_fast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Task((Input("x", (1, 3, 16, 16), layout="NCHW"),), calibration=Samples(VALUES))  # type: ignore[arg-type]
    plain = Quantize(activations="dynamic", equalize=False, explain=False, bias_correct=False, rounding="nearest")
    compress(Mixed().eval(), task, [plain], tmp_path, Silent())
    source = Source.open(tmp_path / "compressed")
    module = source.graph.program.module(check_guards=False)
    forms = forms_of(module, source.plan, aligned(module, source.plan), TFLITE)
    static, dynamic = "static", "dynamic"
    assert list(forms.values()) == [static, static, dynamic, "float", dynamic, dynamic, static, static, dynamic]
    manifest = export(tmp_path, [Tflite()], Silent())[0].artifact.manifest
    assert (manifest.parity.status, manifest.dialect) == ("checked", "d8s8-tflite")
    assert manifest.census is not None
    assert manifest.census["notes"][-1].endswith("left: DEPTHWISE_CONV_2D 1")
