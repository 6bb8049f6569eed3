"""A small network for 8x8 gray digits: plain, depthwise-separable and residual blocks, 21 thousand parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalization, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNormAct(channels, channels, 3)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.second(self.first(x))))


class DigitsNet(nn.Module):
    """(N, 1, 8, 8) images → (N, 10) class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(1, 16, 3)
        self.depthwise = ConvNormAct(16, 16, 3, groups=16)
        self.pointwise = ConvNormAct(16, 32, 1)
        self.down = nn.MaxPool2d(2)
        self.residual = Residual(32)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(self.down(self.pointwise(self.depthwise(self.stem(x)))))
        return self.head(torch.flatten(nn.functional.avg_pool2d(x, 2), 1))


def digits_net() -> nn.Module:
    """The untrained network; its weights are in digits.safetensors."""
    return DigitsNet()
