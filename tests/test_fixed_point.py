"""Dynamic fixed point: 16-bit activations with one exponent per tensor, in TFLite's int16x8 operators."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("litert_converter")
from torch import Tensor, nn  # noqa: E402

from _tflite_integers import compressed, model_of, schema, simulation_of  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress._grid import multipliers  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.errors import ParityError, Unsupported  # noqa: E402
from edgepack.export import _tflite_quantized  # noqa: E402
from edgepack.export._fixed_point import HIGH, LOW, exponent, hold_sums, largest_sum  # noqa: E402
from edgepack.export.c import C  # noqa: E402
from edgepack.export.coreml import Coreml  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.export.tensorrt import Tensorrt  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.progress import Silent  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
WIDE: dict[str, Any] = {"weight_bits": 8, "activation_bits": 16}


class Block(nn.Module):
    """A residual block behind a convolution, depthwise and pointwise ones, a pool, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(5, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        with torch.no_grad():
            self.two.weight.mul_(30.0)  # a part of the sum has a step of its own, and the sum a third
            self.two.bias.add_(0.25)
        self.depth = nn.Conv2d(16, 16, 3, groups=16, stride=2, padding=1)
        self.point = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        x = nn.functional.leaky_relu(self.depth(x), 0.1)
        return self.head(nn.functional.max_pool2d(torch.relu(self.point(x)), 2).mean((2, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wide")
    compressed(out, Block(), explain=False, **WIDE)
    return out


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return export(folder, [Tflite(name="wide")], Silent())[0].artifact


@given(st.floats(1e-6, 1e6))
def test_a_value_is_off_by_half_a_step_at_most(largest: float) -> None:
    step = 2.0 ** exponent(largest)
    values = np.linspace(-largest, largest, 101)
    whole = np.clip(np.rint(values / step), LOW, HIGH)
    assert np.abs(whole * step - values).max() <= step / 2 * (1 + 1e-12)
    assert largest / step > HIGH / 2 - 1  # no exponent less would do


@given(st.integers(-40, 40))
def test_powers_of_two_are_exact(power: int) -> None:
    assert exponent(2.0**power) == power - 14
    assert math.ldexp(1, 14 + exponent(2.0**power)) == 2.0**power


def test_a_tensor_of_zeros_and_one_that_just_does_not_fit() -> None:
    assert exponent(0.0) == 0
    assert exponent(32767 / 16384) == -14
    assert exponent(32767.9 / 16384) == -13  # rounded it would be 32,768


@given(st.integers(0, 2**32 - 1))
def test_sums_are_bounded_by_the_worst_input(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (4, 3, 2, 2)).astype(np.int8)
    bias = rng.integers(-(2**26), 2**26, 4).astype(np.int32)
    worst = np.where(weight.reshape(4, -1) * np.sign(bias)[:, None] >= 0, -LOW, LOW)
    sums = (worst * weight.reshape(4, -1).astype(np.int64)).sum(1) + bias
    assert largest_sum(weight, bias) == np.abs(sums).max()


def test_sums_that_do_not_fit_are_refused_by_name() -> None:
    assert "they take 3 bits at most" in hold_sums({"a": 4})
    assert "1 of 2 layers would fit 32" in hold_sums({"a": 4, "b": 1 << 40})
    with pytest.raises(Unsupported, match=r"times big\.weight may take 48 bits, engines have 47") as error:
        hold_sums({"small.weight": 4, "big.weight": 1 << 47})
    assert error.value.hint == "leave = ['big'] in quantize"


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=5))
def test_scales_of_fifteen_digits(scales: list[float]) -> None:
    found = multipliers(torch.tensor(scales)).double().numpy()
    np.testing.assert_allclose(found, np.float32(scales), rtol=2.0**-15)
    fraction, _ = np.frexp(found)
    assert np.array_equal(fraction * 2**15, np.rint(fraction * 2**15))


def test_the_plan_has_sixteen_bits_and_scales_that_engines_have(source: Source) -> None:
    bits = {entry["range"]["bits"] for entry in source.plan.nodes.values() if "range" in entry}
    assert bits == {16}
    for name, scale in source.plan.tensors.items():
        if name.endswith("/weight_scale"):
            assert np.array_equal(multipliers(torch.from_numpy(scale)).numpy(), scale)


def test_the_file_computes_its_simulation_exactly_but_for_single_steps(artifact: Artifact) -> None:
    parity = artifact.manifest.parity
    assert artifact.manifest.dialect == "s16s8-tflite"
    assert parity.status == "checked"
    assert parity.rounded >= 7
    assert parity.rounded_otherwise < 5e-3
    assert parity.max_rel is not None
    assert parity.max_rel < 2e-4


def test_weighted_operators_and_sums_read_integers_of_sixteen_bits(artifact: Artifact) -> None:
    model = model_of(artifact)
    (main,) = model.subgraphs
    words = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    kinds: dict[str, list[list[int]]] = {}
    for operator in main.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        word = words[max(code.builtinCode, code.deprecatedBuiltinCode)]
        kinds.setdefault(word, []).append([main.tensors[int(t)].type for t in (*operator.inputs, *operator.outputs)])
    types = schema.TensorType
    weighted = [types.INT16, types.INT8, types.INT64, types.INT16]
    assert kinds["CONV_2D"] == [weighted] * 4
    assert kinds["DEPTHWISE_CONV_2D"] == [weighted]
    assert kinds["FULLY_CONNECTED"] == [weighted]
    assert kinds["ADD"] == [[types.INT16] * 3]
    steps = [main.tensors[int(t)].quantization.scale[0] for operator in main.operators
             if words[model.operatorCodes[operator.opcodeIndex].builtinCode] == "ADD"
             for t in (*operator.inputs, *operator.outputs)]  # fmt: skip
    assert len(set(steps)) > 1
    for tensor in main.tensors:
        if tensor.type == types.INT16:
            fraction, _ = math.frexp(float(tensor.quantization.scale[0]))
            assert fraction == 0.5
    notes = " ".join(artifact.manifest.census["notes"])
    assert "no sum of products overflows" in notes
    assert "smaller, not faster" in notes


def test_it_is_nearer_to_the_float_network_than_eight_bits(folder: Path, source: Source, tmp_path: Path) -> None:
    """Same weights of 8 bits: what is left are the activations."""
    from edgepack.graph import run_graph

    golden = Artifact.open(folder / "compressed").golden()
    eight = compressed(tmp_path, Block(), explain=False)
    levels = []
    for one in (source, eight):
        rounded, exact = run_graph(simulation_of(one), golden.inputs), run_graph(one.graph, golden.inputs)
        level = sqnr_db(next(iter(rounded.values())), next(iter(exact.values())))
        assert level is not None
        levels.append(level)
    assert levels[0] > 70
    assert levels[0] > levels[1] + 30


def test_a_wrong_bias_is_found_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _tflite_quantized._Rewriter._bias

    def wrong(self: Any, operator: Any, steps: np.ndarray, wide: bool = False) -> int:
        return plain(self, operator, steps * np.where(len(steps) == 24, 1.5, 1.0), wide)

    monkeypatch.setattr(_tflite_quantized._Rewriter, "_bias", wrong)
    with pytest.raises(ParityError, match=r"point"):
        export(folder, [Tflite(name="wrong")], Silent())


@pytest.mark.parametrize("exporter", [Onnx(), Openvino(), Coreml(), C(), Tensorrt()], ids=lambda e: e.format)
def test_other_formats_refuse(source: Source, exporter: Exporter) -> None:
    with pytest.raises(Unsupported, match=r"no activations of 16 bits \(\w+ reads them\)") as error:
        exporter.lower(source.graph, source.plan)
    assert error.value.exit_status == 7
    assert error.value.hint == "activation_bits = 8 in quantize, or export to tflite"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 4, "activation_bits": 16}, "activation_bits = 16 is for weight_bits = 8"),
        ({**WIDE, "activations": "dynamic"}, "activation_bits = 16 is for weight_bits = 8 and activations = 'static'"),
        ({**WIDE, "method": "qat"}, "activation_bits = 16 leaves nothing to train"),
        ({**WIDE, "target": "avx2"}, "is for 8-bit activations: 16-bit ones are no bytes"),
        ({"weight_bits": 8, "activation_bits": 12}, "activation_bits is 4, 8 or 16, not 12"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)
