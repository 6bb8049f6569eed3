from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'edgepack[tflite-run]'")

import torch.nn.functional as F  # noqa: E402
from ai_edge_litert.interpreter import Interpreter  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.errors import InputError, ParityError, Unsupported  # noqa: E402
from edgepack.export._tflite_copies import OWN, with_copies  # noqa: E402
from edgepack.export._tflite_file import constant  # noqa: E402
from edgepack.export._tflite_integer import float_weights, hold_integers, lower_integers  # noqa: E402
from edgepack.export._tflite_ranges import harmonized  # noqa: E402
from edgepack.export._tflite_weights import Weight  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.exporting import simulation_of as simulation_again  # noqa: E402
from edgepack.graph import fixed_batch, run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.runtimes.tflite import Tflite as Engine  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
SHAPE = (1, 5, 8, 8)  # not an image: a narrow convolution of one stays float


class Residual(nn.Module):
    """Strides by slicing, zero channels, depthwise, a residual sum, a leaky ReLU, a concatenation, padded maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.down, self.last = nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = self.point(F.leaky_relu(self.depthwise(x), 0.1)) + x
        z = self.down(y) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        y = torch.cat([F.max_pool2d(x, 3, 2, 1), F.relu6(z)], 1)
        return self.last(y.mean((2, 3)))


class Once(nn.Module):
    """A convolution and what comes behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.conv, self.function, self.out = nn.Conv2d(SHAPE[1], 8, 3), function, nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.conv(x)))


def compressed(folder: Path, module: nn.Module, **options: Any) -> Source:
    values = np.random.default_rng(0).standard_normal((24, *SHAPE[1:])).astype(np.float32)
    task = Task((Input("x", SHAPE, layout="NCHW"),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(module.eval(), task, [Quantize(**options)], folder, Silent())
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Artifact]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("integer")
    source = compressed(folder, Residual())
    return source, export(folder, [Tflite()], Silent())[0].artifact


def model_of(artifact: Artifact) -> Any:
    return schema.ModelT.InitFromPackedBuf(artifact.file(".tflite").read_bytes(), 0)


def simulation_of(source: Source) -> Any:
    return lower_integers(fixed_batch(source.graph), source.plan)


def test_the_whole_network_is_one_integer_partition(made: tuple[Source, Artifact]) -> None:
    manifest = made[1].manifest
    assert manifest.dialect == "s8s8-tflite"
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    assert manifest.census["notes"][-1].endswith("in 1 partition")
    counted = manifest.census["operators"]
    assert (counted["QUANTIZE"], counted["DEQUANTIZE"], counted["TRANSPOSE"]) == (1, 1, 1)
    kinds = {tensor.type for tensor in model_of(made[1]).subgraphs[0].tensors}
    assert kinds <= {schema.TensorType.FLOAT32, schema.TensorType.INT8, schema.TensorType.INT32}
    assert "float32" not in manifest.census["weight_bytes"]


def test_zero_points_are_written_once(made: tuple[Source, Artifact]) -> None:
    subgraph = schema.Model.GetRootAs(made[1].file(".tflite").read_bytes()).Subgraphs(0)
    grids = [subgraph.Tensors(place).Quantization() for place in range(subgraph.TensorsLength())]
    vectors = [
        (grid.ZeroPointAsNumpy().tobytes(), grid._tab.Vector(grid._tab.Offset(10)))
        for grid in grids
        if grid is not None
    ]
    assert len(vectors) > len(set(vectors)) == len({content for content, _ in vectors})
    assert all(grid.ZeroPointLength() == grid.ScaleLength() for grid in grids if grid is not None)


def test_weights_and_scales_are_the_plans_bit_for_bit(made: tuple[Source, Artifact]) -> None:
    source, artifact = made
    model = model_of(artifact)
    scales = [tensor.quantization.scale for tensor in model.subgraphs[0].tensors if tensor.quantization is not None]
    stored = {np.asarray(scale, np.float32).tobytes() for scale in scales if scale is not None}
    assert {scale.tobytes() for scale in source.plan.tensors.values()} <= stored
    _, weights = float_weights(simulation_of(source))
    assert len(weights) == 5
    hold_integers(artifact.file(".tflite").read_bytes(), weights)


def test_every_bias_is_in_the_product_of_the_steps(made: tuple[Source, Artifact]) -> None:
    model = model_of(made[1])
    (main,) = model.subgraphs
    found = 0
    for operator in main.operators:
        if len(operator.inputs) == 3 and main.tensors[operator.inputs[2]].type == schema.TensorType.INT32:
            read, weight, bias = (main.tensors[place].quantization for place in operator.inputs)
            np.testing.assert_allclose(bias.scale, weight.scale * read.scale[0], rtol=1e-6)
            assert not np.any(weight.zeroPoint)
            assert np.abs(constant(schema, model, main.tensors[operator.inputs[1]]).astype(int)).max() <= 127
            found += 1
    assert found == 6  # the slice is one


def test_the_file_computes_its_simulation_on_both_kinds_of_kernels(made: tuple[Source, Artifact]) -> None:
    source, artifact = made
    x = {"x": np.random.default_rng(9).standard_normal((20, *SHAPE[1:])).astype(np.float32)}
    expected = run_graph(simulation_of(source), x)["output"]
    for xnnpack in (True, False):
        session = Engine(xnnpack=xnnpack).load(artifact)
        found = np.concatenate([session.run({"x": row[None]})["output"] for row in x["x"]])
        session.close()
        near = sqnr_db(found, expected)
        assert near is None or near > 42
    floating = sqnr_db(expected, run_graph(source.graph, x)["output"])
    assert floating is not None
    assert floating > 25


def test_trace_shows_stored_integers(made: tuple[Source, Artifact]) -> None:
    x = made[1].golden().inputs["x"][:1]
    steps = Engine().trace(made[1], {"x": x})
    kinds = {step.operator: {array.dtype for array in step.outputs.values()} for step in steps}
    assert kinds["CONV_2D"] == kinds["ADD"] == kinds["CONCATENATION"] == {np.dtype(np.int8)}
    assert kinds["DEQUANTIZE"] == {np.dtype(np.float32)}


def test_concatenated_values_share_a_grid_and_leaky_relu_a_step(made: tuple[Source, Artifact]) -> None:
    source = made[0]
    plan = harmonized(fixed_batch(source.graph), source.plan)
    ends = {name: (entry["range"]["low"], entry["range"]["high"]) for name, entry in plan.nodes.items()}
    assert ends["max_pool2d"] == ends["cat"]
    low, high = ends["leaky_relu"]
    ratio = 256 * (ends["conv2d_1"][1] - ends["conv2d_1"][0]) / (high - low)
    assert ratio == pytest.approx(round(ratio), rel=1e-5)
    assert round(ratio) % 2 == 1
    before = source.plan.nodes["cat"]["range"]
    assert ends["cat"][1] >= before["high"]


def test_a_planned_operator_that_is_float_in_the_file_is_an_error(made: tuple[Source, Artifact]) -> None:
    source, artifact = made
    _, weights = float_weights(simulation_of(source))
    other = Weight("other.weight", weights[0].integers[:, :, :1], weights[0].scale)
    with pytest.raises(ParityError, match=r"'other.weight' is planned in integers \(static\) for 1 operators, 0 of"):
        hold_integers(artifact.file(".tflite").read_bytes(), [*weights, other])


def test_a_weight_is_known_by_its_integers_whatever_was_multiplied_in() -> None:
    integers = np.array([[5, -127, 3], [127, 0, 1]], np.int8)
    weight = Weight("w", integers, np.array([0.1, 0.2], np.float32))
    factor = np.array([[0.3], [-2.0]], np.float32)
    found = weight.stored(integers * weight.scale[:, None] * factor, 0)
    assert found is not None
    np.testing.assert_array_equal(found[0], integers * np.array([[1], [-1]]))
    np.testing.assert_allclose(found[1], [0.03, 0.4], rtol=1e-6)
    assert weight.stored(np.full((2, 3), 0.25, np.float32), 0) is None


def test_other_interfaces_of_the_same_plan(made: tuple[Source, Artifact]) -> None:
    folder = made[1].folder.parent
    manifest = export(folder, [Tflite(name="nhwc", layout="NHWC")], Silent())[0].artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    assert "TRANSPOSE" not in manifest.census["operators"]


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


class Mixed(nn.Module):
    """What transformers are made of: a convolution for patches, layer norms, linear layers on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(5, 32, 4, 4), nn.LayerNorm(32)
        self.wide, self.narrow, self.out = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.narrow(F.gelu(self.wide(self.norm(x))))
        return self.out(x.mean(1))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(0)
    return compressed(tmp_path_factory.mktemp("mixed"), Mixed(), equalize=False)


@pytest.mark.parametrize(("form", "dialect", "least_db"), [("dynamic", "d8s8-tflite", 45.0), ("float", "w8", 90.0)])
def test_weights_of_8_bits_with_other_activations(
    mixed: Source, tmp_path: Path, form: str, dialect: str, least_db: float
) -> None:
    nodes = {
        name: {**entry, "activations": form} if "weight" in entry else entry for name, entry in mixed.plan.nodes.items()
    }
    simulation = Tflite().lower(mixed.graph, Plan(nodes, mixed.plan.tensors))
    assert simulation.dialect == dialect
    census = Tflite().write(simulation, tmp_path)
    assert census.weight_bytes["int8"] == 32 * 80 + 2 * 32 * 64 + 32 * 5
    assert census.notes[-1].endswith("in 1 partition")
    x = np.random.default_rng(3).standard_normal((8, *SHAPE[1:])).astype(np.float32)
    expected = run_graph(simulation, {"x": x})["output"]
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    run = interpreter.get_signature_runner()
    found = np.concatenate([run(x=row[None])["output"] for row in x])
    near = sqnr_db(found, expected)
    assert near is not None
    assert near > least_db
    if form == "dynamic":  # and it is not the float network
        far = sqnr_db(found, run_graph(mixed.graph, {"x": x})["output"])
        assert far is not None
        assert far < near


def test_dynamic_files_say_which_ranges_are_known(made: tuple[Source, Artifact], tmp_path: Path) -> None:
    source = made[0]
    nodes = {
        name: {**entry, "activations": "dynamic"} if "weight" in entry else entry
        for name, entry in source.plan.nodes.items()
    }
    census = Tflite().write(Tflite().lower(source.graph, Plan(nodes, source.plan.tensors)), tmp_path)
    assert any(
        note.startswith("4 convolutions round what they read in ranges from calibration") for note in census.notes
    )
