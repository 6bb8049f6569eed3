"""Integer artifacts: the simulation, the file written from it, and what engines make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact, Manifest, describe_files  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.errors import InputError, ParityError  # noqa: E402
from edgepack.export._onnx_integer import ONNX_RUNTIME  # noqa: E402
from edgepack.export._qdq import planned_integer, quantized  # noqa: E402
from edgepack.export.coreml import Coreml  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.export.tensorrt import Tensorrt  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import least_db, same_integers, sqnr_db  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Residual(nn.Module):
    """Everything the dialects know: strides, depthwise, a residual sum, a leaky ReLU, a concatenation, a pad."""

    def __init__(self, leak: float = 0.1, width: int = 16, fused: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.last = nn.Linear(2 * width, 6)
        self.leak, self.fused = leak, fused

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = F.leaky_relu(self.depthwise(x), self.leak)
        y = self.point(y) + x
        y = F.relu(y) if self.fused else y
        y = torch.cat([y[:, :, ::2, ::2], F.max_pool2d(x, 2)], 1)
        return self.last(y.mean((2, 3)))


class Gated(nn.Module):
    """SiLU, channels weighted by what a small network makes of their means, and by a learned gain."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.reduce, self.expand = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        self.last, self.gain = nn.Conv2d(width, 6, 1), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.depthwise(F.silu(self.first(x))))
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return (self.last(x * gate) * self.gain.reshape(1, -1, 1, 1)).mean((2, 3))


def source(folder: Path, module: nn.Module, seed: int = 0) -> Source:
    values = np.random.default_rng(seed).standard_normal((24, 3, 8, 8)).astype(np.float32)
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(module.eval(), task, [Quantize()], folder, Silent())
    return Source.open(folder / "compressed")


def near_float(made: Source) -> bool:
    """Whether the simulation keeps more than 25 dB of the float network's answers."""
    x = {"x": np.random.default_rng(5).standard_normal((32, 3, 8, 8)).astype(np.float32)}
    simulation = run_graph(quantized(made.graph, made.plan, ONNX_RUNTIME), x)["output"]
    found = sqnr_db(simulation, run_graph(made.graph, x)["output"])
    return found is not None and found > 25


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("integer")
    return folder, source(folder, Residual())


def test_onnx_file_holds_integers_and_onnx_runtime_runs_them(made: tuple[Path, Source]) -> None:
    folder, _ = made
    artifact = export(folder, [Onnx()], Silent())[0].artifact
    manifest = artifact.manifest
    assert manifest.dialect == "u8s8"
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    assert manifest.census["weight_bytes"]["int8"] > 16 * 9 + 16 * 16
    assert "3 QLinearConv" in manifest.census["notes"][0]  # the first too: a sum reads it
    assert "1 QGemm" in manifest.census["notes"][0]
    assert "1 QLinearAdd" in manifest.census["notes"][0]
    assert "1 QLinearLeakyRelu" in manifest.census["notes"][0]
    model = onnx.load(artifact.file(".onnx"))
    large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) >= 64]
    assert [tensor.data_type for tensor in large] == [onnx.TensorProto.INT8] * 4


def test_onnx_runtime_computes_gates_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = source(tmp_path, Gated())
    manifest = export(tmp_path, [Onnx()], Silent())[0].artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    note = manifest.census["notes"][0]
    for count, kind in ((4, "Conv"), (1, "GlobalAveragePool"), (3, "Mul"), (3, "Sigmoid")):
        assert f"{count} QLinear{kind}" in note
    assert "in float, where they serve better: 1 Conv" in note
    assert manifest.census["operators"]["Mul"] == 4  # that of the gain is gone
    assert near_float(made)


def test_openvino_reads_integer_weights(made: tuple[Path, Source]) -> None:
    pytest.importorskip("openvino")
    artifact = export(made[0], [Openvino()], Silent())[0].artifact
    assert artifact.manifest.dialect == "u8s8-openvino"
    assert artifact.manifest.parity.status == "checked"
    assert artifact.manifest.census is not None
    assert artifact.manifest.census["weight_bytes"]["int8"] > 16 * 9 + 16 * 16


@pytest.mark.parametrize("exporter", [Onnx(name="front", layout="NHWC"), Onnx(name="plain", precision="float32")])
def test_other_interfaces_of_the_same_plan(made: tuple[Path, Source], exporter: Onnx) -> None:
    manifest = export(made[0], [exporter], Silent())[0].artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.dialect == ("float32" if exporter.precision == "float32" else "u8s8")


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    leak=st.sampled_from([0.01, 0.1, 0.25, 0.5]),
    width=st.sampled_from([1, 3, 8, 16, 17]),
    fused=st.booleans(),
)
def test_file_computes_its_simulation(
    tmp_path_factory: pytest.TempPathFactory, seed: int, leak: float, width: int, fused: bool
) -> None:
    """Random small networks: engine and simulation differ by single roundings at most."""
    torch.manual_seed(seed)
    folder = tmp_path_factory.mktemp("random")
    made = source(folder, Residual(leak, width, fused), seed)
    found = planned_integer(quantized(made.graph, made.plan, ONNX_RUNTIME))
    assert sum(found.values()) == (4 if width >= 16 else 3)  # a narrow depthwise layer stays float
    artifact = export(folder, [Onnx()], Silent())[0].artifact
    parity = artifact.manifest.parity
    assert parity.sqnr_db is None or parity.sqnr_db > 40


def test_simulation_is_near_the_float_network(made: tuple[Path, Source]) -> None:
    assert near_float(made[1])


def test_weights_off_their_grid_are_refused(made: tuple[Path, Source]) -> None:
    source = made[1]
    scales = {name: array * np.float32(1.01) for name, array in source.plan.tensors.items()}
    with pytest.raises(InputError, match="does not lie on the grid"):
        quantized(source.graph, Plan(source.plan.nodes, scales), ONNX_RUNTIME)


def test_a_plan_of_another_network_is_refused(made: tuple[Path, Source]) -> None:
    source = made[1]
    more = {**source.plan.nodes, "conv2d_9": {"operator": "conv2d"}}
    with pytest.raises(InputError, match="the plan has 4 operators conv2d, the network 3"):
        quantized(source.graph, Plan(more, source.plan.tensors), ONNX_RUNTIME)


def test_a_planned_operator_that_is_float_in_the_file_is_an_error(made: tuple[Path, Source], tmp_path: Path) -> None:
    from edgepack.export._onnx_integer import hold_integers

    source = made[1]
    simulation = quantized(source.graph, source.plan, ONNX_RUNTIME)
    Onnx().write(source.graph, tmp_path)
    with pytest.raises(ParityError, match="has 0 operators with int8 weights, 4 were planned"):
        hold_integers(tmp_path / "model.onnx", simulation)


@given(low=st.floats(-1e3, -1e-6), high=st.floats(1e-6, 1e3))
def test_grids_hold_zero_exactly_and_their_ends_within_a_step(low: float, high: float) -> None:
    grid = ONNX_RUNTIME.grid(low, high)
    assert 0 <= grid.zero <= 255
    assert grid.step > 0
    assert abs((0 - grid.zero) * grid.step - low) <= grid.step
    assert abs((255 - grid.zero) * grid.step - high) <= grid.step


def test_integer_parity_allows_a_single_step_and_no_more() -> None:
    reference = np.random.default_rng(0).integers(0, 255, (4, 5000)).astype(np.float32) * 0.1
    for apart, share, same in ((0.1, 5e-4, True), (0.1, 0.2, False), (20.0, 5e-4, False)):
        value = reference.copy()
        value[:, : int(5000 * share)] += apart
        assert same_integers(value, reference, 70.0) is same
    assert same_integers(reference, reference)
    assert not same_integers(reference[:2], reference)
    assert not same_integers(np.full_like(reference, np.nan), reference)


def test_the_limit_follows_what_rounding_does() -> None:
    reference = {"y": np.ones((1, 1000))}
    assert least_db(reference, reference) == 45.0
    assert least_db(reference, {"y": reference["y"] + 0.01}) == pytest.approx(34.0)


def test_a_wrong_integer_artifact_is_refused(made: tuple[Path, Source], tmp_path: Path) -> None:
    """One weight of each output channel changed by its largest step."""
    from edgepack.parity import check, runtime_for

    artifact = export(made[0], [Onnx()], Silent())[0].artifact
    model = onnx.load(artifact.file(".onnx"))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[..., 0] = -values[..., 0]
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    artifact.golden().save(tmp_path / "golden.npz")
    manifest = artifact.manifest
    wrong = Manifest(**{**vars(manifest), "files": describe_files(tmp_path)})
    with pytest.raises(ParityError, match="differs from its simulation"):
        check(Artifact(tmp_path, wrong), runtime_for("onnx"))


def test_a_file_for_arm_has_signed_activations(made: tuple[Path, Source]) -> None:
    found = export(made[0], [Onnx(name="arm", target="arm")], Silent())[0].artifact
    assert (found.manifest.dialect, found.manifest.parity.status) == ("s8s8-arm", "checked")
    assert found.manifest.census is not None
    assert "uint8" not in found.manifest.census["weight_bytes"]
    assert "3 QLinearConv" in found.manifest.census["notes"][0]
    graph = onnx.load(found.file(".onnx")).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    zeros = {stored[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert zeros == {onnx.TensorProto.INT8}
    with pytest.raises(ValueError, match="target is 'x86' or 'arm', not 'riscv'"):
        Onnx(target="riscv")


def test_transposed_convolutions_stay_float_and_the_file_says_so(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2))
    source(tmp_path, module)
    for exporter in (Onnx(), Openvino()):
        census = export(tmp_path, [exporter], Silent())[0].artifact.manifest.census
        assert census is not None
        assert "in float, for want of an integer kernel: 1 transposed convolutions" in census["notes"]


class Depthwise(nn.Module):
    """A convolution and two depthwise ones, of 8 and of 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 32, 1)
        self.wide = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(F.relu(self.point(F.leaky_relu(self.narrow(F.leaky_relu(self.first(x)))))))


@pytest.mark.parametrize(("exporter", "integer"), [(Onnx(target="arm"), 2), (Tensorrt(), 3), (Coreml(), 3)])
def test_narrow_depthwise_convolutions_stay_float(tmp_path: Path, exporter: Any, integer: int) -> None:
    made = source(tmp_path, Depthwise())
    simulation = exporter.lower(made.graph, made.plan)
    assert planned_integer(simulation) == {"conv2d": integer}
    weights = {name for name, tensor in simulation.program.state_dict.items() if tensor.dtype == torch.int8}
    assert "narrow.weight" not in {name.removesuffix("_integers") for name in weights}
    assert "wide.weight_integers" in weights
