"""Fold a network with random statistics and compare it with what it computed before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepack.compress.fold import Fold
from edgepack.task import Input, Task


class Notes:
    """The part of a run that folding uses."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def task(*shape: int, dtype: str = "float32") -> Task:
    return Task(inputs=(Input("x", shape, dtype=dtype, dynamic={"batch": 0}),))


def norms(module: nn.Module) -> int:
    return sum(isinstance(layer, _BatchNorm) for layer in module.modules())


def scramble(module: nn.Module, seed: int = 0, hard: bool = False, calm: bool = False) -> nn.Module:
    """Random statistics; ``hard`` adds zero and negative γ and tiny variances, ``calm`` is as trained networks are."""
    offset, widest = (0.3, 1.5) if calm else (1.0, 2.0)
    random = torch.Generator().manual_seed(seed)

    def draw(tensor: Any, low: float, high: float) -> None:
        tensor.data = torch.rand(tensor.shape, generator=random, dtype=tensor.dtype) * (high - low) + low

    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            draw(layer.running_mean, -offset, offset)
            draw(layer.running_var, 0.2, 2 * widest)
            if layer.affine:
                draw(layer.weight, -2 if hard else 0.5, widest)
                draw(layer.bias, -offset, offset)
            if hard:
                layer.running_var[0] = 1e-9
                if layer.affine and layer.num_features > 1:
                    layer.weight.data[1] = 0
    return module.eval()


def fold(module: nn.Module, job: Task, **options: Any) -> tuple[nn.Module, Notes]:
    notes = Notes()
    return Fold(**options).apply(module, job, notes), notes  # type: ignore[arg-type]


def relative(this: Any, that: Any) -> float:
    return float((this.double() - that.double()).abs().max() / that.double().abs().max().clamp_min(1e-30))


def check(module: nn.Module, *shape: int, left: int = 0, limit: float = 1e-5, dtype: str = "float32") -> Notes:
    """Fold a copy and compare with a float64 reference of the original, on a batch that folding did not see."""
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(7), dtype=getattr(torch, dtype))
    with torch.no_grad():
        want = copy.deepcopy(module).double()(x.double())
        folded, notes = fold(module, task(*shape, dtype=dtype))
        assert norms(folded) == left, notes.text
        assert relative(folded(x), want) <= limit
    return notes


class Cases(nn.Module):
    """A convolution and a norm, used as ``how`` says."""

    def __init__(self, how: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        return self.how(self, x)
