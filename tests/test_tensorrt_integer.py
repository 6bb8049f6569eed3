"""Explicit quantization for TensorRT: grids, places, rules for Q/DQ, and the numbers through ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.errors import ParityError, Unsupported  # noqa: E402
from edgepack.export._onnx_integer import hold_integers  # noqa: E402
from edgepack.export._tensorrt_integer import TENSORRT  # noqa: E402
from edgepack.export._tensorrt_rules import check_rules  # noqa: E402
from edgepack.export.tensorrt import Tensorrt  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.runtimes._tensorrt_types import typed  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
VALUES = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)


class Blocks(nn.Module):
    """Two residual sums: one around two layers, one with a convolution on either way."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.down, self.short = nn.Conv2d(width, 12, 3, 2, 1), nn.Conv2d(width, 12, 1, 2)
        self.last = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.two(F.relu(self.one(x))) + x)
        x = F.relu(self.short(x) + self.down(x))
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("tensorrt-integer")
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(VALUES))  # type: ignore[arg-type]
    compress(Blocks().eval(), task, [Quantize()], out, Silent())
    return out


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return export(folder, [Tensorrt()], Silent())[0].artifact


class File:
    """Makers and constants of a written file."""

    def __init__(self, artifact: Artifact) -> None:
        graph = onnx.load(artifact.file(".onnx")).graph
        self.nodes = list(graph.node)
        self.makers = {name: node for node in graph.node for name in node.output}
        self.stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def sources(self, operator: str) -> list[tuple[str, ...]]:
        """What makes each input of the operators of a type: a type, or ``constant``."""
        return [
            tuple(self.makers[name].op_type if name in self.makers else "constant" for name in node.input)
            for node in self.nodes
            if node.op_type == operator
        ]


def test_pairs_stand_where_tensorrt_fuses(artifact: Artifact) -> None:
    """Before weighted operators and on the other way into a sum; biases are float, results are not quantized."""
    file = File(artifact)
    assert artifact.manifest.dialect == "s8s8-tensorrt"
    assert set(file.sources("Conv")) == {("DequantizeLinear", "DequantizeLinear", "constant")}
    assert file.sources("Gemm") == [("DequantizeLinear", "DequantizeLinear", "constant")]
    assert [Counter(made) for made in file.sources("Add")] == [Counter(("Conv", "DequantizeLinear"))] * 2
    assert all(made[0] in ("Conv", "Add") for made in file.sources("Relu"))
    kinds = {file.stored[node.input[2]].dtype for node in file.nodes if node.op_type == "Conv"}
    assert kinds == {np.dtype(np.float32)}


def test_everything_is_signed_and_symmetric(artifact: Artifact) -> None:
    file = File(artifact)
    for node in file.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = file.stored[node.input[2]]
            assert (zero.dtype, zero.any()) == (np.int8, np.False_)
    check_rules(onnx.load(artifact.file(".onnx")))


def test_onnx_runtime_proves_it(artifact: Artifact) -> None:
    parity = artifact.manifest.parity
    assert parity.status == "checked"
    assert parity.sqnr_db is None or parity.sqnr_db > 100
    assert artifact.manifest.census is not None
    assert artifact.manifest.census["weight_bytes"]["int8"] >= 3 * 8 * 9 + 2 * 64 * 9 + 96 * 10 + 72


def test_simulation_is_near_the_float_network(source: Source) -> None:
    x = {"x": np.random.default_rng(5).standard_normal((32, 3, 8, 8)).astype(np.float32)}
    found = sqnr_db(
        run_graph(Tensorrt().lower(source.graph, source.plan), x)["output"], run_graph(source.graph, x)["output"]
    )
    assert found is not None
    assert found > 25


def test_values_beyond_the_range_end_at_minus_128(source: Source, folder: Path) -> None:
    """As QuantizeLinear has it; 127 steps on one side and 128 on the other."""
    found = export(folder, [Tensorrt(name="far")], Silent())[0].artifact
    x = {"x": -50 * np.ones((2, 3, 8, 8), np.float32)}
    session = ort.InferenceSession(found.file(".onnx"), providers=["CPUExecutionProvider"])
    simulation = run_graph(Tensorrt().lower(source.graph, source.plan), x)["output"]
    np.testing.assert_allclose(session.run(None, x)[0], simulation, rtol=0.02, atol=0.02)


def test_in_16_bits_the_rest_is_on_their_grid(folder: Path) -> None:
    found = export(folder, [Tensorrt(name="half", compute="float16")], Silent())[0].artifact
    for array in File(found).stored.values():
        if array.dtype == np.float32:
            np.testing.assert_array_equal(array.astype(np.float16).astype(np.float32), array)
    model = onnx.load_from_string(typed(found.file(".onnx").read_bytes(), "float16"))
    onnx.checker.check_model(model, full_check=True)
    assert {tensor.data_type for tensor in model.graph.initializer} >= {TensorProto.INT8, TensorProto.FLOAT16}
    assert TensorProto.FLOAT not in {tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("dynamic", "linear is to round its activations while it runs, which TensorRT cannot"),
        ("float", "linear is to have integer weights and float activations, which TensorRT has for 4 bits only"),
    ],
)
def test_what_tensorrt_lacks_is_refused(source: Source, word: str, sentence: str) -> None:
    entry = {**source.plan.nodes["linear"], "activations": word}
    plan = replace(source.plan, nodes={**source.plan.nodes, "linear": entry})
    with pytest.raises(Unsupported, match=sentence) as caught:
        Tensorrt().lower(source.graph, plan)
    assert caught.value.hint == "activations = 'static' in quantize, or precision = 'float16' here"
    assert Tensorrt(precision="float16").lower(source.graph, plan).dialect == "float32"


def test_a_planned_operator_that_is_float_in_the_file_is_an_error(source: Source, tmp_path: Path) -> None:
    Tensorrt().write(Tensorrt().lower(source.graph, Plan()), tmp_path)
    with pytest.raises(ParityError, match="has 0 operators with int8 weights, 6 were planned"):
        hold_integers(tmp_path / "model.onnx", Tensorrt().lower(source.graph, source.plan))


@given(low=st.floats(-1e3, 0), high=st.floats(0, 1e3))
@example(low=-1.3993735350278666e-39, high=0.0)  # its step would be no normal number of float32
def test_grids_are_symmetric(low: float, high: float) -> None:
    grid = TENSORRT.grid(low, high)
    assert (grid.zero, TENSORRT.lowest, TENSORRT.highest) == (0, -128, 127)
    assert 127 * grid.step >= max(-low, high) * (1 - 1e-6)


def node(operator: str, inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"the_{operator}", **attributes)


CONSTANTS = {
    "w": np.ones((4, 3, 1, 1), np.int8), "s": np.float32(1), "many": np.ones(4, np.float32),
    "zero": np.int8(0), "three": np.int8(3), "unsigned": np.uint8(0), "bias": np.ones(4, np.int32),
    "none": np.int32(0), "bytes": np.ones(4, np.int8), "plain": np.ones(4, np.float32),
}  # fmt: skip
QUANTIZED = [node("QuantizeLinear", "x s zero", "xq"), node("DequantizeLinear", "xq s zero", "xd")]
WEIGHT = node("DequantizeLinear", "w many zeros", "wd", axis=0)
OFFENDERS = {
    "activations off centre": (
        [node("QuantizeLinear", "x s three", "xq"), node("DequantizeLinear", "xq s three")],
        "QuantizeLinear 'the_QuantizeLinear': its zero point is not a constant 0",
        "int8 with a zero point of 0",
    ),
    "unsigned activations": (
        [node("QuantizeLinear", "x s unsigned", "xq"), node("DequantizeLinear", "xq s unsigned")],
        "constant 'unsigned' is uint8|int8 only",
        "",
    ),
    "weights along another axis": (
        [*QUANTIZED, node("DequantizeLinear", "w three_s", "wd", axis=1), node("Conv", "xd wd")],
        "its scales follow axis 1, not the output channels of Conv",
        "use axis = 0",
    ),
    "activations per channel": (
        [node("QuantizeLinear", "x three_s three_z", "xq", axis=1),
         node("DequantizeLinear", "xq three_s three_z", axis=1)],
        "scales per channel of activations",
        "one scale per tensor",
    ),
    "a bias of 32 bits": (
        [*QUANTIZED, WEIGHT, node("DequantizeLinear", "bias s none", "b"), node("Conv", "xd wd b")],
        "it holds a bias of 32-bit integers",
        "float32",
    ),
    "a bias of 8 bits": (
        [*QUANTIZED, WEIGHT, node("DequantizeLinear", "bytes s zero", "b"), node("Conv", "xd wd b")],
        "Conv 'the_Conv': its bias is quantized",
        "leave the bias of a quantized layer in float32",
    ),
    "a pair before a ReLU": (
        [*QUANTIZED, WEIGHT, node("Conv", "xd wd plain", "c"), node("QuantizeLinear", "c s zero", "cq"),
         node("DequantizeLinear", "cq s zero", "cd"), node("Relu", "cd")],
        "it stands between a convolution and its ReLU",
        "quantize behind Relu",
    ),
}  # fmt: skip
ALLOWED = {
    "a pair behind a ReLU": [
        *QUANTIZED, WEIGHT, node("Conv", "xd wd plain", "c"), node("Relu", "c", "r"),
        node("QuantizeLinear", "r s zero", "cq"), node("DequantizeLinear", "cq s zero"),
    ],
    "a pair between a convolution and a sum": [
        *QUANTIZED, WEIGHT, node("Conv", "xd wd plain", "c"), node("QuantizeLinear", "c s zero", "cq"),
        node("DequantizeLinear", "cq s zero", "cd"), node("Add", "cd cd"),
    ],
}  # fmt: skip


def model(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    constants = CONSTANTS | {
        "zeros": np.zeros(4, np.int8), "three_s": np.ones(3, np.float32), "three_z": np.zeros(3, np.int8),
    }  # fmt: skip
    used = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("name", OFFENDERS)
def test_rules_of_quantization(name: str) -> None:
    nodes, sentence, instead = OFFENDERS[name]
    with pytest.raises(Unsupported, match=f"tensorrt: .*({sentence})") as caught:
        check_rules(model(nodes))
    assert instead in (caught.value.hint or "")


@pytest.mark.parametrize("name", ALLOWED)
def test_places_tensorrt_takes(name: str) -> None:
    check_rules(model(ALLOWED[name]))
