"""A small network, pictures it can learn, and a training of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from edgepack import metrics  # noqa: E402
from edgepack.compress._tune import Tune, tune  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

ITEM = Input("x", (1, 3, 8, 8), scale=255, mean=(0.5,), std=(0.25,))


def net(width: int = 8, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes)).eval()


def images(count: int, seed: int = 0, labels: bool = True) -> Arrays:
    """Dark noise with a bright quarter that says the class."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, count)
    x = random.integers(0, 140, (count, 8, 8, 3), dtype=np.uint8)
    for image, quarter in zip(x, y, strict=True):
        image[4 * (quarter // 2) :, 4 * (quarter % 2) :][:4, :4] += 60
    return Arrays((ITEM,), {"x": x}, y if labels else None)


def task(labels: bool = True, count: int = 256, **options: Any) -> Task:
    top1 = metrics.find("top1", Path())
    return Task((ITEM,), training=images(count, 0, labels), evaluation=images(200, 1), metric=top1, **options)


def job(folder: Path, original: nn.Module, of: Task, seed: int = 0) -> PassRun:
    return PassRun(folder, seed, Plan(), Silent(), original, of)


def accuracy(module: nn.Module, of: Task) -> float:
    (batch,) = of.evaluation.batches(1000)
    with torch.no_grad():
        found = module(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy()
    return float((found == batch.targets).mean())


def shaken(module: nn.Module, amount: float = 0.5) -> nn.Module:
    """A copy that was spoiled."""
    import copy

    copied = copy.deepcopy(module)
    torch.manual_seed(1)
    for value in copied.parameters():
        value.data += amount * value.data.std(correction=0) * torch.randn_like(value)
    return copied


def taught(folder: Path) -> nn.Module:
    """A network that knows the task, taught by labels alone."""
    module, of = net(), task()
    tune(module, of, job(folder, module, of), Tune(epochs=6, lr=0.1, teacher="none", held_out=0, batch=32))
    assert accuracy(module, of) > 0.95
    return module
