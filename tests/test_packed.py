"""4-bit weights in files: two in a byte, or in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

FORMS: dict[str, dict[str, Any]] = {
    "float": {"weight_bits": 4},
    "static": {"weight_bits": 4, "activation_bits": 8},
}


class Odd(nn.Module):
    """Odd numbers of values everywhere: 45 per output channel of one layer, 7 of another, 5 × 7 and 3 × 5 in all."""

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


def made(folder: Path, module: nn.Module | None = None, **options: Any) -> Source:
    torch.manual_seed(0)
    task = Task((Input("x", (1, 3, 10, 10)),), calibration=Samples(samples(24, 0)))  # type: ignore[arg-type]
    compress((module or Odd()).eval(), task, [Quantize(explain=False, **options)], folder, Silent())
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    made(folder, **FORMS[request.param])
    return request.param, folder
