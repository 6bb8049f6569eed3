"""Weights on an integer grid: one symmetric scale per output channel."""

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


def round_to(weight: Tensor, scale: Tensor, top: int = TOP) -> Tensor:
    """The nearest values scale × integer, integers from −top to top."""
    steps = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight / steps).round().clamp(-top, top) * steps
