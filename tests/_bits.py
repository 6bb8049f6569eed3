"""Random layers of ±1 beside their float reference: what the C files compute must be the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Drawn(nn.Module):
    """One layer: comparison, signs, padding with −1 or 0, convolution with ±1; then floats, or bits again.

    Attributes:
        said: its shape, for messages.
    """

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__()
        groups = int(random.choice([1, 1, 1, 2, 3]))
        inputs, outputs = (groups * int(random.integers(1, most)) for most in (80 // groups, 90 // groups))
        self.size = tuple(int(random.integers(1, 4)) for _ in range(2))
        self.stride, self.dilation = (tuple(int(random.integers(1, 3)) for _ in range(2)) for _ in range(2))
        self.pad = tuple(int(random.integers(0, 3)) for _ in range(4))
        self.zeros, self.again, self.groups = bool(random.random() < 0.3), bool(random.random() < 0.6), groups
        self.first = nn.Conv2d(3, inputs, 1)
        generator = torch.Generator().manual_seed(int(random.integers(1 << 31)))

        def signs(*shape: int) -> Tensor:
            return torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)

        kept = signs(1, inputs // groups, *self.size)
        flipped = torch.rand((outputs, inputs // groups, *self.size), generator=generator) < 0.15
        self.register_buffer("weight", torch.where(flipped, -kept, kept))
        self.register_buffer("threshold", torch.randn((inputs, 1, 1), generator=generator) / 2)
        self.register_buffer("last", signs(7, outputs, 1, 1))
        self.register_buffer("scale", torch.randn((outputs, 1, 1), generator=generator))
        self.norm = nn.BatchNorm2d(outputs)
        places = inputs // groups * self.size[0] * self.size[1]
        self.norm.running_mean.copy_(torch.randn(outputs, generator=generator) * places**0.5)
        self.norm.running_var.copy_(torch.rand(outputs, generator=generator) * places + 0.1)
        self.norm.weight.data.copy_(torch.randn(outputs, generator=generator))
        self.said = (inputs, outputs, self.size, self.stride, self.dilation, self.pad, self.zeros, self.again, groups)

    def forward(self, x: Tensor) -> Tensor:
        bits = torch.where(self.first(x) >= self.threshold, 1.0, -1.0)
        bits = F.pad(bits, self.pad, value=0.0 if self.zeros else -1.0)
        y = F.conv2d(bits, self.weight, None, self.stride, 0, self.dilation, self.groups)
        if not self.again:
            return y
        y = torch.where(F.hardtanh(self.norm(y * self.scale)) > 0.1, 1.0, -1.0)
        return F.conv2d(y, self.last)


class Many(nn.Module):
    """Several layers of one input, an output each."""

    def __init__(self, seed: int, count: int) -> None:
        super().__init__()
        random = np.random.default_rng(seed)
        self.layers = nn.ModuleList(Drawn(random) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def alike(found: dict[str, Any], wanted: dict[str, Any], network: Many) -> None:
    """Every number equal."""
    for (name, array), layer in zip(wanted.items(), network.layers, strict=True):
        np.testing.assert_array_equal(found[name], array, err_msg=str(layer.said))
