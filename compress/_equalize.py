"""Cross-layer equalization: channels of an activation brought to one size, paid for by the weights around it.

Between two layers with only positively homogeneous operators between them, channel i may be divided by any s_i > 0
before and multiplied by it after; the network stays the same function. With one scale per output channel of a
weight and one per activation, that costs nothing before the activation, and nothing after it in a depthwise
convolution; in any other layer it stretches the columns of the weight, so the scales share the burden.

After M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv:1906.04721)
and G. Xiao et al., "SmoothQuant" (arXiv:2211.10438).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgepack.compress._affine import Affine, merge_after, merge_before
from edgepack.compress._axis import forward
from edgepack.compress._graph import Call, GraphView, argument, operator_of, shape
from edgepack.compress._operators import AVERAGES, LEAKY, MAXIMA, RELUS, WEIGHTED, aten, only_reader, slope

SHARE = 0.5
LIMIT = 1e4


@dataclass(frozen=True)
class Pair:
    """Two layers with one activation between them.

    Attributes:
        read: the node the second layer reads; its channel ranges are to become equal.
        axis: of the channels there.
        slope: what negative values were multiplied by on the way. Engines that round before a leaky ReLU need the
            channels there equal too, and lose little where others would have wished for other factors.
    """

    first: Call
    second: Call
    read: fx.Node
    axis: int
    slope: float


def pairs(view: GraphView) -> list[Pair]:
    """Every pair of layers that can be equalized, in the order of computation."""
    found = (_pair(view, call) for call in view.calls if _free(view, call))
    return [pair for pair in found if pair is not None and _free(view, pair.second)]


def equalize(pair: Pair, low: Tensor, high: Tensor, share: float = SHARE) -> float:
    """Scale one pair in place; largest change of a channel as a factor, 1 for none.

    Args:
        low, high: of each channel of the activation, on calibration data.
    """
    size = torch.maximum(low.abs() / pair.slope, high.abs()).double()
    scale = _scales(size, _columns(pair.second.layer), _depthwise(pair.second.layer), share)
    first, second = pair.first.layer, pair.second.layer
    before = first.weight, first.bias
    zero = torch.zeros_like(scale)
    if not merge_after(first, Affine(1 / scale, zero)):
        return 1.0
    if not merge_before(second, Affine(scale, zero)):
        first.weight, first.bias = before
        return 1.0
    return float(torch.maximum(scale, 1 / scale).max())


def _scales(size: Tensor, columns: Tensor, free: bool, share: float) -> Tensor:
    alive = (size > 0) & (columns > 0)
    wanted = size if free else size.pow(share) / columns.pow(1 - share)
    middle = wanted[alive].log().mean().exp() if bool(alive.any()) else torch.ones(())
    return torch.where(alive, (wanted / middle).clamp(1 / LIMIT, LIMIT), torch.ones_like(size))


def _columns(layer: nn.Module) -> Tensor:
    """How much of its row's scale each input channel of a layer uses: max |w| over rows, in units of the row."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach().double()
    rows = rows / rows.abs().amax(tuple(range(1, rows.dim())), keepdim=True).clamp_min(1e-30)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    assert isinstance(groups, int)
    grouped = rows.view(groups, rows.shape[0] // groups, rows.shape[1], -1)
    return grouped.abs().amax((1, 3)).flatten()


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and layer.weight.shape[1] == 1


def _free(view: GraphView, call: Call) -> bool:
    layer = call.layer
    plain = operator_of(call.node) in WEIGHTED and not isinstance(layer, _ConvTransposeNd)
    return plain and call.obstacle is None and len(view.calls_of(layer)) == 1


def _pair(view: GraphView, first: Call) -> Pair | None:
    node, axis, leak = first.node, _channels(first), 1.0
    while (reader := only_reader(node)) is not None:
        second = view.call_at(reader)
        if second is not None and operator_of(reader) in WEIGHTED:
            fits = reader.args[0] is node and axis == _channels_read(second)
            return Pair(first, second, node, axis, leak) if fits else None
        if reader.op != "call_function" or reader.args[0] is not node:
            return None
        following = _through(reader, axis)
        if following is None:
            return None
        node, axis, leak = reader, following, leak * (slope(reader) or 1.0)
    return None


def _through(node: fx.Node, axis: int) -> int | None:
    """Where the channels are after an operator with f(s·x) = s·f(x) per channel; None for any other."""
    kind = operator_of(node)
    if kind in (*RELUS, *LEAKY):
        return axis
    if kind in (*AVERAGES, *MAXIMA):
        return axis if axis < 2 else None
    if kind is aten.mean:
        return _through_mean(node, axis)
    step = forward(node, axis)
    return None if step is None else step.axis


def _through_mean(node: fx.Node, axis: int) -> int | None:
    rank = len(shape(node.all_input_nodes[0]))
    dims = {dim % rank for dim in argument(node, "dim") or range(rank)}
    if axis in dims:
        return None
    return axis if argument(node, "keepdim") else axis - sum(dim < axis for dim in dims)


def _channels(call: Call) -> int:
    return len(shape(call.node)) - 1 - (len(call.layer.kernel_size) if isinstance(call.layer, _ConvNd) else 0)


def _channels_read(call: Call) -> int:
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    return len(shape(source)) - 1 - (len(call.layer.kernel_size) if isinstance(call.layer, _ConvNd) else 0)
