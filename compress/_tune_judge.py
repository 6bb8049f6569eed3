"""Which epoch is best, judged on samples that are never trained on; what it is worth, reported on others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepack.compress._teach import output_index, output_names
from edgepack.graph import flatten

if TYPE_CHECKING:
    from edgepack.compress._tune_feed import Feed, Samples
    from edgepack.metrics import Metric

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
TRAINING_SHARE = 20  # at most one training sample of this many is held out for each of the two purposes


@dataclass(frozen=True)
class Judge:
    """Scores a network in training by the task's metric, else by the loss that is trained.

    Attributes:
        feed: of the held-out samples.
        choose, report: rows of the two halves.
        metric: None: by ``loss``, the smaller the better.
        known: the held-out samples are training data, which the original may know by heart: its metric on them says
            little, so epochs are chosen by ``loss``, which follows the teacher.
        original: whose outputs are the targets of metrics that compare with it.
    """

    network: nn.Module
    feed: Feed
    choose: Rows
    report: Rows
    metric: Metric | None
    original: nn.Module
    loss: Callable[[Samples], Tensor]
    known: bool = False

    @property
    def name(self) -> str:
        return "loss" if self.metric is None else self.metric.name

    def choice(self) -> float:
        """Score on the half that choices are made on; the higher, the better."""
        metric = None if self.known else self.metric
        found = _reduce(self._statistics(self.choose, metric), metric)
        return found if metric is not None and metric.higher_is_better else -found

    def verdict(self) -> dict[str, Any]:
        """Score on the other half, as the report writes it."""
        rows = self._statistics(self.report, self.metric)
        low, high = (None, None) if self.metric is None else self.metric.interval(rows)
        return {
            "metric": self.name,
            "value": _reduce(rows, self.metric),
            "low": low,
            "high": high,
            "samples": len(rows),
        }

    def _statistics(self, rows: Rows, metric: Metric | None) -> np.ndarray[Any, Any]:
        found = []
        with in_inference(self.network), torch.no_grad():
            for start in range(0, len(rows), self.feed.size):
                for batch in self.feed.data.take(rows[start : start + self.feed.size].tolist()):
                    found.append(self._batch(self.feed.tensors(batch), metric))
        return np.concatenate(found)

    def _batch(self, samples: Samples, metric: Metric | None) -> np.ndarray[Any, Any]:
        if metric is None:
            return np.full((samples.count, 1), float(self.loss(samples)))
        outputs = self._outputs(self.network, samples, metric)
        targets = samples.targets
        if metric.needs_original:
            targets = self._outputs(self.original, samples, metric)
        return metric.statistics(outputs.numpy(), None if targets is None else targets.numpy())

    def _outputs(self, network: nn.Module, samples: Samples, metric: Metric) -> Tensor:
        result = network(*samples.inputs)
        index = output_index(output_names(network, result, self.feed.task), metric.output, metric.name)
        return flatten(result)[index]


def _reduce(rows: np.ndarray[Any, Any], metric: Metric | None) -> float:
    return float(rows.mean()) if metric is None else metric.reduce(rows)


@contextmanager
def in_inference(network: nn.Module) -> Iterator[None]:
    """Inference mode for a while; each layer then goes back to the mode it was in."""
    modes = [(layer, layer.training) for layer in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


def halves(count: int, held_out: int, seeds: Sequence[int], own: bool) -> tuple[Rows, Rows, Rows]:
    """Rows to choose on, to report on, and the rest. ``own``: they are held-out data as a whole."""
    order = np.random.default_rng([*seeds, 0]).permutation(count)
    size = min(held_out, count // 2 if own else count // TRAINING_SHARE)
    return order[:size], order[size : 2 * size], np.sort(order[2 * size :])
