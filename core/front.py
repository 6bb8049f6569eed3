"""A change of layout and the preprocessing as operators in front of a network, and samples that fit it then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Arrays, Graph, Preprocessing, TensorSpec
from edgepack.errors import Unsupported
from edgepack.graph import recapture

if TYPE_CHECKING:
    import torch
    from torch import nn


def with_front(graph: Graph, layout: str | None, normalize: bool) -> Graph:
    """Put a change of layout and the preprocessing in front of the network, as operators of the graph.

    With ``normalize``, every image input (one that has preprocessing) takes raw uint8 NHWC pixels and the graph
    computes ``(raw / scale - mean) / std`` itself. With ``layout`` alone, NCHW inputs become NHWC.

    Raises:
        Unsupported: no input has a layout, or there is no preprocessing to bake in.
    """
    fronts = {spec.name: _front(spec, graph.preprocessing.get(spec.name), layout, normalize) for spec in graph.inputs}
    specs = tuple(fronts[spec.name][0] for spec in graph.inputs)
    if specs == graph.inputs:
        if normalize:
            raise Unsupported("normalize: no input of this model is an image", "leave out normalize")
        return graph
    fronted = recapture(graph, _fronted(graph, [fronts[spec.name][1] for spec in graph.inputs]), specs)
    baked = {spec.name for spec in specs if normalize and spec.dtype == "uint8"}
    left = {
        name: replace(how, scale=1.0, mean=(), std=()) if name in baked else how
        for name, how in graph.preprocessing.items()
    }
    return replace(fronted, preprocessing=left)


def to_front(values: Arrays, model: Sequence[TensorSpec], artifact: Sequence[TensorSpec], raw: Arrays) -> Arrays:
    """The same samples as another interface takes them: raw pixels, NHWC, or unchanged."""
    arrays = {}
    for inner, outer in zip(model, artifact, strict=True):
        if outer.dtype != inner.dtype:
            arrays[outer.name] = np.ascontiguousarray(raw[inner.name])
        elif outer.layout != inner.layout:
            arrays[outer.name] = np.ascontiguousarray(np.moveaxis(values[inner.name], 1, -1))
        else:
            arrays[outer.name] = values[inner.name]
    return arrays


def _front(
    spec: TensorSpec, how: Preprocessing | None, layout: str | None, normalize: bool
) -> tuple[TensorSpec, Callable[[torch.Tensor], torch.Tensor]]:
    import torch

    if spec.layout != "NCHW":
        return spec, lambda tensor: tensor
    n, c, h, w = spec.shape
    if normalize and how is not None:
        channels = c if isinstance(c, int) else 1
        mean = torch.tensor(how.mean or [0.0] * channels).reshape(1, -1, 1, 1)
        std = torch.tensor(how.std or [1.0] * channels).reshape(1, -1, 1, 1)
        scale = how.scale

        def pixels(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.permute(0, 3, 1, 2).to(torch.float32) / scale - mean) / std

        return TensorSpec(spec.name, "uint8", (n, h, w, c), "NHWC"), pixels
    if layout == "NHWC":
        return TensorSpec(spec.name, spec.dtype, (n, h, w, c), "NHWC"), lambda tensor: tensor.permute(0, 3, 1, 2)
    return spec, lambda tensor: tensor


def _fronted(graph: Graph, fronts: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> nn.Module:
    from torch import nn

    class Fronted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = graph.program.module(check_guards=False)

        def forward(self, *tensors: torch.Tensor) -> Any:
            return self.network(*(front(tensor) for front, tensor in zip(fronts, tensors, strict=True)))

    return Fronted()
