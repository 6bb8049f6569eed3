"""What layers read, and how far their factored forms answer from them, on samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepack.compress._hooks import hooked
from edgepack.compress._spots import Spot
from edgepack.compress._stages import Stage

if TYPE_CHECKING:
    from edgepack.task import Task

SAMPLES, NOISE = 64, 8  # of the data, or of noise where the task has none
BATCH = 16
WIDEST = 2304  # second moments of more numbers than this take too long
Seen = Callable[[Tensor, Tensor], None]


def moments(module: nn.Module, task: Task, spots: Sequence[Spot], count: int = SAMPLES) -> dict[nn.Module, Tensor]:
    """Second moment of what each layer reads, (groups, n, n) with n = c·k / groups; on the calibration data alone.

    Not of layers with a space to factor on one or three axes, nor of very wide ones.
    """
    fitting = [spot for spot in spots if _width(spot.dense) <= WIDEST and _unfolds(spot.dense)]
    if task.calibration is None or not fitting:
        return {}
    found: dict[nn.Module, Tensor] = {}

    def watch(spot: Spot) -> Seen:
        def seen(x: Tensor, _: Tensor) -> None:
            rows = columns(spot.dense, x)
            found[spot.layer] = found.get(spot.layer, 0) + rows @ rows.transpose(1, 2)

        return seen

    _run(module, task, {spot.layer: watch(spot) for spot in fitting}, count)
    return found


def columns(dense: Stage, x: Tensor) -> Tensor:
    """What each output position of a layer reads, float64 (groups, n, positions)."""
    if not dense.kernel:
        return x.double().flatten(0, -2).T[None]
    if dense.padding == "same":
        reach = [d * (k - 1) for d, k in zip(dense.dilation, dense.kernel, strict=True)]
        x = F.pad(x, [end for total in reversed(reach) for end in (total // 2, total - total // 2)])
    padding = (0, 0) if isinstance(dense.padding, str) else dense.padding
    unfolded = F.unfold(x.double(), dense.kernel, dense.dilation, padding, dense.stride)
    return unfolded.movedim(1, 0).flatten(1).reshape(dense.groups, _width(dense), -1)


def errors(module: nn.Module, task: Task, spots: Sequence[Spot]) -> None:
    """Give each form its error: squared distance from the dense layer's results over their square, bias aside."""
    sums = {spot.layer: torch.zeros(len(spot.options), dtype=torch.float64) for spot in spots}

    def watch(spot: Spot) -> Seen:
        def seen(x: Tensor, y: Tensor) -> None:
            bias = getattr(spot.layer, "bias", None)
            plain = (
                y
                if bias is None
                else y - (bias if not spot.dense.kernel else bias.view(-1, *[1] * len(spot.dense.kernel)))
            )
            sums[spot.layer][0] += plain.double().square().sum()
            for index, option in enumerate(spot.options[1:], 1):
                sums[spot.layer][index] += (option.module(x) - y).double().square().sum()

        return seen

    _run(module, task, {spot.layer: watch(spot) for spot in spots if len(spot.options) > 1})
    for spot in spots:
        size, *missed = sums[spot.layer].tolist()
        spot.options[1:] = [replace(option, error=value / size if size else 0.0)
                            for option, value in zip(spot.options[1:], missed, strict=True)]  # fmt: skip


def _width(dense: Stage) -> int:
    return dense.inputs // dense.groups * math.prod(dense.kernel)


def _unfolds(dense: Stage) -> bool:
    return len(dense.kernel) in (0, 2)


def _run(module: nn.Module, task: Task, watches: dict[nn.Module, Seen], count: int = SAMPLES) -> None:
    """Show each layer's input and result while the network computes the samples."""
    data = task.calibration if task.calibration is not None else task.evaluation
    samples = task.samples(NOISE if data is None else count)
    hooks = ((layer, lambda _, read, result, seen=seen: seen(read[0], result)) for layer, seen in watches.items())
    with hooked(hooks), torch.no_grad():
        for inputs in _batches(task, samples):
            module(*inputs)


def _batches(task: Task, samples: dict[str, Any]) -> Iterator[list[Tensor]]:
    axes = [item.batch_axis for item in task.inputs]
    tensors = [torch.from_numpy(samples[item.name]) for item in task.inputs]
    size = next((item.rows for item in task.inputs if item.rows > 1), BATCH)
    if any(item.whole for item in task.inputs):
        yield tensors
        return
    for parts in zip(*(torch.split(one, size, axis) for one, axis in zip(tensors, axes, strict=True)), strict=True):
        yield list(parts)
