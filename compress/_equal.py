"""Whether two modules give the same answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgepack.graph import flatten

ULPS = 16


def results(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a module answers, with the same random numbers each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [tensor.clone() for tensor in flatten(module(*(tensor.clone() for tensor in inputs)))]


def difference(these: Sequence[Tensor], those: Sequence[Tensor], limit: float) -> tuple[float, float]:
    """Largest max|a − b| / max|b| of the outputs, and the limit that fits their coarsest type.

    Where both hold the same infinity or both hold NaN they agree; where only one does, the difference is infinite.
    """
    if [tensor.shape for tensor in these] != [tensor.shape for tensor in those]:
        return float("inf"), limit
    kinds = [tensor.dtype for tensor in those if tensor.dtype.is_floating_point]
    limit = max([limit, *(ULPS * torch.finfo(kind).eps for kind in kinds)])
    return max((_relative(a.double(), b.double()) for a, b in zip(these, those, strict=True)), default=0.0), limit


def rounding(module: nn.Module, inputs: Sequence[Tensor]) -> float:
    """How far a module's own rounding moves its answers: relative difference after one ulp on every input.

    Around 1e-6 for trained float32 networks; deep ones with odd statistics reach 1e-3.
    """
    signs = torch.Generator().manual_seed(0)
    nudged = []
    for tensor in inputs:
        if tensor.dtype.is_floating_point:
            up = torch.rand(tensor.shape, generator=signs) < 0.5
            ulp = torch.finfo(tensor.dtype).eps
            tensor = tensor * torch.where(up, 1 + ulp, 1 - ulp).to(tensor.dtype)
        nudged.append(tensor)
    return difference(results(module, nudged), results(module, inputs), 0.0)[0]


def _relative(this: Tensor, that: Tensor) -> float:
    finite = this.isfinite() & that.isfinite()
    if not torch.equal(torch.where(finite, 0.0, this).nan_to_num(7.0), torch.where(finite, 0.0, that).nan_to_num(7.0)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    apart, size = (this - that)[finite].abs().max(), that[finite].abs().max()
    return float(apart / size.clamp_min(torch.finfo(torch.float32).tiny))
