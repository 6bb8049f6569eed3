"""The four networks of MLPerf Tiny (Banbury et al., arXiv:2106.07597) as C, in float and in 8 bits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

from torch import Tensor, nn  # noqa: E402

from _c_files import answers, captured, compressed, drawn, worst, write  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def block(
    sources: int, channels: int, kernel: int | tuple[int, int], stride: int | tuple[int, int] = 1, **options: int
) -> nn.Module:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (size[0] // 2, size[1] // 2)
    layer = nn.Conv2d(sources, channels, size, stride, padding, bias=False, **options)  # type: ignore[arg-type]
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


def separable(sources: int, channels: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(block(sources, sources, 3, stride, groups=sources), block(sources, channels, 1))


def ds_cnn() -> nn.Module:
    """Keyword spotting: 49 frames of 10 cepstral coefficients."""
    layers = [separable(64, 64) for _ in range(4)]
    return nn.Sequential(
        block(1, 64, (10, 4), (2, 2)), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12), nn.Softmax(1)
    )


def mobilenet_v1() -> nn.Module:
    """Visual wake words: width 0.25, 96 × 96 pixels, two classes."""
    widths = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), *[(128, 128, 1)] * 5]
    layers = [separable(*one) for one in [*widths, (128, 256, 2), (256, 256, 1)]]
    return nn.Sequential(block(3, 8, 3, 2), *layers, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(256, 2), nn.Softmax(1))


class Residual(nn.Module):
    def __init__(self, sources: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = block(sources, channels, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.other = nn.Conv2d(sources, channels, 1, stride) if sources != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.other(x))


def resnet8() -> nn.Module:
    """Image classification: CIFAR-10."""
    stages = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
    return nn.Sequential(block(3, 16, 3), *stages, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))


def autoencoder() -> nn.Module:
    """Anomaly detection: five frames of 128 mel bands."""
    widths = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(128, 640))


NETWORKS = [
    (ds_cnn, (1, 1, 49, 10)),
    (mobilenet_v1, (1, 3, 96, 96)),
    (resnet8, (1, 3, 32, 32)),
    (autoencoder, (1, 640)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "shape"), NETWORKS, ids=lambda one: getattr(one, "__name__", None))
def test_float_and_eight_bits(network: object, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = network()  # type: ignore[operator]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    assert worst(*write(captured(module, *shape), tmp_path / "float")) < 1e-5

    source = compressed(tmp_path, module, shape, explain=False)
    artifact, simulation = write(source.graph, tmp_path / "integer", source.plan)
    inputs = drawn(simulation)
    (found,), (wanted,) = answers(artifact, inputs).values(), run_graph(simulation, inputs).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # the softmax behind the integers is float
    (exact,) = run_graph(source.graph, inputs).values()
    assert sqnr_db(exact, found) > 25
