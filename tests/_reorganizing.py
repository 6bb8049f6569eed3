"""A small transformer, pictures, and how the pass reorganize is applied to them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from _networks import ZOO  # noqa: E402
from edgepack import usercode  # noqa: E402
from edgepack.compress.reorganize import Reorganize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Batch  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

TASK = Task((Input("x", (1, 3, 32, 32)),))
PUBLISHED = {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}  # G of DeiT-S in EViT's table
LENGTHS = {0.9: [179, 163, 148], 0.8: [159, 129, 105], 0.7: [140, 100, 72], 0.6: [120, 74, 46], 0.5: [100, 52, 28]}


def vit(**options: int) -> nn.Module:
    torch.manual_seed(0)
    network = usercode.load("models.py:VisionTransformer", ZOO)(**{"width": 32, "depth": 4, "heads": 4, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


class Pictures:
    """Random pictures with targets."""

    labels: tuple[str, ...] = ()

    def __init__(self, count: int = 24) -> None:
        self.raw = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets: np.ndarray | None = np.arange(count) % 10

    def __len__(self) -> int:
        return len(self.raw)

    def batches(self, size: int) -> Any:
        for start in range(0, len(self), size):
            raw = self.raw[start : start + size]
            values = np.ascontiguousarray(raw.transpose(0, 3, 1, 2).astype(np.float32) / 128 - 1)
            targets = None if self.targets is None else self.targets[start : start + size]
            yield Batch({"x": values}, {"x": raw}, targets)


def apply(module: nn.Module, tmp_path: Path, task: Task = TASK, **options: Any) -> tuple[nn.Module, PassRun]:
    run = PassRun(tmp_path, 0, Plan(), Silent(), module, task)
    item, copied = Reorganize(**options), copy.deepcopy(module)
    item.check(copied, task)
    return item.apply(copied, task, run), run


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def lengths(run: PassRun) -> list[list[int]]:
    return [row["tokens"] for row in run.findings["tokens"]["blocks"]]
