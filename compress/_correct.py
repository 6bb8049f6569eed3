"""Bias correction: the mean error that rounding brings to each output channel is taken out of the bias.

After M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv:1906.04721),
section 4.2, measured on data instead of derived. Layers are corrected in the order of computation, each on what the
quantized layers before it feed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from edgepack.compress._observe import Watcher, batch_size, batches

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.task import Task

SAMPLES_BYTES = 256 << 20  # the largest activation of the samples held at once
SAMPLES = 256


def sample(graph: Graph, task: Task) -> list[Tensor]:
    """The calibration samples that every layer is corrected on, as many as memory allows."""
    wanted = min(SAMPLES, 4 * batch_size(graph, SAMPLES_BYTES))
    return next(iter(batches(graph, task, min(wanted, batch_size(graph, SAMPLES_BYTES)))))


def channel_means(module: fx.GraphModule, inputs: list[Tensor], axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Mean of each output channel of the named layers (node → axis of channels), float64."""
    means: dict[str, Tensor] = {}

    def show(node: fx.Node, value: Tensor) -> None:
        means[node.name] = _mean(value, axes[node.name])

    with torch.no_grad():
        Watcher(module, show, axes).run(*inputs)
    return means


class Correction(fx.Interpreter):
    """Runs the quantized graph once; each layer is rounded, and its bias corrected, before its result is used."""

    def __init__(
        self,
        module: fx.GraphModule,
        means: Mapping[str, Tensor],
        biases: Mapping[str, tuple[Tensor, int]],
        quantize: Callable[[fx.Node, Tensor], Tensor],
        put_on_grid: Callable[[fx.Node, Tensor], None],
    ) -> None:
        super().__init__(module)
        self._means, self._biases, self._quantize, self._round = means, biases, quantize, put_on_grid
        self.largest = 0.0

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self._means:
            source = n.args[0]
            assert isinstance(source, fx.Node)
            self._round(n, self.env[source])
        result = super().run_node(n)
        if n.name in self._biases:
            bias, axis = self._biases[n.name]
            error = (self._means[n.name] - _mean(result, axis)).to(bias.dtype)
            bias += error
            result += error.view([-1 if index == axis else 1 for index in range(result.dim())])
            self.largest = max(self.largest, float(error.abs().max()))
        return self._quantize(n, result) if isinstance(result, Tensor) else result


def _mean(value: Tensor, axis: int) -> Tensor:
    """Mean of each channel in float64; sample by sample, for a copy of all in float64 takes twice their memory."""
    samples = value.movedim(axis, 1)
    return torch.stack([sample.reshape(len(sample), -1).double().mean(1) for sample in samples]).mean(0)
