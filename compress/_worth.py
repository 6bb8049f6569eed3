"""What each unit of a group is worth, by several criteria.

``taylor``: with a factor of 1 put on a unit, the loss changes by -∂L/∂factor when the factor becomes 0, to first order
(Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019); what is squared and averaged over
batches. ∂L/∂factor is Σ w·∂L/∂w over the weights that read the unit. Without targets the loss is the sum of the outputs
with random signs, so that the expected square is that of what the outputs change by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepack.compress._cutting import IN, Group, depthwise, owner, tensors
from edgepack.compress._teach import output_index, output_names
from edgepack.compress._tune_feed import Feed, batch_size
from edgepack.graph import flatten
from edgepack.losses import loss_of

if TYPE_CHECKING:
    from edgepack.compress._tune_feed import Samples
    from edgepack.contracts import Run
    from edgepack.data import Data
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
    """The expected square of what the loss, or the outputs, change by when a unit goes."""
    data = task.training if task.training is not None else task.calibration
    assert data is not None
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed))[:samples].tolist()
    asked = {value: value.requires_grad for value in module.parameters()}
    for value in asked:
        value.requires_grad_(True)
    found, count, step = [torch.zeros(group.units) for group in groups], 0, run.progress("weighing channels", len(rows))
    try:
        with torch.enable_grad():
            for loss, size in _losses(module, task, data, rows, run):
                module.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                found = [total + _slopes(module, group) ** 2 for total, group in zip(found, groups, strict=True)]
                count += size
                step(size)
    finally:
        module.zero_grad(set_to_none=True)
        for value, before in asked.items():
            value.requires_grad_(before)
    return [total / count for total in found]


def _losses(module: nn.Module, task: Task, data: Data, rows: list[int], run: Run) -> Iterator[tuple[Tensor, int]]:
    """The loss, summed over some samples, and their number."""
    loss, size = loss_of(task), batch_size(task, BATCH)
    random = torch.Generator().manual_seed(run.seed)
    feed = Feed(task, data, torch.tensor(rows).numpy(), size, (run.seed,))
    for start in range(0, len(rows), size):
        for batch in data.take(rows[start : start + size]):
            part: Samples = feed.tensors(batch)
            result = module(*part.inputs)
            outputs = flatten(result)
            if loss is not None and part.targets is not None:
                index = output_index(output_names(module, result, task), loss.output, "loss")
                yield loss(outputs[index], part.targets) * part.count, part.count
            else:
                signs = [torch.randint(0, 2, one.shape, generator=random) * 2 - 1 for one in outputs]
                parts = [
                    (one * sign).sum() for one, sign in zip(outputs, signs, strict=True) if one.is_floating_point()
                ]
                yield torch.stack(parts).sum(), part.count


def _slopes(module: nn.Module, group: Group) -> Tensor:
    """∂L/∂factor of each unit."""
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
