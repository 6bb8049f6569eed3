from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from _c_files import captured, drawn, engine, worst, write  # noqa: E402
from _networks import Network, resnet20  # noqa: E402
from edgepack.contracts import Graph  # noqa: E402
from edgepack.divergence import first_divergence  # noqa: E402
from edgepack.errors import InputError, MissingExtra, Unsupported  # noqa: E402
from edgepack.graph import capture, recapture, run_graph  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
IMAGE, ROW = (1, 8, 12, 10), (1, 8, 20)
LIMIT = 1e-5  # of the largest value


def conv(outputs: int = 6, size: int = 3, **options: object) -> nn.Module:
    return nn.Conv2d(8, outputs, size, **options)


def resized(**options: object) -> Callable:
    return lambda layer, x: F.interpolate(layer(x), **options)


def each(function: Callable) -> tuple:
    """A function of single values, behind a convolution and into a sum, so that nothing of it is joined away."""
    return (lambda layer, x: function(layer(x)) + 0.5 * layer(x), (conv(),), IMAGE)


CASES = {
    "dense": (lambda c, x: c(x), (conv(21, padding=1),), IMAGE),
    "grouped": (lambda c, x: c(x), (conv(12, groups=4, padding=1),), IMAGE),
    "depthwise": (lambda c, x: c(x), (conv(8, groups=8, padding=1, stride=2),), IMAGE),
    "depthwise 5": (lambda c, x: F.relu6(c(x)), (conv(8, 5, groups=8, padding=2),), IMAGE),
    "depthwise twice": (lambda c, x: c(x), (conv(16, groups=8),), IMAGE),
    "depthwise odd": (lambda c, x: F.relu(c(x[:, :7])), (nn.Conv2d(7, 7, 3, groups=7, padding=1),), IMAGE),
    "dilated": (lambda c, x: c(x), (conv(padding=2, dilation=2),), IMAGE),
    "same": (lambda c, x: c(x), (nn.Conv2d(8, 6, (3, 5), padding="same", dilation=(1, 2)),), IMAGE),
    "uneven": (lambda c, x: c(x), (nn.Conv2d(8, 40, (3, 1), (1, 2), (2, 0)),), IMAGE),
    "pointwise": (lambda c, x: F.leaky_relu(c(x), 0.1), (conv(33, 1),), IMAGE),
    "one pixel": (lambda c, x: c(x), (nn.Conv2d(8, 18, (12, 10)),), IMAGE),
    "one channel": (lambda c, x: c(x[:, :1]), (nn.Conv2d(1, 5, 3, padding=1),), IMAGE),
    "conv 1d": (lambda c, x: F.relu(c(x)), (nn.Conv1d(8, 6, 3, 2, 1),), ROW),
    "residual": (lambda a, b, x: F.relu(a(x) + b(x)), (conv(8, padding=1), conv(8, 1)), IMAGE),
    "norm": (lambda n, x: n(x), (nn.BatchNorm2d(8),), IMAGE),
    "max": (lambda x: F.max_pool2d(x, 3, 2, 1), (), IMAGE),
    "max dilated": (lambda x: F.max_pool2d(x, 2, 1, 0, 3, ceil_mode=True), (), IMAGE),
    "max 1d": (lambda x: F.max_pool1d(x, 3, 2), (), ROW),
    "mean pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), (), IMAGE),
    "mean inside": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (), IMAGE),
    "mean beyond": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (), (1, 8, 11, 10)),
    "mean of": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (), IMAGE),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (3, 5)), (), IMAGE),
    "adaptive uneven": (lambda x: F.adaptive_avg_pool2d(x, (5, 3)), (), IMAGE),
    "global": (lambda c, x: c(x).mean((2, 3)), (conv(),), IMAGE),
    "contrast": (lambda c, x: c(x) * (c(x).mean((2, 3), True) + c(x).std((2, 3), keepdim=True)), (conv(),), IMAGE),
    "sums": (lambda x: torch.cat([x.sum(1), x.amax(2), x.mean((0, 3))[None]], 2), (), (1, 4, 4, 4)),
    "linear": (lambda n, x: n(x), (nn.Linear(20, 37),), ROW),
    "linear fused": (lambda n, m, x: F.relu(m(F.relu(n(x.flatten(1))))), (nn.Linear(160, 9), nn.Linear(9, 4)), ROW),
    "flattened": (lambda c, n, x: n(c(x).flatten(1)), (conv(stride=3), nn.Linear(72, 5)), IMAGE),
    "joined": (lambda c, x: torch.cat([c(x), x[:, 2:7], c(x) * 2], 1), (conv(padding=1),), IMAGE),
    "joined rows": (lambda c, x: torch.cat([c(x), x], 2), (conv(8, padding=1),), IMAGE),
    "shortcut": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)), (), IMAGE),
    "cut": (lambda c, x: F.pad(c(x), (-1, 2, 1, -2), value=3.0), (conv(),), IMAGE),
    "reflected": (lambda x: F.pad(F.pad(x, (1, 2, 0, 3), "reflect"), (1, 1, 2, 0), "replicate"), (), IMAGE),
    "parts": (lambda x: x.chunk(2, 1)[0] - x.split([3, 4, 1], 1)[1], (), IMAGE),
    "shuffle": (lambda c, x: F.pixel_shuffle(c(x), 2), (conv(12),), IMAGE),
    "unshuffle": (lambda c, x: c(F.pixel_unshuffle(x, 2)), (nn.Conv2d(32, 6, 3),), IMAGE),
    "groups mixed": (lambda x: x.view(1, 2, 4, 12, 10).transpose(1, 2).flatten(1, 2), (), IMAGE),
    "nearest": (resized(size=(17, 23), mode="nearest"), (conv(),), IMAGE),
    "nearest twice": (resized(scale_factor=2, mode="nearest"), (conv(),), IMAGE),
    "bilinear": (resized(scale_factor=1.3, mode="bilinear"), (conv(),), IMAGE),
    "corners": (resized(size=(7, 31), mode="bilinear", align_corners=True), (conv(),), IMAGE),
    "softmax": (lambda c, x: F.softmax(c(x), 1) + F.log_softmax(c(x), 3), (conv(),), IMAGE),
    "turned": (lambda c, x: c(x).permute(0, 2, 3, 1).flatten(0, 2), (conv(),), IMAGE),
    "rolled": (lambda x: x.flip(2).roll(3, 1), (), IMAGE),
    "scaled": (lambda x: (2 - x) / (x * x + 1) + torch.maximum(x, -x), (), IMAGE),
    "hardswish": each(F.hardswish), "hardsigmoid": each(F.hardsigmoid), "silu": each(F.silu), "gelu": each(F.gelu),
    "gelu tanh": each(lambda x: F.gelu(x, approximate="tanh")), "sigmoid": each(torch.sigmoid),
    "tanh": each(torch.tanh),
    "elu": each(lambda x: F.elu(x, 0.7)), "mish": each(F.mish), "softplus": each(lambda x: F.softplus(x, 2.0, 1.0)),
    "clamp": each(lambda x: x.clamp(-0.3, 0.4)), "power": each(lambda x: (x.abs() + 1) ** 1.5), "relu6": each(F.relu6),
    "leaky": each(lambda x: F.leaky_relu(x, 1.5)), "prelu": (lambda p, x: p(x), (nn.PReLU(8),), IMAGE),
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """All cases in one network with an output for each: one capture, one compilation."""

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cases = nn.ModuleList(Network(function, *layers) for function, layers, _ in CASES.values())
            for part in self.modules():
                if isinstance(part, nn.BatchNorm2d):
                    nn.init.uniform_(part.running_var, 0.5, 2.0)
                    nn.init.uniform_(part.weight, 0.5, 2.0)

        def forward(self, **given: torch.Tensor) -> tuple:
            return tuple(case(x) for case, x in zip(self.cases, given.values(), strict=True))

    inputs = tuple(Input(f"x{place}", shape, dynamic=()) for place, (_, _, shape) in enumerate(CASES.values()))
    code = "def forward(self, " + ", ".join(item.name for item in inputs) + "): return self.all({})"
    scope: dict = {}
    exec(code.format(", ".join(f"{item.name}={item.name}" for item in inputs)).replace("all(", "all.forward("), scope)
    outer = type("Outer", (nn.Module,), {"forward": scope["forward"]})()
    outer.all = All()
    names = tuple(name.replace(" ", "_") for name in CASES)
    artifact, simulation = write(
        capture(outer.eval(), Task(inputs, output_names=names)), tmp_path_factory.mktemp("c") / "c"
    )
    given = drawn(simulation)
    wanted = run_graph(simulation, given)
    found = {level: engine(level).load(artifact).run(given) for level in (0, 1, 2)}
    return wanted, found


@pytest.mark.parametrize("name", CASES)
def test_operators_equal_pytorch_in_every_instruction_set(name: str, everything: tuple) -> None:
    wanted, found = everything
    key = name.replace(" ", "_")
    for level, outputs in found.items():
        assert outputs[key].shape == wanted[key].shape
        np.testing.assert_allclose(
            outputs[key], wanted[key], rtol=0, atol=LIMIT * np.abs(wanted[key]).max(), err_msg=f"level {level}"
        )


REFUSED = {
    "conv_transpose2d": (Network(lambda c, x: c(x), nn.ConvTranspose2d(8, 6, 3)), IMAGE),
    "conv3d": (Network(lambda c, x: c(x), nn.Conv3d(1, 2, 3)), (1, 1, 4, 8, 8)),
    "topk": (Network(lambda x: torch.topk(x, 2)[0]), (1, 8)),
    "layer_norm": (Network(lambda n, x: n(x), nn.LayerNorm(20)), ROW),
    "upsample_bicubic2d": (Network(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")), IMAGE),
    "computed weights": (Network(lambda x: F.conv2d(x, x[:, :, :3, :3])), IMAGE),
    "float16": (Network(lambda x: x * 2), IMAGE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_refused_by_name(name: str, tmp_path: Path) -> None:
    module, shape = REFUSED[name]
    options = {"precision": "float16"} if name == "float16" else {}
    with pytest.raises(Unsupported, match=name) as caught:
        write(captured(module, *shape), tmp_path / "c", **options)
    assert caught.value.exit_status == 7
    assert caught.value.hint


def test_a_dynamic_height_is_refused(tmp_path: Path) -> None:
    item = Input("x", (1, 3, 8, 8), dynamic=("batch", "height"), layout="NCHW")
    graph = capture(nn.Conv2d(3, 4, 3).eval(), Task((item,)))
    with pytest.raises(Unsupported, match="input 'x' may have any height"):
        write(graph, tmp_path / "c")


@pytest.fixture(scope="module")
def residual() -> Graph:
    torch.manual_seed(0)
    return capture(resnet20().eval(), Task((Input("x", (1, 3, 32, 32), layout="NCHW"),)))


def test_a_residual_network_is_convolutions_alone(residual: Graph, tmp_path: Path) -> None:
    artifact, simulation = write(residual, tmp_path / "c")
    assert worst(artifact, simulation) < LIMIT
    counted = artifact.manifest.census["operators"]
    # batch norms stand as sums and products, 19 each; every shortcut and activation is joined or in place
    assert counted["conv_f32"] == 20
    assert counted["copy"] == 3  # the image, and two shortcuts between zeros


def test_a_trace_shows_every_step_and_names_a_seeded_fault(residual: Graph, tmp_path: Path) -> None:
    artifact, simulation = write(residual, tmp_path / "c")
    given = drawn(simulation)
    steps = engine().trace(artifact, given)
    assert len(steps) == sum(artifact.manifest.census["operators"].values())
    assert first_divergence(simulation, given, steps).node is None
    module = copy.deepcopy(residual.program.module(check_guards=False))  # parameters are shared else
    with torch.no_grad():
        module.get_parameter("layer2.1.conv1.weight")[3, 2, 1, 1] += 1.0
    other, _ = write(recapture(residual, module), tmp_path / "broken")
    found = first_divergence(simulation, given, engine().trace(other, given))
    assert found.layer == "layer2.1.conv1"


def test_pictures_with_their_preprocessing_baked_in(tmp_path: Path) -> None:
    item = Input("x", (1, 3, 12, 10), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), scale=255.0, layout="NCHW")
    torch.manual_seed(0)
    graph = capture(nn.Conv2d(3, 5, 3, padding=1).eval(), Task((item,)))
    artifact, simulation = write(graph, tmp_path / "c", normalize=True)
    assert artifact.manifest.inputs[0].dtype == "uint8"
    assert worst(artifact, simulation) < LIMIT


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    artifact, _ = write(captured(Network(lambda x: x * 2), 1, 3), tmp_path / "c")
    session = engine().load(artifact)
    with pytest.raises(InputError, match="expected float32"):
        session.run({"x": np.zeros((1, 3))})
    with pytest.raises(InputError, match="shape"):
        session.run({"x": np.zeros((1, 4), np.float32)})
    turned = np.arange(6, dtype=np.float32).reshape(3, 2).T[:1]
    np.testing.assert_array_equal(next(iter(session.run({"x": turned}).values())), turned * 2)


def test_without_a_compiler_the_hint_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, _ = write(captured(Network(lambda x: x * 2), 1, 3), tmp_path / "c")
    monkeypatch.setenv("CC", "no-such-compiler")
    for use in (engine().version, lambda: engine().load(artifact)):
        with pytest.raises(MissingExtra, match="no C compiler here") as caught:
            use()
        assert caught.value.exit_status == 3
        assert "gcc" in (caught.value.hint or "")
