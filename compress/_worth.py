"""What each unit of a group is worth, by several criteria.

``taylor``: with a factor on a unit, the outputs change by -∂outputs/∂factor when the factor falls from 1 to 0, to first
order (Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019). What counts is the expected
square of that over all outputs. The derivative of the sum of the outputs with random signs has just that expected
square, so no labels are needed. It is Σ w·∂/∂w over the weights that read the unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepack.compress._cutting import IN, Group, depthwise, owner, tensors
from edgepack.compress._tune_feed import Samples, drawn, looked_at
from edgepack.graph import flatten

if TYPE_CHECKING:
    from edgepack.contracts import Run
    from edgepack.task import Task

BATCH = 32  # samples whose gradients are squared together


def magnitudes(module: nn.Module, groups: Sequence[Group], power: int) -> list[Tensor]:
    """Norm of all weights of each unit, L1 or L2, over the group's mean."""
    found = []
    for group in groups:
        total = torch.zeros(group.units)
        for side, rows in group.sides.items():
            for _, value, axis in tensors(module, side):
                if value.ndim > 1:
                    total += _per_unit(value.detach().abs() ** power, axis, rows)
        total = total ** (1 / power)
        found.append(total / total.mean().clamp_min(1e-30))
    return found


def scales(module: nn.Module, groups: Sequence[Group]) -> list[Tensor | None]:
    """Sum of |γ| of the batch norms of each unit, None for a group that has none."""
    found: list[Tensor | None] = []
    for group in groups:
        norms = [(side, rows) for side, rows in group.sides.items() if isinstance(owner(module, side[0]), _BatchNorm)]
        parts = [_per_unit(value.detach().abs(), axis, rows) for side, rows in norms
                 for name, value, axis in tensors(module, side) if name == "weight"]  # fmt: skip
        found.append(torch.stack(parts).sum(0) if parts else None)
    return found


def taylor(module: nn.Module, groups: Sequence[Group], task: Task, run: Run, samples: int) -> list[Tensor]:
    """The expected square of what the outputs change by when a unit goes, to first order."""
    data = looked_at(task)
    assert data is not None
    whole = min(samples, len(data))
    asked = {value: value.requires_grad for value in module.parameters()}
    for value in asked:
        value.requires_grad_(True)
    found, count, step = [torch.zeros(group.units) for group in groups], 0, run.progress("weighing channels", whole)
    try:
        with torch.enable_grad():
            for total, size in _sums(module, drawn(task, data, samples, run.seed, BATCH), run.seed):
                module.zero_grad(set_to_none=True)
                total.backward()  # type: ignore[no-untyped-call]
                found = [old + _slopes(module, group) ** 2 for old, group in zip(found, groups, strict=True)]
                count += size
                step(size)
    finally:
        module.zero_grad(set_to_none=True)
        for value, before in asked.items():
            value.requires_grad_(before)
    return [values / count for values in found]


def _sums(module: nn.Module, parts: Iterable[Samples], seed: int) -> Iterator[tuple[Tensor, int]]:
    """The sum of the outputs for some samples, with random signs, and the number of samples."""
    random = torch.Generator().manual_seed(seed)
    for part in parts:
        outputs = [one for one in flatten(module(*part.inputs)) if one.is_floating_point()]
        signs = [torch.randint(0, 2, one.shape, generator=random) * 2 - 1 for one in outputs]
        yield torch.stack([(one * sign).sum() for one, sign in zip(outputs, signs, strict=True)]).sum(), part.count


def _slopes(module: nn.Module, group: Group) -> Tensor:
    """The derivative by a factor on each unit."""
    total = torch.zeros(group.units)
    for side, rows in group.sides.items():
        if side[1] != IN or depthwise(owner(module, side[0])):
            continue
        for _, value, axis in tensors(module, side):
            if value.grad is not None:
                total += _per_unit(value.detach() * value.grad, axis, rows)
    return total


def _per_unit(values: Tensor, axis: int, rows: Sequence[Sequence[int]]) -> Tensor:
    """Sum of what belongs to each unit."""
    channels = values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1)
    where = torch.tensor([unit for unit, own in enumerate(rows) for _ in own])
    return torch.zeros(len(rows)).index_add_(0, where, channels[[index for own in rows for index in own]])
