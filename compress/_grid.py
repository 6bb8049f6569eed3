"""Weights on an integer grid: one symmetric scale per output channel, or per group of its columns."""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 127
RATIOS = torch.linspace(1.0, 0.6, 41)
COARSE_RATIOS = torch.linspace(1.0, 0.3, 71)  # few levels clip more
DEAD = 1e-30


def top(bits: int) -> int:
    """The largest integer of a symmetric grid: 127 of 8 bits, 7 of 4."""
    return (1 << (bits - 1)) - 1


def limits(top: int, kept: Tensor | None) -> int | Tensor:
    """The largest integer of each weight, where some must stay 0."""
    return top if kept is None else top * kept


def laid_out(top: int | Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    """The largest integer of each weight, laid out as second moments (groups, columns, columns) see it."""
    return torch.as_tensor(top).expand_as(weight).reshape(len(moments), -1, moments.shape[1])


def group_scale(weight: Tensor, top: int, size: int) -> Tensor:
    """Scales (rows, groups) of ``size`` columns each, as ``weight_scale`` finds them."""
    return weight_scale(weight.reshape(-1, size), top=top).view(len(weight), -1)


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """Scales in a form that multiplies a weight: (rows,), or (rows, groups)."""
    if scale.dim() == 1:
        return scale.view(-1, *[1] * (weight.dim() - 1))
    return scale.repeat_interleave(weight[0].numel() // scale.shape[1], 1).view_as(weight)


def weight_scale(weight: Tensor, floor: Tensor | float = 0.0, top: int = TOP) -> Tensor:
    """The scale per row (axis 0) with the least squared rounding error, float32, at least ``floor``."""
    rows = weight.detach().flatten(1)
    widest = rows.abs().amax(1) / top
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for ratio in RATIOS if top == TOP else COARSE_RATIOS:
        scale = (widest * ratio).clamp_min(DEAD)
        error = (round_to(rows, scale, top) - rows).square().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    best = torch.where(widest > 0, best, torch.ones_like(best))
    return torch.maximum(best, torch.as_tensor(floor, dtype=best.dtype)).float()


def multipliers(scale: Tensor) -> Tensor:
    """The nearest scales whose binary digits fill 15 places: what engines multiply sums of 16-bit integers by."""
    fraction, exponent = torch.frexp(scale)
    return torch.ldexp((fraction * 2**15).round() / 2**15, exponent)


def round_to(weight: Tensor, scale: Tensor, top: int | Tensor = TOP) -> Tensor:
    """The nearest values scale × integer, integers from −top to top; ``top`` may differ from weight to weight."""
    steps = spread(scale, weight)
    most = torch.as_tensor(top)
    return (weight / steps).round().clamp(-most, most) * steps
