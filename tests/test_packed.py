"""4-bit weights in files: two in a byte, or in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.errors import ParityError, Unsupported  # noqa: E402
from edgepack.export import _onnx_packed  # noqa: E402
from edgepack.export._packed import hold_packed, nibbles, unpacked  # noqa: E402
from edgepack.export.c import C  # noqa: E402
from edgepack.export.coreml import Coreml  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

FORMS: dict[str, dict[str, Any]] = {"float": {"weight_bits": 4}, "static": {"weight_bits": 4, "activation_bits": 8}}
PACKED_BYTES = {"square": 158, "depth": 32, "point": 18, "head": 8}  # ⌈n / 2⌉ of 315, 63, 35 and 15 values
FIRST_BYTES = 135  # of 8 bits


class Odd(nn.Module):
    """Odd numbers of values everywhere: of each weight, and of each row of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.square = nn.Conv2d(5, 7, 3)
        self.depth = nn.Conv2d(7, 7, 3, groups=7, padding=1)
        self.point = nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.square(torch.relu(self.first(x))))
        y = torch.relu(self.point(torch.relu(self.depth(y))))
        return self.head(y.mean((2, 3)))


def samples(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 10, 10)).astype(np.float32)


def made(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    task = Task((Input("x", (1, 3, 10, 10)),), calibration=Samples(samples(24, 0)))  # type: ignore[arg-type]
    compress(Odd().eval(), task, [Quantize(explain=False, **options)], folder, Silent())
    return folder


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, made(tmp_path_factory.mktemp(request.param), **FORMS[request.param])


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("static"), **FORMS["static"])


def written(folder: Path, exporter: Exporter) -> Artifact:
    artifact = export(folder, [exporter], Silent())[0].artifact
    assert artifact.manifest.parity.status == "checked"
    assert artifact.manifest.census is not None
    return artifact


def stored_bytes(artifact: Artifact, dtype: str) -> int:
    assert artifact.manifest.census is not None
    return int(artifact.manifest.census["weight_bytes"].get(dtype, 0))


def said(artifact: Artifact) -> str:
    assert artifact.manifest.census is not None
    return " ".join(artifact.manifest.census["notes"])


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=40))
def test_two_values_lie_in_a_byte_as_onnx_says(values: list[int]) -> None:
    integers = np.array(values, np.int8).reshape(1, -1)
    data = nibbles(integers)
    assert len(data) == (len(values) + 1) // 2
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, integers.shape, data.tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), integers)
    np.testing.assert_array_equal(unpacked(data, integers.shape), integers)


def test_onnx_packed_and_fast_compute_the_same(form: tuple[str, Path]) -> None:
    kind, folder = form
    packed, fast = (written(folder, Onnx(name=f"onnx-{w}", weights=w)) for w in (None, "fast"))
    # ONNX Runtime computes narrow depthwise layers and the first one in float, where activations are rounded.
    wanted = sum(PACKED_BYTES.values()) - (PACKED_BYTES["depth"] if kind == "static" else 0)
    assert stored_bytes(packed, "int4") == wanted
    assert stored_bytes(fast, "int4") == 0
    inputs = {"x": samples(5, 3)}
    answers = [ort.InferenceSession(str(a.file(".onnx"))).run(None, inputs)[0] for a in (packed, fast)]
    np.testing.assert_array_equal(*answers)
    assert onnx.load(packed.file(".onnx")).opset_import[0].version == 21
    assert onnx.load(fast.file(".onnx")).opset_import[0].version == 20
    assert ("smaller, not faster" in said(packed)) == (kind == "float")
    assert ("3 QLinearConv" in said(packed)) == (kind == "static")


def test_ranges_found_at_run_time(tmp_path: Path) -> None:
    """Bytes by default; packed ones lead ONNX Runtime to the same operators."""
    made(tmp_path, weight_bits=4, activation_bits=8, activations="dynamic")
    fast, packed = (written(tmp_path, Onnx(name=f"onnx-{w}", weights=w)) for w in (None, "packed"))
    assert stored_bytes(fast, "int4") == 0
    assert stored_bytes(packed, "int4") == sum(PACKED_BYTES.values())
    assert "1 DynamicQuantizeMatMul" in said(packed)


def test_openvino_packed_and_fast(form: tuple[str, Path]) -> None:
    pytest.importorskip("openvino")
    kind, folder = form
    packed, default = (written(folder, Openvino(name=f"openvino-{w}", weights=w)) for w in ("packed", None))
    assert stored_bytes(packed, "int4") == sum(PACKED_BYTES.values())
    assert stored_bytes(packed, "int8") == FIRST_BYTES
    assert stored_bytes(default, "int4") == (sum(PACKED_BYTES.values()) if kind == "float" else 0)
    if kind == "static":
        assert "runs 1 Convolution in 8 bits here 4 weights lie in 4 bits: smaller, not faster" in said(packed)
        assert "4 Convolution, 1 FullyConnected in 8 bits" in said(default)


def test_tflite_packs_weights_beside_float_activations(form: tuple[str, Path]) -> None:
    for package in ("litert_torch", "ai_edge_litert"):
        pytest.importorskip(package)
    kind, folder = form
    artifact = written(folder, Tflite())
    assert stored_bytes(artifact, "int4") == (sum(PACKED_BYTES.values()) if kind == "float" else 0)
    if kind == "float":
        assert "4 weights lie in 4 bits: smaller, not faster" in said(artifact)
        assert artifact.manifest.parity.max_rel is not None
        assert artifact.manifest.parity.max_rel < 1e-6
    else:
        with pytest.raises(Unsupported, match="XNNPACK does not take packed weights of 4 bits"):
            export(folder, [Tflite(weights="packed")], Silent())


def test_coreml_packs_for_systems_that_read_it(form: tuple[str, Path]) -> None:
    pytest.importorskip("coremltools")
    _, folder = form
    packed, fast = (written(folder, Coreml(name=f"coreml-{t}", target=t)) for t in ("iOS18", "iOS17"))
    assert stored_bytes(packed, "int4") >= sum(PACKED_BYTES.values()) - PACKED_BYTES["depth"]
    assert stored_bytes(fast, "int4") == 0
    assert "weights lie in 4 bits" in said(packed)


def test_c_computes_four_bits_in_bytes_beside_integers_alone(form: tuple[str, Path]) -> None:
    kind, folder = form
    if kind == "static":
        parity = export(folder, [C()], Silent())[0].artifact.manifest.parity
        assert parity.status == "checked"
        assert parity.max_rel is not None
        assert parity.max_rel < 1e-6
        return
    with pytest.raises(Unsupported, match="the C target has no integer weights beside float activations") as error:
        export(folder, [C()], Silent())
    assert error.value.exit_status == 7
    assert error.value.hint == "activation_bits = 8 and activations = 'static' in quantize"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Onnx(weights="small"), "weights is 'packed', 'fast' or left out, not 'small'"),
        (lambda: Openvino(weights="small"), "weights is 'packed', 'fast' or left out"),
        (lambda: Tflite(weights="small"), "weights is 'packed', 'fast' or left out"),
        (lambda: Coreml(weights="packed"), "weights = 'packed' is for iOS18, and target is 'iOS17'"),
        (lambda: Coreml(weights="fast", target="iOS18"), "weights = 'fast' is for iOS17 or older"),
    ],
)
def test_options_that_no_file_can_have(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_eight_bits_cannot_be_packed(tmp_path: Path) -> None:
    made(tmp_path)
    for exporter in (Onnx(weights="packed"), Openvino(weights="packed"), Tflite(weights="packed")):
        with pytest.raises(Unsupported, match="packs weights of 4 bits, and the plan has weights of 8 bits"):
            exporter.lower(Source.open(tmp_path / "compressed").graph, Source.open(tmp_path / "compressed").plan)


def test_a_weight_that_is_not_packed_is_named(static: Path) -> None:
    source = Source.open(static / "compressed")
    simulation = Onnx().lower(source.graph, source.plan)
    with pytest.raises(ParityError, match=r"square.* is planned in 4 bits, the file holds it otherwise"):
        hold_packed([], simulation)


def test_a_wrong_sign_in_a_packed_weight_is_found(static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(integers: np.ndarray) -> np.ndarray:
        changed = integers.copy()
        changed[0] *= -1 if integers.shape == (7, 5, 3, 3) else 1
        return nibbles(changed)

    monkeypatch.setattr(_onnx_packed, "nibbles", wrong)
    with pytest.raises(ParityError, match=r"first operator that diverges: .*square"):
        export(static, [Onnx(name="wrong")], Silent())


def test_packed_constants_of_openvino_own_their_memory() -> None:
    """Many, so that memory which a constant only borrowed would have been given to others."""
    ov = pytest.importorskip("openvino")
    from edgepack.export._openvino_packed import pack, values

    wanted = np.random.default_rng(0).integers(-7, 8, (40, 16, 16, 3, 3)).astype(np.int8)
    x = ov.opset13.parameter([16, 16, 3, 3], np.int8)
    model = ov.Model([ov.opset13.add(x, ov.opset13.constant(array)) for array in wanted], [x])
    pack(ov, model)
    again = [np.zeros(16 * 16 * 9 // 2, np.uint8) for _ in range(400)]
    found = [values(node) for node in model.get_ops() if node.get_type_name() == "Constant"]
    assert len(again) == 400
    assert {array.tobytes() for array in found} == {array.tobytes() for array in wanted}
