"""What the operators of a graph compute on the calibration data, batch by batch, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from edgepack.compress._ranges import BINS, Histogram
from edgepack.compress._release import release

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.task import Task

BATCH_BYTES = 16 << 20  # the largest activation of a batch


class Watcher(fx.Interpreter):
    """Runs a graph and shows each named result; results are dropped when nothing reads them any more."""

    def __init__(self, module: fx.GraphModule, show: Callable[[fx.Node, Tensor], None], names: Collection[str]) -> None:
        super().__init__(module)
        self._show, self._names = show, set(names)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names:
            self._show(n, result)
        return result


def observe_ends(
    graph: Graph, task: Task, names: Collection[str], step: Callable[[int], None]
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each named node."""
    ends: dict[str, tuple[float, float]] = {}

    def show(node: fx.Node, value: Tensor) -> None:
        low, high = (float(end) for end in value.aminmax())
        old = ends.get(node.name, (low, high))
        ends[node.name] = min(low, old[0]), max(high, old[1])

    _watch(graph, task, show, names, step)
    return ends


def observe_histograms(
    graph: Graph, task: Task, ends: Mapping[str, tuple[float, float]], step: Callable[[int], None]
) -> dict[str, Histogram]:
    """Histogram of each node in ``ends``, between its ends."""
    counts = {name: np.zeros(BINS) for name in ends}

    def show(node: fx.Node, value: Tensor) -> None:
        low, high = ends[node.name]
        if high > low:
            counts[node.name] += torch.histc(value, BINS, low, high).double().numpy()

    _watch(graph, task, show, ends, step)
    return {name: Histogram(*ends[name], counts[name]) for name in ends}


def observe_channels(
    graph: Graph, task: Task, axes: Mapping[str, int], step: Callable[[int], None]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest value per channel of each node in ``axes`` (node → axis of channels)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def show(node: fx.Node, value: Tensor) -> None:
        rows = value.movedim(axes[node.name], 0).flatten(1)
        low, high = rows.amin(1), rows.amax(1)
        if node.name in found:
            low, high = torch.minimum(low, found[node.name][0]), torch.maximum(high, found[node.name][1])
        found[node.name] = low, high

    _watch(graph, task, show, axes, step)
    return found


def batches(graph: Graph, task: Task, size: int | None = None) -> Iterator[list[Tensor]]:
    """The calibration data as the graph takes them; what a batch leaves behind is given back before the next."""
    assert task.calibration is not None
    rows = batch_size(graph) if size is None else size
    for batch in task.calibration.batches(rows):
        yield [torch.from_numpy(batch.inputs[spec.name]) for spec in graph.inputs]
        release()


def first_batches(graph: Graph, task: Task, samples: int) -> Iterator[list[Tensor]]:
    """The first calibration samples; where the graph fixes its batch, as many whole batches as hold them."""
    fixed = batch_size(graph, 0)  # 1 unless the graph fixes another
    size = fixed if fixed > 1 else min(samples, batch_size(graph))
    left = samples
    for inputs in batches(graph, task, size):
        yield inputs if fixed > 1 else [value[:left] for value in inputs]
        left -= len(inputs[0])
        if left <= 0:
            return


def batch_size(graph: Graph, limit_bytes: int = BATCH_BYTES) -> int:
    """Samples at once such that no activation is over the limit; the whole batch of a graph that fixes it."""
    fixed = next((axis for spec in graph.inputs for axis in spec.shape[:1] if isinstance(axis, int)), None)
    if fixed is not None:
        return fixed
    largest = max((_bytes_per_sample(node) for node in graph.program.graph.nodes), default=1)
    return int(max(1, min(64, limit_bytes // max(largest, 1))))


def _bytes_per_sample(node: fx.Node) -> int:
    value = node.meta.get("val")
    if node.op not in ("call_function", "placeholder") or not isinstance(value, Tensor):
        return 0
    total = 4
    for size in value.shape[1:]:
        total *= size if isinstance(size, int) else int(size.node.hint)
    return total


def _watch(
    graph: Graph,
    task: Task,
    show: Callable[[fx.Node, Tensor], None],
    names: Collection[str],
    step: Callable[[int], None],
) -> None:
    watcher = Watcher(graph.program.module(check_guards=False), show, names)
    with torch.no_grad():
        for inputs in batches(graph, task):
            watcher.run(*inputs)
            step(len(inputs[0]))
