"""Networks that tests of several formats write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from edgepack import usercode

ZOO = Path(__file__).parents[1] / "examples" / "zoo"


def resnet20() -> nn.Module:
    """The example's ResNet-20 for 32 x 32 images, untrained."""
    module: nn.Module = usercode.load("models.py:resnet20", ZOO)()
    return module


class Pair(nn.Module):
    """Words and numbers in, scores and the best of a hidden layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear, self.out = nn.Embedding(50, 16), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.words(ids).mean(1) + self.linear(x))
        return self.out(hidden), hidden.argmax(1)


class Network(nn.Module):
    """A function of layers and inputs."""

    def __init__(self, function: Callable, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(*self.layers, x)


class Chain(nn.Module):
    """Three layers of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 3), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))
