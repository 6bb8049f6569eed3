"""Integer artifacts operator by operator: seeded faults are found and named, sound files raise no alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from torch import Tensor, nn  # noqa: E402

from edgepack.artifact import Artifact, describe_files  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Graph, Step  # noqa: E402
from edgepack.data import Batch  # noqa: E402
from edgepack.errors import ParityError  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.exporting import export, simulation_of  # noqa: E402
from edgepack.parity import runtime_for  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.proof import prove  # noqa: E402
from edgepack.stepwise import THINNED, Stepwise, _Comparison, _Grid, _same_zero, _Tensors, _thinned, stepwise  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402
from onnx import numpy_helper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
SHAPE = (1, 3, 12, 12)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last((self.second(x) + x).mean((2, 3)))


class Noise:
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 16

    def batches(self, size: int) -> Any:
        values = np.random.default_rng(0).standard_normal((16, *SHAPE[1:])).astype(np.float32)
        for start in range(0, 16, size):
            part = {"x": values[start : start + size]}
            yield Batch(part, part, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stepwise")
    task = Task((Input("x", SHAPE),), calibration=Noise())  # type: ignore[arg-type]
    compress(Network().eval(), task, [Quantize()], folder, Silent())
    return export(folder, [Onnx()], Silent())[0].artifact


@pytest.fixture(scope="module")
def simulation(made: Artifact) -> Graph:
    return simulation_of(made)


def look(artifact: Artifact, simulation: Graph) -> Stepwise:
    steps = runtime_for(artifact.manifest.format).trace(artifact, artifact.golden().inputs)
    return stepwise(simulation, artifact.golden().inputs, steps)


def changed(artifact: Artifact, name: str, change: Callable[[Any], Any]) -> Artifact:
    """The same artifact with one stored tensor changed, its hashes in order."""
    folder = artifact.folder.parent / "changed"
    folder.mkdir(exist_ok=True)
    for path in artifact.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = onnx.load(folder / "model.onnx")
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, folder / "model.onnx")
    files = {**artifact.manifest.files, "model.onnx": describe_files(folder)["model.onnx"]}
    return Artifact(folder, replace(artifact.manifest, files=files))


def spoil(values: Any) -> Any:
    """A fault as converters make them: a sign, a scale that is 5 % off, a zero point or bias that is some steps off."""
    flat = values.reshape(-1)
    if values.dtype == np.float32:
        flat *= 1.05
    elif values.dtype == np.int8 and values.ndim > 1:
        flat[np.abs(flat.astype(int)).argmax()] *= -1
    elif values.dtype == np.int32:
        flat[np.abs(flat).argmax()] = -flat[np.abs(flat).argmax()] + 500
    else:
        flat += np.where(flat < 100, 3, -3).astype(values.dtype)
    return values


def test_sound_file(made: Artifact, simulation: Graph) -> None:
    found = look(made, simulation)
    assert found.fault is None
    assert found.absent == 0
    assert found.compared >= 4
    assert made.manifest.parity.rounded == found.compared
    assert made.manifest.parity.rounded_otherwise is not None
    assert made.manifest.parity.rounded_otherwise <= 1e-3


def test_every_stored_tensor_matters(made: Artifact, simulation: Graph) -> None:
    model = onnx.load(made.file(".onnx"))
    named = {}
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind in "fiu" and values.dtype != np.int64 and values.size and np.any(values):
            found = look(changed(made, tensor.name, spoil), simulation)
            assert found.fault is not None, tensor.name
            if values.ndim > 1:
                named[values.shape] = found.fault.layer
    assert named == {(8, 3, 3, 3): "first", (8, 8, 3, 3): "second", (6, 8): "last"}


def test_proof_raises_and_names_the_operator(made: Artifact, simulation: Graph) -> None:
    model = onnx.load(made.file(".onnx"))
    weight = next(tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [8, 8, 3, 3])
    with pytest.raises(ParityError, match=r"first operator that diverges: conv2d of 'second'") as raised:
        prove(changed(made, weight, spoil), runtime_for("onnx"), simulation)
    assert raised.value.details["layer"] == "second"


def test_fault_too_small_for_the_outputs_is_found(made: Artifact, simulation: Graph) -> None:
    """A limit that a deep network needs lets the outputs pass; the operator does not."""
    lax = replace(made.manifest, parity=replace(made.manifest.parity, least_db=10.0))
    model = onnx.load(made.file(".onnx"))
    weight = next(tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [8, 3, 3, 3])
    wrong = changed(Artifact(made.folder, lax), weight, spoil)
    with pytest.raises(ParityError, match=r"the outputs agree, an operator does not; .*'first'"):
        prove(wrong, runtime_for("onnx"), simulation)


def test_other_engines_show_their_rounded_values(made: Artifact) -> None:
    pytest.importorskip("openvino")
    artifact = export(made.folder.parent, [Openvino()], Silent())[0].artifact
    assert look(artifact, simulation_of(artifact)).fault is None
    assert artifact.manifest.parity.rounded >= 3


def test_float_tensors_off_the_grid_do_not_count(made: Artifact, simulation: Graph) -> None:
    """Values that are on no grid are not what was rounded; an engine may do without, outputs still count."""
    steps = runtime_for("onnx").trace(made, made.golden().inputs)
    floats = [
        Step(step.operator, step.name, step.inputs, {k: v for k, v in step.outputs.items() if v.dtype == np.float32})
        for step in steps
        if step.operator not in ("QuantizeLinear", "DequantizeLinear")
    ]
    found = stepwise(simulation, made.golden().inputs, floats)
    assert (found.compared, found.fault) == (0, None)
    assert found.absent >= 4


def test_layouts(made: Artifact, simulation: Graph) -> None:
    """Channels last in the file, channels first in the simulation."""
    steps = [
        Step(step.operator, step.name, step.inputs,
             {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in step.outputs.items()})
        for step in runtime_for("onnx").trace(made, made.golden().inputs)
    ]  # fmt: skip
    assert stepwise(simulation, made.golden().inputs, steps).fault is None


class Residuals(nn.Module):
    """Linear layers whose small differences would travel along the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.first(x))
        x = x + torch.relu(self.second(x))
        return self.last(x).mean((1, 2))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Graph]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dynamic")
    task = Task((Input("x", SHAPE),), calibration=Noise())  # type: ignore[arg-type]
    compress(Residuals().eval(), task, [Quantize(activations="dynamic", explain=False)], folder, Silent())
    artifact = export(folder, [Onnx()], Silent())[0].artifact
    return artifact, simulation_of(artifact)


def test_values_rounded_at_run_time_are_compared_too(dynamic: tuple[Artifact, Graph]) -> None:
    found = look(*dynamic)
    assert found.fault is None
    assert (found.compared, found.absent) == (3, 0)
    assert dynamic[0].manifest.parity.rounded == 3


def test_faults_in_layers_that_round_at_run_time_are_found_where_they_are(dynamic: tuple[Artifact, Graph]) -> None:
    artifact, simulation = dynamic
    named = []
    for tensor in onnx.load(artifact.file(".onnx")).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.int8 and values.ndim > 1:
            fault = look(changed(artifact, tensor.name, spoil), simulation).fault
            assert fault is not None
            named.append(fault.node)
    assert len(named) == len(set(named)) == 3


@pytest.mark.parametrize(("by", "left"), [(0, 0), (1, 0), (-1, 0), (2, 1)])
def test_a_zero_found_at_run_time_may_be_rounded_the_other_way(by: int, left: int) -> None:
    wanted = np.arange(10, 200, dtype=np.uint8)
    found = _same_zero((wanted.astype(int) + by).astype(np.uint8), wanted)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted + left)


@pytest.mark.parametrize("shape", [(), (7,), (1, 3, 5, 5), (1, 64, 200, 300), (1, 2_000_000), (300, 300, 1)])
def test_what_shows_a_large_tensor_is_small_and_the_same_of_each_layout(shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    some = _thinned(array)
    assert some.size <= THINNED
    assert some.size == array.size or some.size > THINNED / 9
    turned = np.ascontiguousarray(np.moveaxis(array, 0, -1)) if shape else array
    np.testing.assert_array_equal(_thinned(np.moveaxis(turned, -1, 0) if shape else turned), some)


def test_the_nearest_of_large_tensors_is_found_where_few_elements_tell_them_apart() -> None:
    random = np.random.default_rng(0)
    wanted = random.integers(-128, 128, (1, 12, 90, 80)).astype(np.int8)
    seen = np.zeros(wanted.shape, bool)
    _thinned(seen)[...] = True
    hidden = np.argwhere(~seen)
    tensors = {"noise": random.integers(-128, 128, wanted.shape).astype(np.int8)}
    for count in (3, 1, 2):  # so many elements of what is not looked at first are others
        tensors[f"apart {count}"] = wanted.copy()
        for place in hidden[:count]:
            tensors[f"apart {count}"][tuple(place)] ^= 1
    tensors["off the grid"] = wanted * np.float32(0.5)
    tensors["off the grid"][tuple(hidden[0])] += 0.2
    steps = [Step("Conv", name, (), {name: value}) for name, value in tensors.items()]
    found = _Comparison(_Tensors.of(steps))._nearest(wanted, _Grid(0.5, 0.0))
    assert found is not None
    assert found[0].name == "apart 1"
    assert _Comparison(_Tensors.of(steps[-1:]))._nearest(wanted, _Grid(0.5, 0.0)) is None
