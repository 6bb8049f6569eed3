"""Quantization-aware training: what is trained, what is learned, and what reaches plan and files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("brevitas", reason="pip install 'edgepack[qat]'")
from torch import Tensor, nn  # noqa: E402

from edgepack import recipe  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress import _learning  # noqa: E402
from edgepack.compress._activations import grid  # noqa: E402
from edgepack.compress._learning import activation_rounding, weight_rounding  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress._tune_epochs import Epochs  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Pass  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import InputError, MissingExtra  # noqa: E402
from edgepack.export._integer_dialect import CONVOLUTIONS, RELUS, Dialect  # noqa: E402
from edgepack.export._qdq import quantized  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
ITEM = Input("x", (1, 3, 8, 8))
# What brevitas rounds, and nothing else; biases stay float.
PLAIN = Dialect("u8s8-plain", fused=RELUS, integer=frozenset(), every_output=CONVOLUTIONS, narrow=True,
                float_bias=CONVOLUTIONS | {"linear"})  # fmt: skip


class Net(nn.Module):
    """A batch norm, a shortcut, a value below zero that is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.head(self.three(torch.tanh(x - 0.5)).mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2
    for seed in range(5):
        net.train()(torch.from_numpy(images(16, seed)))
    return net.eval()


def images(count: int, seed: int) -> np.ndarray:
    """Neighbouring pixels are alike, as in pictures."""
    rough = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3, 4, 4)).astype(np.float32))
    return torch.nn.functional.interpolate(rough, 8, mode="bilinear").numpy()


def task_with(training: int = 128) -> Task:
    kept = [Arrays((ITEM,), {"x": images(count, seed)}, None, True) for count, seed in ((32, 10), (training, 11))]
    return Task((ITEM,), calibration=kept[0], training=kept[1])


def made(folder: Path, **options: Any) -> Source:
    settings: dict[str, Any] = {"weight_bits": 4, "activation_bits": 4, "method": "qat", "explain": False} | options
    compress(network(), task_with(), [Quantize(**settings)], folder, Silent())
    return Source.open(folder / "compressed")


def tuned(**options: Any) -> Tune:
    return Tune(**{"optimizer": "adamw", "epochs": 4, "batch": 16, "held_out": 0, "lr": 0.002} | options)  # type: ignore[arg-type]


ROUGH: dict[str, Any] = {"rounding": "nearest", "bias_correct": False, "equalize": False, "calibrate": "minmax"}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Not trained, and worse than it could be."""
    return made(tmp_path_factory.mktemp("ptq"), method="ptq", **ROUGH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qat")


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Source, nn.Module]:
    """The result, and the module that was trained."""
    kept: list[nn.Module] = []
    plain = _learning.tune

    def tune(module: nn.Module, *rest: Any) -> nn.Module:
        kept.append(module)
        return plain(module, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_learning, "tune", tune)
        source = made(folder, tune=tuned(), **ROUGH)
    return source, kept[0]


def roundings(module: nn.Module) -> dict[str, Any]:
    return dict(getattr(module, _learning.PLACE).items())


def weight_of(module: nn.Module, key: str) -> Tensor:
    """As the network has it, before rounding."""
    found: Tensor = roundings(module)[f"{key}/weight/unit"](module.get_parameter(f"{key}.weight"))
    return found


def test_plan_has_the_learned_steps(trained: tuple[Source, nn.Module]) -> None:
    source, module = trained
    found = roundings(module)
    values = {key.removesuffix("/value"): item for key, item in found.items() if key.endswith("/value")}
    moved = 0
    for name, rounding in values.items():
        if "/" in name:  # of a weight
            continue
        known = source.plan.nodes["input:x" if name == "x" else name]["range"]
        step, zero = rounding.grid()
        assert grid(known["low"], known["high"], known["bits"])[:2] == (pytest.approx(float(step), rel=1e-6), zero)
    for key in ("one", "two", "three", "first", "head"):
        rounding = found[f"{key}/weight/value"]
        step = rounding.grid()[0].flatten().numpy()
        (scale,) = (scale for name, scale in source.plan.tensors.items()
                    if len(scale) == len(step) and np.array_equal(scale, step))  # fmt: skip
        moved += len(scale)
    assert moved == 8 * 4 + 4


def test_weights_lie_on_their_grids(trained: tuple[Source, nn.Module]) -> None:
    source, module = trained
    state = source.graph.program.state_dict
    for key, bits in (("first", 8), ("one", 4), ("two", 4), ("three", 4), ("head", 8)):
        rounding, weight = roundings(module)[f"{key}/weight/value"], weight_of(module, key)
        torch.testing.assert_close(state[f"{key}.weight"], rounding(weight).detach(), atol=1e-6, rtol=1e-5)
        whole = state[f"{key}.weight"] / rounding.grid()[0]
        torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
        assert whole.abs().max() < (1 << bits - 1) - 0.9


def test_simulation_computes_what_was_trained(trained: tuple[Source, nn.Module]) -> None:
    source, module = trained
    x = images(32, 20)
    simulation = quantized(source.graph, source.plan, PLAIN)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x))[0].numpy()
    found = run_graph(simulation, {"x": x})["output"]
    assert np.quantile(np.abs(found - wanted).max(1), 0.9) < 1e-5  # a tie that rounds the other way shows more


def noise(source: Source) -> float:
    x = images(256, 30)
    with torch.no_grad():
        wanted = network()(torch.from_numpy(x)).numpy()
    found = run_graph(quantized(source.graph, source.plan, PLAIN), {"x": x})["output"]
    return float(np.square(found - wanted).mean())


def history(folder: Path) -> dict[str, Any]:
    (entry,) = Artifact.open(folder / "compressed").manifest.history
    return dict(entry)


def test_training_brings_a_bad_start_nearer_to_the_original(
    before: Source, trained: tuple[Source, nn.Module], folder: Path
) -> None:
    assert noise(trained[0]) < 0.7 * noise(before)
    losses = [row["loss"] for row in history(folder)["findings"]["tune"]["epochs"] if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_training_begins_where_rounding_after_training_ended(
    before: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not trained at all, the result is that of ``ptq`` but for the rounding of logarithms."""
    monkeypatch.setattr(_learning, "tune", lambda module, *rest: module)
    one, other = made(tmp_path, **ROUGH), before
    for name in ("input:x", "relu", "relu_1", "tanh", "conv2d_2", "conv2d_3", "mean"):
        found, wanted = (
            grid(known["low"], known["high"], known["bits"])
            for known in (source.plan.nodes[name]["range"] for source in (one, other))
        )
        assert found[0] == pytest.approx(wanted[0], rel=1e-6)
        assert found[1:] == wanted[1:]
    for name, tensor in other.graph.program.state_dict.items():
        torch.testing.assert_close(one.graph.program.state_dict[name], tensor, atol=1e-6, rtol=1e-5)


class Tied(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.head = (nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 1) for _ in range(3)))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(torch.relu(self.first(x)))))))


def test_layers_with_one_weight_lie_on_the_grids_of_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weight_bits": 4, "activation_bits": 4, "explain": False, "method": "qat"}
    compress(Tied().eval(), task_with(), [Quantize(**options, tune=tuned(epochs=1))], tmp_path, Silent())
    source = Source.open(tmp_path / "compressed")
    simulation = quantized(source.graph, source.plan, PLAIN)  # which refuses weights that are off their grids
    assert sum("dequantize_per_channel" in str(node.target) for node in simulation.program.graph.nodes) == 4


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(4, 8), (8, 8)])
def test_other_bits_are_trained_too(bits: tuple[int, int], tmp_path: Path) -> None:
    source = made(tmp_path, weight_bits=bits[0], activation_bits=bits[1], tune=tuned(epochs=1))
    kinds = {entry["weight"]["bits"] for entry in source.plan.nodes.values() if "weight" in entry}
    assert kinds == {8, bits[0]}
    assert {entry["range"]["bits"] for entry in source.plan.nodes.values() if "range" in entry} == {8}


def test_files_of_a_trained_network_are_proved(trained: tuple[Source, nn.Module], folder: Path) -> None:
    onnx = pytest.importorskip("edgepack.export.onnx")
    pytest.importorskip("onnxruntime")
    artifact = export(folder, [onnx.Onnx()], Silent())[0].artifact
    assert artifact.manifest.parity.status == "checked"
    assert "3 weights lie in 4 bits" in artifact.manifest.census["notes"][1]  # type: ignore[index]


def test_interrupted_training_goes_on_to_the_same_result(
    trained: tuple[Source, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Epochs._epoch

    def interrupted(self: Epochs) -> None:
        if self.state.epochs == 1:
            raise KeyboardInterrupt
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Epochs, "_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, tune=tuned(), **ROUGH)
    resumed, calm = made(tmp_path, tune=tuned(), **ROUGH), trained[0]
    assert any("tune: went on after epoch 1" in note for note in history(tmp_path)["notes"])
    assert resumed.plan.nodes == calm.plan.nodes
    for name, tensor in calm.graph.program.state_dict.items():
        assert torch.equal(resumed.graph.program.state_dict[name], tensor), name


@pytest.mark.parametrize(("low", "high", "bits"), [(-1.0, 2.0, 4), (0.0, 2.0, 4), (-3.0, 0.0, 8)])
def test_quantizers_round_as_pytorch_does(low: float, high: float, bits: int) -> None:
    """And nothing but the step is learned."""
    torch.manual_seed(0)
    x = 3 * torch.randn(1000)
    rounding = activation_rounding((low, high), bits)
    torch.testing.assert_close(rounding(x), torch.fake_quantize_per_tensor_affine(x, *grid(low, high, bits)))
    learned = [name for name, value in rounding.named_parameters() if value.requires_grad]
    assert learned == ["quantizer.scaling_impl.value"]


def test_steps_have_the_gradient_of_the_paper() -> None:
    """Of the logarithm to base 2: d / d log₂ s = s · ln 2 · d / ds, with d / ds as PyTorch has it."""
    torch.manual_seed(0)
    x, weights, scale = 3 * torch.randn(1000), torch.randn(1000), torch.tensor([2.0 / 15], requires_grad=True)
    rounding = activation_rounding((0.0, 2.0), 4)
    wanted = torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.zeros(1), 0, 15, 1.0)
    (rounding(x) * weights).sum().backward()
    (wanted * weights).sum().backward()
    (learned,) = (value.grad for value in rounding.parameters())
    assert learned is not None
    assert scale.grad is not None
    assert float(learned) == pytest.approx(float(scale.grad) * 2.0 / 15 * np.log(2), rel=1e-3)


def test_weights_have_a_step_per_row() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(5, 3, 2, 2), torch.tensor([0.05, 0.1, 0.2, 0.3, 1.0])
    found = weight_rounding(scale, 4, 4)(weight)
    wanted = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(5, dtype=torch.int32), 0, -7, 7)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "train"}, "method is one of ptq, qat, not 'train'"),
        ({"tune": Tune()}, "tune says how to train: method = 'qat'"),
        ({"method": "qat", "tune": Tune(features=("auto",))}, "tune.features name layers"),
        ({"method": "qat", "weight_bits": 4}, "method = 'qat' learns fixed ranges"),
        ({"method": "qat", "activations": "dynamic"}, "method = 'qat' learns fixed ranges"),
        ({"method": "qat", "target": "avx2"}, "target = 'avx2' is for method = 'ptq'"),
        ({"weight_bits": 8, "activation_bits": 4}, "activation_bits = 4 is for weight_bits = 4"),
        ({"weight_bits": 4, "activation_bits": 4, "activations": "auto"}, "activation_bits = 4 is for weight_bits = 4"),
        ({"weight_bits": 4, "activation_bits": 6}, "activation_bits is 4, 8 or 16, not 6"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


def test_what_is_missing_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task((ITEM,), calibration=task_with().calibration)
    with pytest.raises(InputError, match="the task has no training data"):
        Quantize(method="qat").check(network(), task)
    monkeypatch.setitem(sys.modules, "brevitas.core.quant", None)
    with pytest.raises(MissingExtra, match="the package 'brevitas' is not installed") as found:
        Quantize(method="qat").check(network(), task_with())
    assert found.value.hint == "pip install 'edgepack[qat]'"


def test_the_recipe_reaches_into_the_table() -> None:
    item = recipe.build(Pass, {"use": "quantize", "method": "qat", "tune": {"epochs": 7, "optimizer": "adamw"}})
    assert item.training == Tune(epochs=7, optimizer="adamw")  # type: ignore[attr-defined]
    assert Quantize(method="qat").training.optimizer == "adamw"
