"""How many weights of each layer go: by one threshold for all, the same share everywhere, or by a layer's shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GLOBAL, LAYERWISE, ERK = "global", "layerwise", "erk"
ALLOCATIONS = (GLOBAL, LAYERWISE, ERK)
FLOOR = 0.05  # of a layer's weights that stay, whatever the threshold says


def by_threshold(scores: Sequence[Tensor], sparsity: float) -> list[int]:
    """Units of each layer that go when the lowest of all layers go; the best of each layer stay."""
    guarded = [_guarded(layer.flatten().double()) for layer in scores]
    total = sum(len(layer) for layer in guarded)
    order = torch.cat(guarded).argsort(stable=True)[: round(sparsity * total)]
    owner = torch.repeat_interleave(torch.arange(len(guarded)), torch.tensor([len(layer) for layer in guarded]))
    return torch.bincount(owner[order], minlength=len(guarded)).tolist()


def _guarded(scores: Tensor) -> Tensor:
    best = scores.topk(math.ceil(FLOOR * len(scores))).indices
    return scores.index_fill(0, best, torch.inf)


def evenly(sizes: Sequence[int], sparsity: float) -> list[int]:
    """Units of each layer, given how many it has; their sum is the share of all."""
    wanted = round(sparsity * sum(sizes))
    exact = [size * wanted / sum(sizes) for size in sizes]
    return _whole(exact, wanted, sizes)


def by_shape(sizes: Sequence[int], shapes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """Units of each layer: the share that stays is proportional to Σ axes / Π axes, at most 1.

    After U. Evci et al., "Rigging the Lottery: Making All Tickets Winners" (arXiv:1911.11134), Erdős–Rényi kernels.
    """
    density = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    staying = sum(sizes) - round(sparsity * sum(sizes))
    while True:
        rest = [index for index in range(len(sizes)) if index not in dense]
        left = staying - sum(sizes[index] for index in dense)
        factor = left / sum(density[index] * sizes[index] for index in rest) if rest else 0.0
        full = {index for index in rest if factor * density[index] > 1}
        if not full:
            break
        dense |= full
    exact = [0.0 if i in dense else size * (1 - factor * density[i]) for i, size in enumerate(sizes)]
    return _whole(exact, sum(sizes) - staying, sizes)


def _whole(exact: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Whole numbers near these that add up to the total: the largest remainders are rounded up."""
    found = [min(math.floor(value + 1e-9), limit) for value, limit in zip(exact, most, strict=True)]
    order = sorted(range(len(exact)), key=lambda index: found[index] - exact[index])
    for index in [index for index in order if found[index] < most[index]][: total - sum(found)]:
        found[index] += 1
    return found
