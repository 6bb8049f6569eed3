"""What the filters of convolutions are like, and how far they moved: numbers that cost no data.

After P. Gavrikov and J. Keuper, "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters"
(CVPR 2022). A filter is one k × k slice of a weight, for one output and one input channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ZERO = 0.01  # of the largest weight: a filter below it everywhere counts as zero
RANDOM = (1.2618047, 0.88767525, 2.30436435, -0.31050834)  # of the logistic fit to random filters
BINS = 70
MANY_ZERO, FEW_PATTERNS, ALIKE, UNTRAINED = 0.3, 0.6, 0.7, 1.0  # where advice begins


def sparsity(weight: Tensor) -> float:
    """Share of filters that are all but zero."""
    filters = _filters(weight).abs()
    largest = float(filters.max()) or 1.0
    return float((filters < ZERO * largest).all(1).double().mean())


def variance_entropy(weight: Tensor) -> float:
    """Entropy (base 10) of the variances along the principal directions of the filters; 0: one pattern, scaled."""
    filters = _filters(weight)
    sizes = torch.linalg.svdvals(filters - filters.mean(0))
    share = sizes.square() / sizes.square().sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(-(share * share.log10()).sum()) + 0.0


def random_entropy(count: int) -> float:
    """What so many random 3 × 3 filters have."""
    height, slope, middle, shift = RANDOM
    return height / (1 + math.exp(-slope * (math.log2(count) - middle))) + shift


def orthogonality(weight: Tensor) -> float:
    """1 where all output channels are orthogonal, 0 where they are all parallel."""
    rows = nn.functional.normalize(weight.detach().double().flatten(1), dim=1)
    if len(rows) < 2:
        return 1.0
    products = (rows @ rows.T).abs()
    return float(1 - (products.sum() - products.diagonal().sum()) / (len(rows) * (len(rows) - 1)))


def drift(one: Tensor, other: Tensor) -> float:
    """How differently two sets of filters are spread: symmetric divergence along common principal directions."""
    sets = [_filters(weight) / weight.detach().abs().max().clamp_min(1e-30) for weight in (one, other)]
    both = torch.cat(sets)
    centre = both.mean(0)
    _, sizes, directions = torch.linalg.svd(both - centre, full_matrices=False)
    share = sizes.square() / sizes.square().sum().clamp_min(1e-300)
    places = [(filters - centre) @ directions.T for filters in sets]
    total = 0.0
    for axis, weight in enumerate(share.tolist()):
        along = [place[:, axis] for place in places]
        low, high = float(torch.cat(along).min()), float(torch.cat(along).max())
        first, second = (_histogram(values, low, high) for values in along)
        total += weight * float(((first - second) * (first / second).log()).sum())
    return total


def _histogram(values: Tensor, low: float, high: float) -> Tensor:
    counts = torch.histc(values, BINS, low, high if high > low else low + 1)
    return (counts / len(values)).clamp_min(torch.finfo(torch.float32).eps)


def _filters(weight: Tensor) -> Tensor:
    return weight.detach().double().flatten(2).flatten(0, 1)


def rows_of(module: nn.Module, original: nn.Module) -> Iterator[dict[str, Any]]:
    """One row for each convolution with 3 × 3 filters; drift from the layer of that name in the original."""
    before = dict(original.named_modules())
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (3, 3):
            continue
        count = layer.weight.shape[0] * layer.weight.shape[1]
        old = before.get(path)
        same = isinstance(old, nn.Conv2d) and old.weight.shape == layer.weight.shape
        entropy = variance_entropy(layer.weight)
        found = {
            "layer": path, "filters": count, "sparsity": sparsity(layer.weight), "entropy": entropy,
            "against_random": entropy / random_entropy(count), "orthogonality": orthogonality(layer.weight),
            "drift": drift(old.weight, layer.weight) if same else None,  # type: ignore[union-attr]
        }  # fmt: skip
        yield {**found, "advice": advice(found)}


def advice(row: dict[str, Any]) -> str:
    """What to try on a layer like this, empty for nothing."""
    if row["sparsity"] >= MANY_ZERO:
        return f"{row['sparsity']:.0%} of its filters are all but zero: prune channels"
    if row["against_random"] >= UNTRAINED:
        return "its filters are as varied as random ones: train it longer"
    if row["against_random"] <= FEW_PATTERNS:
        return "its filters are few patterns, scaled: factorize with spatial-svd"
    if row["orthogonality"] <= ALIKE:
        return "its output channels are alike: factorize with channel-svd"
    return ""
