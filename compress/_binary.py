"""Layers that compute with ±1: what a convolution or linear layer becomes, in training and after it.

sign(0) is +1 everywhere. Where a convolution pads, it pads with −1, the bit 0, so that no third value appears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize


class Sign(nn.Module):
    """+1 where the input reaches its channel's threshold, else −1.

    Gradients are those of the piecewise quadratic of Bi-Real Net (ECCV 2018): 2 − 2·|x| within ±1, x in widths from the
    threshold; thresholds are learned, as in ReActNet (ECCV 2020).

    Attributes:
        threshold: per channel, in a form that broadcasts against the input.
        width: how far from the threshold gradients pass.
    """

    width: Tensor

    def __init__(self, threshold: Tensor, width: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold)
        self.register_buffer("width", torch.tensor(width))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return torch.where(x >= self.threshold, 1.0, -1.0)
        signs: Tensor = _Step.apply(x, self.threshold, self.width)  # type: ignore[no-untyped-call]
        return signs


class _Step(torch.autograd.Function):
    """Signs, with the gradients of ``Sign``; one pass over memory each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold, width)
        return torch.where(x >= threshold, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold, width = ctx.saved_tensors
        near = x.to(gradients[0].dtype).sub(threshold.to(gradients[0].dtype)).abs_()
        slope = near.mul_(-2 / width**2).add_(2 / width).clamp_min_(0)
        moved = slope.mul_(gradients[0])
        return moved.to(x.dtype), -moved.float().sum_to_size(threshold.shape), None


class Signs(nn.Module):
    """Of weights, while they are trained: gradients pass to the latent weight where it is within ±1."""

    def forward(self, latent: Tensor) -> Tensor:
        signs = torch.where(latent >= 0, 1.0, -1.0)
        inside = latent.clamp(-1, 1)
        return signs + (inside - inside.detach())


class Scale(nn.Module):
    """One factor per output channel; ``weight`` broadcasts against the result."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Binary(nn.Module):
    """A convolution or linear layer of ±1 weights on ±1 inputs.

    Attributes:
        layer: it; its weights are ±1, while they are trained through ``Signs``.
        bias: what the layer had as bias is added after the scale.
        shortcut: add the layer's own input to its result (Bi-Real Net), where they have one shape.
    """

    def __init__(self, layer: nn.Module, threshold: Tensor, width: float, shortcut: bool) -> None:
        super().__init__()
        assert isinstance(layer, (_ConvNd, nn.Linear))
        weight = layer.weight
        self.sign = Sign(channelwise(threshold, layer), width)
        self.pad = _padding(layer)
        self.layer = layer
        self.scale = Scale(channelwise(weight.detach().abs().flatten(1).mean(1), layer))
        self.bias = None if layer.bias is None else nn.Parameter(channelwise(layer.bias.detach(), layer))
        layer.bias = None
        self.shortcut = shortcut
        parametrize.register_parametrization(layer, "weight", Signs())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale(self.layer(self.pad(self.sign(x))))
        y = y if self.bias is None else y + self.bias
        return x + y if self.shortcut else y

    @property
    def latent(self) -> nn.Parameter:
        """The weights that training moves."""
        found = self.layer.parametrizations.weight.original  # type: ignore[union-attr]
        assert isinstance(found, nn.Parameter)
        return found

    def settle(self) -> None:
        """Training is over: the signs are the weights."""
        with torch.no_grad():
            parametrize.remove_parametrizations(self.layer, "weight", leave_parametrized=True)


def channelwise(values: Tensor, layer: nn.Module) -> Tensor:
    """One value per channel, in a form that broadcasts against what the layer reads or gives."""
    return values.view(-1, *[1] * (layer.weight.dim() - 2)) if isinstance(layer, _ConvNd) else values.clone()


def _padding(layer: nn.Module) -> nn.Module:
    """What the layer padded with zeros is padded with −1 before it."""
    if isinstance(layer, nn.Linear):
        return nn.Identity()
    assert isinstance(layer, _ConvNd)
    around = tuple(layer._reversed_padding_repeated_twice)
    layer.padding = tuple(0 for _ in layer.kernel_size)
    if not any(around):
        return nn.Identity()
    kinds = {2: nn.ConstantPad1d, 4: nn.ConstantPad2d, 6: nn.ConstantPad3d}
    kind: Callable[..., nn.Module] = kinds[len(around)]
    return kind(around, -1.0)
