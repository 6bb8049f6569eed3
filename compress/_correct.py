"""Bias correction: the mean error that rounding brings to each output channel is taken out of the bias.

After M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv:1906.04721),
section 4.2, measured on data instead of derived. Layers are corrected in the order of computation, each on what the
quantized layers before it feed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from edgepack.compress._observe import Watcher, batch_size, batches
from edgepack.compress._release import release

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.task import Task

SAMPLES_BYTES = 256 << 20  # the largest activation of the samples held at once
SAMPLES = 256


def sample(graph: Graph, task: Task) -> list[Tensor]:
    """The calibration samples that every layer is corrected on, as many as memory allows."""
    wanted = min(SAMPLES, 4 * batch_size(graph, SAMPLES_BYTES))
    return next(iter(batches(graph, task, min(wanted, batch_size(graph, SAMPLES_BYTES)))))


def channel_means(graph: Graph, inputs: list[Tensor], axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Mean of each output channel of the named layers (node → axis of channels), float64."""
    means: dict[str, list[Tensor]] = {name: [] for name in axes}

    def show(node: fx.Node, value: Tensor) -> None:
        means[node.name].append(_means(value, axes[node.name]))

    watcher = Watcher(graph.program.module(check_guards=False), show, axes)
    with torch.no_grad():
        for part in _parts(inputs, batch_size(graph)):
            watcher.run(*part)
    return {name: torch.cat(found).mean(0) for name, found in means.items() if found}


class Correction:
    """Runs the quantized graph once; each layer is rounded, and its bias corrected, before its result is used.

    An operator is computed for all samples before the next one, a few samples at a time, so that little besides the
    results still to be read is ever held.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        means: Mapping[str, Tensor],
        biases: Mapping[str, tuple[Tensor, int]],
        quantize: Callable[[fx.Node, Tensor], Tensor],
        put_on_grid: Callable[[fx.Node, Sequence[Tensor]], None],
    ) -> None:
        self._module, self._means, self._biases = module, means, biases
        self._quantize, self._round = quantize, put_on_grid
        self.largest = 0.0

    def run(self, inputs: Sequence[Tensor], size: int) -> None:
        """Correct on these samples, ``size`` at a time."""
        parts = [Part(self._module, part) for part in _parts(inputs, size)]
        for node in self._module.graph.nodes:
            if node.name in self._means:
                self._round(node, [part.env[node.args[0]] for part in parts])
            for part in parts:
                part.step(node)
            if node.name in self._biases:
                self._correct(node, [part.env[node] for part in parts])
                release()
            for part in parts:
                value = part.env.get(node)
                if isinstance(value, Tensor):
                    part.env[node] = self._quantize(node, value)

    def _correct(self, node: fx.Node, results: Sequence[Tensor]) -> None:
        bias, axis = self._biases[node.name]
        mean = torch.cat([_means(result, axis) for result in results]).mean(0)
        error = (self._means[node.name] - mean).to(bias.dtype)
        bias += error
        for result in results:
            result += error.view([-1 if index == axis else 1 for index in range(result.dim())])
        self.largest = max(self.largest, float(error.abs().max()))


class Part(fx.Interpreter):
    """Some samples on their way through a graph, operator by operator; forgets what nothing reads any more."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(module)
        self.args_iter = iter(inputs)

    def step(self, node: fx.Node) -> None:
        """Compute one operator, the next in order."""
        self.env[node] = self.run_node(node)
        for done in self.user_to_last_uses.get(node, ()):
            self.env.pop(done, None)


def _parts(inputs: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(inputs[0]), size):
        yield tuple(value[start : start + size] for value in inputs)


def _means(value: Tensor, axis: int) -> Tensor:
    """Mean of each channel of each sample in float64; one by one, for a copy of all takes twice their memory."""
    samples = value.movedim(axis, 1)
    return torch.stack([sample.reshape(len(sample), -1).double().mean(1) for sample in samples])
