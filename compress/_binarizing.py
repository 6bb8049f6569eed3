"""The work of ``binarize``: which layers, from what thresholds, trained with what term, and what their trees save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgepack.compress._binary import Binary
from edgepack.compress._brevitas import take_binary
from edgepack.compress._graph import Call, GraphView, named, put_layer, shape
from edgepack.compress._hooks import hooked
from edgepack.compress._projecting import shorten, take_statistics
from edgepack.compress._tree_pull import TreePull, signs_of, tree_of
from edgepack.compress._tune import Hold, tune
from edgepack.errors import InputError, Unsupported
from edgepack.graph import capture
from edgepack.progress import Silent
from edgepack.scoring import Network, score
from edgepack.treecode import encode, form

if TYPE_CHECKING:
    from edgepack.compress.binarize import Binarize
    from edgepack.contracts import Run
    from edgepack.metrics import Metric
    from edgepack.task import Task

SAMPLES = 64  # that thresholds are taken from
REASON = "the first and the last layer keep their precision"


@dataclass
class Binarizing:
    """One run of the pass.

    Attributes:
        layers: path → layer, of those that were made binary.
        pixels: path → results per channel and sample.
    """

    options: Binarize
    task: Task
    run: Run
    layers: dict[str, Binary] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=dict)

    def run_all(self, module: nn.Module) -> nn.Module:
        taken = take_binary(module)
        if taken:
            self.run.note(f"binarize: {len(taken)} binary layers of brevitas are taken over as they were trained")
            if not self.options.layers:
                return self._as_trained(module)
        view = GraphView.of(module, self.task)
        chosen = self._chosen(view)
        for call, (threshold, width) in zip(chosen, self._inputs(module, chosen), strict=True):
            self._put(module, call, threshold, width)
        self._train(module)
        latent = {path: layer.latent.detach().clone() for path, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.settle()
        if self.options.mst_projection:
            self._project(module, latent)
        self._report()
        return module

    def _as_trained(self, module: nn.Module) -> nn.Module:
        if self.options.tune is not None:
            raise Unsupported(
                "binarize: binary layers of brevitas are taken over as they were trained",
                "leave tune out, or name layers",
            )
        return tune(module, self.task, self.run, None)

    def _chosen(self, view: GraphView) -> list[Call]:
        """Calls of the layers to make binary. Raises Unsupported where none is left or one cannot be."""
        calls = [call for call in view.calls if isinstance(call.layer, (_ConvNd, nn.Linear))]
        if self.options.layers:
            asked = [call for call in calls if named(call.path, self.options.layers)]
            for call in asked:
                if (why := obstacle(call, view)) is not None:
                    raise Unsupported(f"binarize: {call.path} cannot be made binary: {why}", "leave it out of layers")
        else:
            asked = [call for call in calls[1:-1] if self._fits(call, view)]
        if not asked:
            raise Unsupported("binarize: no layer to make binary", f"name some with layers = […]; {REASON}")
        return asked

    def _fits(self, call: Call, view: GraphView) -> bool:
        why = obstacle(call, view)
        if why is not None:
            self.run.note(f"binarize: {call.path} stays float: {why}")
        return why is None

    def _inputs(self, module: nn.Module, chosen: list[Call]) -> list[tuple[Tensor, float]]:
        """Per layer the mean of what it reads, channel by channel, and how far around it most values lie."""
        seen: dict[nn.Module, Tensor] = {}
        with torch.no_grad(), _watching([call.layer for call in chosen], seen):
            module(*self._some())
        return [_spread(seen[call.layer], call.layer) for call in chosen]

    def _some(self) -> list[Tensor]:
        stack = self.task.samples(SAMPLES)
        return [torch.from_numpy(stack[item.name]) for item in self.task.inputs]

    def _put(self, module: nn.Module, call: Call, threshold: Tensor, width: float) -> None:
        result = shape(call.node)
        same = result == shape(call.node.all_input_nodes[0])
        layer = Binary(call.layer, threshold, width, self.options.shortcuts and same)
        put_layer(module, call.layer, layer)
        self.layers[call.path] = layer
        axis = 1 if isinstance(call.layer, _ConvNd) else len(result) - 1
        self.pixels[call.path] = math.prod(result[1:axis] + result[axis + 1 :])

    def _train(self, module: nn.Module) -> None:
        settings = self.options.tune
        if settings is None:
            self.run.note("binarize: without tune the binary network was not trained; expect nothing of it")
            tune(module, self.task, self.run, None)
            return
        if settings.norms != "train":
            self.run.note("binarize: batch norms learn the statistics of the batches: those of before are of no use")
        pull = TreePull(
            list(self.layers.values()), self.options.mst, self.options.mst_weight, settings.epochs,
            self.options.mst_density,
        )  # fmt: skip
        used = self.options.mst != "none" and self.options.mst_weight > 0
        hold = Hold(losses=[pull.loss], schedule=[pull.advance]) if used else Hold()
        tune(module.train(), self.task, self.run, replace(settings, norms="train"), hold)

    def _project(self, module: nn.Module, latent: Mapping[str, Tensor]) -> None:
        """Shorten the trees without training, and say what that costs."""
        before = self._score(module)
        for path, layer in self.layers.items():
            shorten(layer.layer.weight.data, latent[path], self.options.mst_projection)
        taken = take_statistics(module, self.task)
        after = self._score(module)
        said = (
            "" if before is None or after is None else f"; {self._metric.name} {before:.4g} before, {after:.4g} after"
        )
        self.run.record("projection", {"share": self.options.mst_projection, "before": before, "after": after})
        self.run.note(
            f"binarize: flipped {self.options.mst_projection:g} of the weights that differ along the trees"
            f"{', batch norms took their statistics anew' if taken else ''}{said}"
        )

    def _score(self, module: nn.Module) -> float | None:
        if self.task.evaluation is None or self.task.metric is None:
            return None
        network = Network.of(capture(module, self.task))
        found = score(self.task, network, lambda: network, Silent(), "")
        assert found is not None
        return float(found["value"])

    @property
    def _metric(self) -> Metric:
        assert self.task.metric is not None
        return self.task.metric

    def _report(self) -> None:
        rows = {path: tree_costs(layer, self.pixels[path]) for path, layer in self.layers.items()}
        keys = ("weights", "stored_bits", "dense_operations", "tree_operations")
        total = {key: sum(row[key] for row in rows.values()) for key in keys}
        self.run.record("binarize", {"layers": rows, **total})
        self.run.note(
            f"binarize: {len(rows)} binary layers of {total['weights']} weights, stored in "
            f"{total['stored_bits'] / total['weights']:.2f} bits each; along trees "
            f"{total['dense_operations'] / max(total['tree_operations'], 1):.2f} times fewer bit operations"
        )


def obstacle(call: Call, view: GraphView) -> str | None:
    """Why a layer cannot be made binary, None where it can."""
    layer = call.layer
    if call.obstacle is not None:
        return call.obstacle
    if len(view.calls_of(layer)) > 1:
        return "it is used in several places"
    if isinstance(layer, _ConvTransposeNd):
        return "it is a transposed convolution"
    if isinstance(layer, _ConvNd) and layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode}"
    if isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels:
        return "a depthwise convolution has too few weights per channel"
    return None


def tree_costs(layer: Binary, pixels: int) -> Mapping[str, Any]:
    """What a binary layer costs: bits stored, and bit operations (XNORs) per sample, with and without its tree.

    Channels of different groups read different inputs: only a layer of one group has a tree.
    """
    signs, tree = signs_of(layer), tree_of(layer)
    channels, places = signs.shape
    code = encode(signs, tree.parents)
    grouped = getattr(layer.layer, "groups", 1) > 1
    dense = signs.size * pixels
    return {
        "channels": channels, "places": places, "weights": signs.size, "pixels": pixels,
        "tree_length": tree.length, "tree_depth": tree.depth,
        "density": tree.length / max((channels - 1) * places, 1),
        "stored_bits": len(code) * 8, "stored_as": form(code),
        "dense_operations": dense, "tree_operations": dense if grouped else (places + tree.length) * pixels,
    }  # fmt: skip


def _spread(values: Tensor, layer: nn.Module) -> tuple[Tensor, float]:
    channels = values.movedim(1 if isinstance(layer, _ConvNd) else -1, 0).flatten(1)
    return channels.mean(1), max(2 * float(channels.std(1).mean()), 1e-6)


@contextmanager
def _watching(layers: list[nn.Module], seen: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Remember what each layer reads."""

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[layer] = inputs[0]

    with hooked(((layer, remember) for layer in layers), before=True):
        yield
    if missing := [layer for layer in layers if layer not in seen]:
        raise InputError(f"binarize: {missing[0]} is never called as a layer")
