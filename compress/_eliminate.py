"""Weights to zero one input column after the other, each error made good by the columns that follow.

After E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
(arXiv:2301.00774), which chooses what goes by the optimal brain surgeon's measure: zeroing w_j and moving all other
weights of its row as best one can changes the layer's results by w_j² / [H⁻¹]_jj, H being the second moments of what
the layer reads. Where a layer is small enough, the weights that stay are then solved for exactly, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepack.compress._gptq import inverse_factor
from edgepack.compress._patterns import Pattern

BLOCK = 128  # columns among which what goes is chosen at once
WORK = 5e11  # multiply-accumulates that solving the rows of a layer may take
DAMPING = 0.01  # of the mean diagonal
ROWS = 64  # solved at once


def saliency(moments: Tensor) -> Tensor:
    """1 / [H⁻¹]_jj, (groups, columns) float64: what a squared weight costs when the others make up for it."""
    return 1 / inverse_factor(moments).square().sum(1)


def eliminate(weight: Tensor, kept: Tensor, moments: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Weights with zeros, and the mask of what stays, both (groups, rows, columns).

    Args:
        kept: a first choice. How many go in each block of columns stays; which, is chosen again when it is known what
            the weights of the block have become.
        moments: (groups, columns, columns), columns in the order of the pattern.
    """
    factor = inverse_factor(moments)
    rest, mask = weight.double().clone(), kept.clone()
    width = pattern.of or BLOCK
    for start in range(0, rest.shape[2], width):
        block = slice(start, min(start + width, rest.shape[2]))
        diagonal = factor.diagonal(dim1=1, dim2=2)[:, None, block]
        zeros = int((~kept[..., block]).sum())
        mask[..., block] = pattern.lowest((rest[..., block] / diagonal).square(), zeros)
        for column in range(block.start, block.stop):
            error = torch.where(mask[..., column], 0.0, rest[..., column]) / factor[:, column, column, None]
            rest[..., column:] -= error[..., None] * factor[:, None, column, column:]
    rest *= mask
    return solve(weight, rest, mask, moments), mask


def solve(weight: Tensor, found: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """The weights that the mask leaves, with the least error of the layer's results; ``found`` where that is too much.

    Per row: (H restricted to what stays) · w = (H · row of ``weight``) restricted to what stays.
    """
    groups, rows, columns = weight.shape
    if groups * rows * columns**3 / 3 > WORK:
        return found
    diagonal = moments.diagonal(dim1=1, dim2=2)
    damped = moments + torch.diag_embed(DAMPING * diagonal.mean(1, keepdim=True).expand_as(diagonal).clamp_min(1e-30))
    wanted = weight.double() @ damped
    solved = torch.empty_like(found)
    for group in range(groups):
        for start in range(0, rows, ROWS):
            part = mask[group, start : start + ROWS].double()
            system = damped[group] * part[:, :, None] * part[:, None, :] + torch.diag_embed(1 - part)
            right = (wanted[group, start : start + ROWS] * part)[..., None]
            solved[group, start : start + ROWS] = torch.cholesky_solve(right, torch.linalg.cholesky(system))[..., 0]
    return solved * mask
