"""Scores on evaluation data: the original, the compressed graph and every artifact, the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph, TensorSpec
from edgepack.front import to_front
from edgepack.graph import caller
from edgepack.progress import Progress
from edgepack.samples import Array, compute

if TYPE_CHECKING:
    from edgepack.data import Batch
    from edgepack.task import Task

BATCH = 50


@dataclass(frozen=True)
class Network:
    """Anything that computes: a graph or an engine's session, with its interface.

    Attributes:
        call: arrays by input name → arrays by output name, one batch.
        inputs: as ``call`` takes them: preprocessed, NHWC, or raw pixels.
    """

    call: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    @classmethod
    def of(cls, graph: Graph) -> Network:
        return cls(caller(graph), graph.inputs, graph.outputs)

    def outputs_of(self, task: Task, batch: Batch) -> dict[str, Array]:
        arrays = to_front(batch.inputs, task.specs, self.inputs, batch.raw)
        return compute(self.call, self.inputs, self.outputs, arrays, BATCH)


def score(
    task: Task, network: Network, original: Callable[[], Network], progress: Progress, what: str
) -> dict[str, Any] | None:
    """Metric of a network on the task's evaluation data, with a 95 % interval; None without data or metric.

    ``original`` makes the network whose outputs are the targets of metrics that compare with it.
    """
    data, metric = task.evaluation, task.metric
    if data is None or metric is None:
        return None
    step = progress.start(what, len(data))
    reference = original() if metric.needs_original else None
    rows = []
    for batch in data.batches(BATCH):
        targets = batch.targets if reference is None else metric.pick(reference.outputs_of(task, batch))
        rows.append(metric.statistics(metric.pick(network.outputs_of(task, batch)), targets))
        step(len(rows[-1]))
    statistics = np.concatenate(rows)
    low, high = metric.interval(statistics)
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "value": metric.reduce(statistics),
        "low": low,
        "high": high,
        "samples": len(statistics),
        "higher_is_better": metric.higher_is_better,
    }


def beside(original: Mapping[str, Any] | None, this: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The manifest's ``score``: this artifact's value with its interval, the original's beside it."""
    if this is None:
        return None
    rest = {key: value for key, value in this.items() if key != "value"}
    return {**rest, "this": this["value"], "original": None if original is None else original["value"]}


def drop(score_: Mapping[str, Any] | None) -> float | None:
    """How much worse than the original, positive for a loss; None when unknown."""
    if score_ is None or score_["original"] is None:
        return None
    sign = 1.0 if score_["higher_is_better"] else -1.0
    return float(sign * (score_["original"] - score_["this"]))
