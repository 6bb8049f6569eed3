"""The keep rate that meets a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgepack.compress._cuts import Cut, cuts_of, rates
from edgepack.compress._macs import macs
from edgepack.errors import BudgetError
from edgepack.graph import flatten
from edgepack.tracing import example_inputs

if TYPE_CHECKING:
    from edgepack.contracts import Run
    from edgepack.metrics import Metric
    from edgepack.task import Task

FINE = tuple(round(1 - step / 100, 2) for step in range(96))  # 1.00 … 0.05
COARSE = FINE[::5]  # what is measured takes time
BATCH = 50


@dataclass(frozen=True)
class Budget:
    """What is to be met.

    Attributes:
        name: the option of the pass.
        before: multiply-accumulates of the network without cuts.
    """

    name: str
    limit: float
    before: int


def solve(budget: Budget, module: nn.Module, cuts: Sequence[Cut], task: Task, run: Run) -> None:
    """Give every cut the keep rate that meets the budget.

    Raises:
        BudgetError: no keep rate meets it; says how near the nearest comes.
    """
    name, limit = budget.name, budget.limit
    if name == "cost_of":
        name = "macs_ratio"
    if name == "score_drop":
        rate, value = _smallest(COARSE, _drop(module, cuts, task, run), limit)
    elif name == "macs_ratio":
        one = example_inputs(task.specs, batch=1)
        rate, value = _largest(name, FINE, _at(cuts, lambda: macs(module, one) / budget.before), limit)
    else:
        rate, value = _largest(name, COARSE, _at(cuts, lambda: _measured(module, run)), limit)
    for cut in cuts:
        cut.keep_rate = cut.rate = rate
    run.note(f"{name} {limit:.4g} gives keep rate {rate:g} ({name} {value:.3f} there)")


def _at(cuts: Sequence[Cut], value: Callable[[], float]) -> Callable[[float], float]:
    def found(rate: float) -> float:
        for cut in cuts:
            cut.rate = rate
        return value()

    return found


def _measured(module: nn.Module, run: Run) -> float:
    ratio = run.measure(module)
    kept = next(cut.rate for cut in cuts_of(module))
    run.note(f"measured at keep rate {kept:g}: {ratio.value:.3f} × [{ratio.low:.3f}, {ratio.high:.3f}] the latency")
    return ratio.value


def _largest(name: str, grid: Sequence[float], value: Callable[[float], float], limit: float) -> tuple[float, float]:
    """The first rate of a falling grid whose value, which falls with it, is within the limit."""
    low, high = 0, len(grid) - 1
    best = value(grid[high])
    if best > limit:
        raise BudgetError(
            f"reorganize: {name} {limit:g} cannot be reached: keep rate {grid[high]:g} still gives {best:.3f}",
            "cut earlier: blocks = […]",
        )
    while low < high:
        middle = (low + high) // 2
        found = value(grid[middle])
        if found <= limit:
            high, best = middle, found
        else:
            low = middle + 1
    return grid[high], best


def _smallest(grid: Sequence[float], value: Callable[[float], float], limit: float) -> tuple[float, float]:
    """The last rate of a falling grid before the value first exceeds the limit."""
    kept = grid[0], 0.0
    for rate in grid[1:]:
        found = value(rate)
        if found > limit:
            break
        kept = rate, found
    return kept


def _drop(module: nn.Module, cuts: Sequence[Cut], task: Task, run: Run) -> Callable[[float], float]:
    """How much of the score a keep rate loses on the calibration data."""
    metric = None if task.metric is None or task.metric.needs_original else task.metric
    with rates(module, 1.0):
        reference, targets = _answers(module, task)
    if metric is None or targets is None:
        run.note("score_drop is of agreement with the network before: the calibration data have no targets or metric")
        return _at(cuts, lambda: _disagreement(_answers(module, task)[0], reference))
    whole = _score(metric, reference, targets)
    sign = 1.0 if metric.higher_is_better else -1.0
    return _at(cuts, lambda: sign * (whole - _score(metric, _answers(module, task)[0], targets)))


def _score(metric: Metric, answers: Any, targets: Any) -> float:
    return float(metric.reduce(metric.statistics(answers, targets)))


def _disagreement(answers: Any, reference: Any) -> float:
    return float((answers.argmax(-1) != reference.argmax(-1)).mean())


def _answers(module: nn.Module, task: Task) -> tuple[Any, Any]:
    """The first output on the calibration data, and the targets (None where there are none)."""
    assert task.calibration is not None
    found, targets = [], []
    with torch.no_grad():
        for batch in task.calibration.batches(BATCH):
            inputs = [torch.from_numpy(batch.inputs[spec.name]) for spec in task.specs]
            found.append(flatten(module(*inputs))[0].numpy())
            if batch.targets is not None:
                targets.append(batch.targets)
    return np.concatenate(found), np.concatenate(targets) if targets else None
