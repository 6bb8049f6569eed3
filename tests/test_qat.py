"""Quantization-aware training: what is trained, what is learned, and what reaches plan and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("brevitas", reason="pip install 'edgepack[qat]'")
from torch import Tensor, nn  # noqa: E402

from edgepack.compress import _learning  # noqa: E402
from edgepack.compress._activations import grid  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.export._integer_dialect import CONVOLUTIONS, RELUS, Dialect  # noqa: E402
from edgepack.export._qdq import quantized  # noqa: E402
from edgepack.exporting import Source  # noqa: E402
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
        return self.head(torch.relu(self.three(torch.tanh(x - 0.5))).mean((2, 3)))


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
    return Tune(**{"optimizer": "adamw", "epochs": 3, "batch": 16, "held_out": 0, "lr": 0.003} | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, nn.Module]:
    """The result, and the module that was trained."""
    kept: list[nn.Module] = []
    plain = _learning.tune

    def tune(module: nn.Module, *rest: Any) -> nn.Module:
        kept.append(module)
        return plain(module, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_learning, "tune", tune)
        source = made(tmp_path_factory.mktemp("qat"), tune=tuned())
    return source, kept[0]


def roundings(module: nn.Module) -> dict[str, Any]:
    return dict(getattr(module, _learning.PLACE).items())


def test_plan_has_the_learned_steps(trained: tuple[Source, nn.Module]) -> None:
    source, module = trained
    found = roundings(module)
    values = {key.removesuffix("/value"): item for key, item in found.items() if key.endswith("/value")}
    moved = 0
    for name, rounding in values.items():
        known = source.plan.nodes["input:x" if name == "x" else name]["range"]
        step, zero = rounding.grid(torch.zeros(1))
        assert grid(known["low"], known["high"], known["bits"])[:2] == (pytest.approx(float(step), rel=1e-6), zero)
    for key in ("one", "two", "three", "first", "head"):
        rounding, weight = found[f"{key}/weight"], module.get_parameter(f"{key}.weight")
        step = rounding.grid(weight)[0].flatten().numpy()
        (scale,) = (scale for name, scale in source.plan.tensors.items()
                    if len(scale) == len(step) and np.array_equal(scale, step))  # fmt: skip
        moved += len(scale)
    assert moved == 8 * 4 + 4


def test_weights_lie_on_their_grids(trained: tuple[Source, nn.Module]) -> None:
    source, module = trained
    state = source.graph.program.state_dict
    for key, bits in (("first", 8), ("one", 4), ("two", 4), ("three", 4), ("head", 8)):
        rounding, weight = roundings(module)[f"{key}/weight"], module.get_parameter(f"{key}.weight")
        torch.testing.assert_close(state[f"{key}.weight"], rounding(weight).detach(), atol=1e-6, rtol=1e-5)
        whole = state[f"{key}.weight"] / rounding.grid(weight)[0]
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


def test_training_follows_the_original_better(trained: tuple[Source, nn.Module], tmp_path: Path) -> None:
    x = images(256, 30)
    with torch.no_grad():
        wanted = network()(torch.from_numpy(x)).numpy()
    before = made(tmp_path, method="ptq")
    errors = [float(np.square(run_graph(quantized(source.graph, source.plan, PLAIN), {"x": x})["output"] - wanted).mean())
              for source in (before, trained[0])]  # fmt: skip
    assert errors[1] < 0.8 * errors[0]
