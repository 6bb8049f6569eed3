"""Merging ``y = scale · x + shift`` (per channel, what a batch norm does in inference) into a neighbouring layer.

All arithmetic is float64; results are cast back to the layer's own type. With s = γ / √(σ² + ε) and t = β − μ·s:

    layer → norm     W' = s ⊙ W (output channels)     b' = s·b + t
    norm → layer     W' = W ⊙ s (input channels)      b' = b + W·t       exact only where every tap sees the shift
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Affine:
    """``y = scale · x + shift``; both float64 of shape (channels,)."""

    scale: Tensor
    shift: Tensor

    @property
    def finite(self) -> bool:
        return bool(self.scale.isfinite().all() and self.shift.isfinite().all())

    @property
    def shifts(self) -> bool:
        """Whether zero does not stay zero."""
        return bool((self.shift != 0).any())

    @property
    def largest(self) -> float:
        """max |scale|."""
        return float(self.scale.abs().max())


def affine_of(norm: _BatchNorm) -> Affine:
    """What a batch norm with running statistics does in inference."""
    mean, variance = _double(norm.running_mean), _double(norm.running_var)
    assert mean is not None
    assert variance is not None
    weight, bias = _double(norm.weight), _double(norm.bias)
    scale = (variance + norm.eps).rsqrt()
    scale = scale if weight is None else weight * scale
    shift = -mean * scale
    return Affine(scale, shift if bias is None else bias + shift)


def merge_after(layer: nn.Module, affine: Affine) -> bool:
    """Make ``layer`` compute what layer → affine computes; False (and unchanged) if its type cannot hold it."""
    weight, bias = _double(layer.weight), _double(layer.bias)
    if isinstance(layer, _BatchNorm):
        weight = affine.scale if weight is None else weight * affine.scale
    elif isinstance(layer, _ConvTransposeNd):
        assert weight is not None
        scale = _outer(affine.scale, layer.groups, 2, weight.dim())
        weight = (_per_group(weight, layer.groups) * scale).view_as(weight)
    else:
        assert weight is not None
        weight = weight * affine.scale.view(-1, *[1] * (weight.dim() - 1))
    return _put(layer, weight, affine.shift if bias is None else bias * affine.scale + affine.shift)


def merge_before(layer: nn.Module, affine: Affine) -> bool:
    """Make ``layer`` compute what affine → layer computes; False (and unchanged) if its type cannot hold it."""
    weight, bias = _double(layer.weight), _double(layer.bias)
    assert weight is not None
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    channel = 1 if isinstance(layer, _ConvTransposeNd) else 2  # where _per_group has the input channels of a group
    assert isinstance(groups, int)
    grouped = _per_group(weight, groups)
    summed = [axis for axis in range(1, grouped.dim()) if axis != 3 - channel]
    added = (grouped * _outer(affine.shift, groups, channel, weight.dim())).sum(summed).flatten()
    scaled = (grouped * _outer(affine.scale, groups, channel, weight.dim())).view_as(weight)
    return _put(layer, scaled, added if bias is None else bias + added)


def channels_type(layer: nn.Module) -> torch.dtype:
    """The floating type of a layer's parameters (of its statistics where it has none)."""
    held = layer.running_mean if isinstance(layer, _BatchNorm) else layer.weight
    assert isinstance(held, Tensor)
    return held.dtype


def _per_group(weight: Tensor, groups: int) -> Tensor:
    """(A, B, kernel…) → (groups, A / groups, B, kernel…)."""
    return weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])


def _outer(values: Tensor, groups: int, axis: int, rank: int) -> Tensor:
    """(channels,) → one row per group along ``axis`` of what ``_per_group`` gives for a weight of this rank."""
    form = [1] * (rank + 1)
    form[0], form[axis] = groups, -1
    return values.view(form)


def _put(layer: nn.Module, weight: Tensor, bias: Tensor) -> bool:
    kind = channels_type(layer)
    like = layer.weight if isinstance(layer.weight, Tensor) else layer.running_mean
    assert isinstance(like, Tensor)
    new = [tensor.to(like.device, kind) for tensor in (weight, bias)]
    if not all(bool(tensor.isfinite().all()) for tensor in new):
        return False
    trains = isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    # New parameters, not new values: another layer may be tied to the old ones.
    layer.weight = nn.Parameter(new[0].contiguous(), requires_grad=trains)
    layer.bias = nn.Parameter(new[1].contiguous(), requires_grad=trains)
    if isinstance(layer, _BatchNorm):
        layer.affine = True
    return True


def _double(tensor: Tensor | nn.Module | None) -> Tensor | None:
    return tensor.detach().to("cpu", torch.float64) if isinstance(tensor, Tensor) else None
