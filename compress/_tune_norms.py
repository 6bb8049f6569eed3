"""Batch norms in *Tune* mode: merged with the layer before them anew in each forward pass, inside the gradient graph.

With running statistics frozen (*Eval* mode), layer → norm is one layer with

    W' = s ⊙ W      b' = β + s·(b − μ)      s = γ / √(σ² + ε)

Computed so, values and gradients of W, b, γ and β are those of Eval by the chain rule, but the layer's result, which
Eval keeps for the gradient of γ, is never stored: memory is near that of the folded network (*Deploy*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgepack.compress._graph import Call, GraphView, argument, readers, shape

PLAIN = {kind: kind.forward for kind in (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}  # fmt: skip
TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm that alone reads its result.

    Attributes:
        path: of the layer.
    """

    path: str
    layer: nn.Module
    norm: _BatchNorm

    def merged(self, x: Tensor) -> Tensor:
        """What layer and norm compute together."""
        norm, layer = self.norm, self.layer
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else norm.weight * scale
        shift = layer.bias - norm.running_mean if isinstance(layer.bias, Tensor) else -norm.running_mean
        bias = scale * shift if norm.bias is None else norm.bias + scale * shift
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return _compute(layer, x, weight * _outputs(scale, layer, weight), bias)


def pairs_of(view: GraphView) -> list[Pair]:
    """Every batch norm with running statistics that can be merged, with its layer."""
    found = [_pair(call, view) for call in view.calls if isinstance(call.layer, _BatchNorm)]
    return [pair for pair in found if pair is not None]


@contextmanager
def tuned(pairs: Sequence[Pair]) -> Iterator[None]:
    """Compute layer and norm as one while the block runs. Parameters, buffers and their names stay as they are."""
    for pair in pairs:
        pair.layer.forward = pair.merged
        pair.norm.forward = _same  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for pair in pairs:
            del pair.layer.forward, pair.norm.forward


def _same(x: Tensor) -> Tensor:
    return x


def _pair(call: Call, view: GraphView) -> Pair | None:
    norm, source = call.layer, call.node.args[0]
    assert isinstance(norm, _BatchNorm)
    before = view.call_at(source) if isinstance(source, fx.Node) else None
    if before is None or len(readers(before.node)) != 1:
        return None
    fits = _plain(norm) and _plain(before.layer) and not isinstance(before.layer, _BatchNorm)
    alone = len(view.calls_of(norm)) == len(view.calls_of(before.layer)) == 1
    running = norm.running_mean is not None and argument(call.node, "training") is False
    # channels of a linear layer are on the last axis, those of a norm on axis 1
    aligned = not isinstance(before.layer, nn.Linear) or len(shape(before.node)) == 2
    return Pair(before.path, before.layer, norm) if fits and alone and running and aligned else None


def _plain(layer: nn.Module) -> bool:
    """Whether the layer computes what its kind does, whatever gives it its weights."""
    return type(layer).forward in PLAIN.values() and "forward" not in vars(layer)


def _outputs(scale: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """Scales of output channels, in the form that multiplies the layer's weight."""
    if not isinstance(layer, _ConvTransposeNd):
        return scale.view(-1, *[1] * (weight.dim() - 1))
    rows = scale.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
    return rows.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _compute(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    assert isinstance(layer, _ConvNd)
    if isinstance(layer, _ConvTransposeNd):
        kind = next(kind for kind in TRANSPOSED if isinstance(layer, kind))
        return TRANSPOSED[kind](x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups,
                                layer.dilation)  # fmt: skip
    found: Tensor = layer._conv_forward(x, weight, bias)
    return found
