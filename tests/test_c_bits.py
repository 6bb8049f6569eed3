"""Layers of ±1 in C: equal to their float reference, every kernel and build."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

from torch import nn  # noqa: E402

from _bits import Many, alike  # noqa: E402
from _c_files import answers, captured, compressed, drawn, worst, write  # noqa: E402
from edgepack.compress._binary import Binary  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
LEVELS = (0, 1, 2)


def equal(seed: int, count: int, folder: Path) -> Counter[str]:
    """Compare some layers in both forms and every build; returns which kernels computed them."""
    network, kernels = Many(seed, count).eval(), Counter[str]()
    graph = captured(network, 1, 3, 11, 13)
    for form in ("xnor", "tree"):
        artifact, simulation = write(graph, folder / f"{seed}-{form}", binary=form)
        inputs = drawn(simulation)
        wanted = run_graph(simulation, inputs)
        for level in LEVELS:
            alike(answers(artifact, inputs, level), wanted, network)
        kernels.update(artifact.manifest.census["operators"])
    return kernels


def test_sixty_random_layers_are_their_float_reference(tmp_path: Path) -> None:
    found = equal(0, 60, tmp_path)
    for kernel in ("pack_bits", "conv_bits", "sign_bits", "tree_bits"):
        assert found[kernel] > 9, kernel


@pytest.mark.slow
def test_a_thousand_random_layers_are_their_float_reference(tmp_path: Path) -> None:
    for seed in range(2, 22):
        equal(seed, 50, tmp_path)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def binary(layer: nn.Module, shortcut: bool = False) -> Binary:
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    made = Binary(layer, torch.randn(channels) / 4, 1.0, shortcut)
    made.settle()
    return made


def normed(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.copy_(torch.randn(channels))
    norm.weight.data.copy_(torch.randn(channels))
    return norm


@pytest.mark.parametrize("form", ["xnor", "tree"])
def test_a_network_computes_what_pytorch_does(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 40, 3), normed(40), nn.ReLU(), binary(nn.Conv2d(40, 64, 3, 2, 1)), normed(64), nn.Hardtanh(),
        binary(nn.Conv2d(64, 64, 3, 1, 1, bias=False), True), normed(64), nn.ReLU(), binary(nn.Conv2d(64, 48, (1, 3))),
        normed(48), binary(nn.Conv2d(48, 70, 3, padding=1)), nn.PReLU(70), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        binary(nn.Linear(70, 33)), nn.ReLU(), binary(nn.Linear(33, 10)),
    )  # fmt: skip
    artifact, simulation = write(captured(network, 1, 3, 19, 22), tmp_path / "c", binary=form)
    for level in LEVELS:
        assert worst(artifact, simulation, level) < 1e-5
    kernels = artifact.manifest.census["operators"]
    assert kernels["pack_bits"] == 4
    assert kernels["conv_bits"] == 4
    assert kernels["tree_bits" if form == "tree" else "sign_bits"] == 2


def test_signs_that_no_binary_layer_reads_become_floats(tmp_path: Path) -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            signs = torch.where(x > 0.25, 1.0, -1.0)
            return signs.flatten(1), torch.where(x <= 0.5, 3.0, 7.0), torch.nn.functional.pad(signs, (1, 2)) + x.sum()

    artifact, simulation = write(captured(Other(), 1, 2, 3, 4), tmp_path / "c")
    inputs = {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(1, 2, 3, 4)}
    inputs["x"][0, 0, 0, :2] = 0.25, 0.5
    wanted, found = run_graph(simulation, inputs), answers(artifact, inputs)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)


def test_thresholds_decide_as_pytorch_rounds(tmp_path: Path) -> None:
    """Sums that lie on a threshold, which scale, bias and norm round to either side of it."""
    torch.manual_seed(1)
    layer, norm = binary(nn.Conv2d(8, 64, 1)), normed(64)
    second = binary(nn.Conv2d(64, 16, 1, bias=False))
    sums = torch.randint(-4, 5, (64, 1, 1)) * 2.0
    with torch.no_grad():
        second.sign.threshold.copy_(norm.eval()(layer.scale(sums[None]) + layer.bias)[0])
        second.scale.weight.fill_(1)
    artifact, simulation = write(captured(nn.Sequential(layer, norm, second), 1, 8, 9, 9), tmp_path / "c")
    for seed in range(3):
        inputs = drawn(simulation, seed)
        np.testing.assert_array_equal(*(next(iter(found.values())) for found in
                                        (answers(artifact, inputs), run_graph(simulation, inputs))))  # fmt: skip


def test_what_is_real_in_eight_bits_and_signs_as_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(5, 16, 3), nn.ReLU(), binary(nn.Conv2d(16, 32, 3)), normed(32), nn.ReLU(), nn.Conv2d(32, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    source = compressed(tmp_path, network, explain=False)
    (step,) = source.manifest.history
    assert "8-bit weights in 3 layers, 1 left in float" in step["notes"]
    assert {entry["float"] for entry in source.plan.nodes.values() if "float" in entry} == {
        "its weights are ±1, of one bit each"}  # fmt: skip
    artifact, simulation = write(source.graph, tmp_path / "c", source.plan)
    for level in LEVELS:
        assert worst(artifact, simulation, level) < 1e-5
    kernels = artifact.manifest.census["operators"]
    assert kernels["conv_bits"] == 1
    assert kernels["conv_s8"] == 3


def test_what_the_option_can_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="binary is one of auto, xnor, tree, not 'treee'; did you mean"):
        write(captured(nn.Conv2d(2, 2, 1), 1, 2, 3, 3), tmp_path / "c", binary="treee")
