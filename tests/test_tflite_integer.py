"""Integer TFLite files: their partitions, integers, grids, and what the engine computes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'edgepack[tflite-run]'")

import torch.nn.functional as F  # noqa: E402
from ai_edge_litert.interpreter import Interpreter  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _tflite_integers import SHAPE, compressed, model_of, simulation_of  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.errors import ParityError  # noqa: E402
from edgepack.export._tflite_file import constant  # noqa: E402
from edgepack.export._tflite_integer import float_weights, hold_integers  # noqa: E402
from edgepack.export._tflite_ranges import harmonized  # noqa: E402
from edgepack.export._tflite_weights import Weight  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import fixed_batch, run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.runtimes.tflite import Tflite as Engine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Residual(nn.Module):
    """Strides by slicing, zero channels, depthwise, a residual sum, a leaky ReLU, a concatenation, padded maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(5, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.down, self.last = nn.Conv2d(16, 20, 3, 2, 1), nn.Linear(36, 6)

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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Artifact]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("integer")
    source = compressed(folder, Residual())
    return source, export(folder, [Tflite()], Silent())[0].artifact


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
