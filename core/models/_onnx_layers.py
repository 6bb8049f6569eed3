"""ONNX operators with weights, which become layers, and pooling and resizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgepack.models import _layers
from edgepack.models._onnx_scope import Node, Scope

aten = torch.ops.aten
AVERAGE = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
MAXIMUM = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
CONVS: dict[int, Any] = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def conv(scope: Scope, node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
    rank = scope.rank(x) - 2
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    kernel = scope.shape(weight)[2:]
    x, padding = _padded(scope, node, x, _pads(scope, node, x, kernel, strides, dilations), 0.0)
    groups = node.get("group", 1)
    if isinstance(weight, Tensor) and not isinstance(bias, fx.Node):
        return scope.layer(node.layer, _layers.conv(weight, bias, strides, padding, dilations, groups), x)
    return scope.call(CONVS[rank], x, weight, bias, strides, padding, dilations, groups)


def conv_transpose(scope: Scope, node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
    weight = scope.constant(weight, node)
    rank = weight.dim() - 2
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    output_padding = list(node.get("output_padding", [0] * rank))
    if node.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or node.get("output_shape"):
        raise node.unsupported("auto_pad or output_shape; export with explicit pads")
    pads = list(node.get("pads", [0] * rank * 2))
    begin, end = pads[:rank], pads[rank:]
    # Padding crops the output; what is cropped less at the end is extra output there.
    output_padding = [extra + a - b for extra, a, b in zip(output_padding, begin, end, strict=True)]
    if min(output_padding) < 0:
        raise node.unsupported(f"pads {pads}, with more at the end than at the beginning")
    module = _layers.conv_transpose(weight, bias, strides, begin, output_padding, node.get("group", 1), dilations)
    return scope.layer(node.layer, module, x)


def gemm(scope: Scope, node: Node, a: Any, b: Any, c: Any = None) -> Any:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if node.get("transA", 0):
        a = scope.call(aten.t.default, a)
    if not node.get("transB", 0):
        b = scope.call(aten.t.default, b)
    if isinstance(b, Tensor) and (c is None or (isinstance(c, Tensor) and c.numel() in (1, b.shape[0]))):
        bias = None if c is None else (c * beta).reshape(-1).expand(b.shape[0])
        return scope.layer(node.layer, _layers.linear(b * alpha, bias), a)
    product = scope.call(aten.mul.Tensor, scope.call(aten.linear.default, a, b), alpha)
    return product if c is None else scope.call(aten.add.Tensor, product, c, alpha=beta)


def matmul(scope: Scope, node: Node, a: Any, b: Any) -> Any:
    if isinstance(b, Tensor) and b.dim() == 2 and isinstance(a, fx.Node):
        bias = node.get("fused_bias")
        return scope.layer(node.layer, _layers.linear(b.t(), bias), a)
    return scope.call(aten.matmul.default, scope.tensor(a), scope.tensor(b))


def batch_norm(scope: Scope, node: Node, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
    if node.get("training_mode", 0):
        raise node.unsupported("training mode; export the model after model.eval()")
    weight, bias, mean, variance = (scope.constant(value, node) for value in (scale, bias, mean, variance))
    module = _layers.batch_norm(scope.rank(x), weight, bias, mean, variance, node.get("epsilon", 1e-5))
    return scope.layer(node.layer, module, x)


def instance_norm(scope: Scope, node: Node, x: Any, scale: Any, bias: Any) -> Any:
    scale, bias = scope.constant(scale, node), scope.constant(bias, node)
    return scope.layer(node.layer, _layers.instance_norm(scope.rank(x), scale, bias, node.get("epsilon", 1e-5)), x)


def group_norm(scope: Scope, node: Node, x: Any, scale: Any, bias: Any) -> Any:
    if node.opset < 21:
        raise node.unsupported("opset 18 scales whole groups; export with opset 21 or later")
    scale, bias = scope.constant(scale, node), scope.constant(bias, node)
    return scope.layer(
        node.layer, _layers.group_norm(node.get("num_groups"), scale, bias, node.get("epsilon", 1e-5)), x
    )


def layer_norm(scope: Scope, node: Node, x: Any, scale: Any, bias: Any = None) -> Any:
    axis, rank = node.get("axis", -1), scope.rank(x)
    shape = scope.shape(x)[axis % rank :]
    if isinstance(scale, Tensor) and list(scale.shape) == shape and not isinstance(bias, fx.Node):
        return scope.layer(node.layer, _layers.layer_norm(shape, scale, bias, node.get("epsilon", 1e-5)), x)
    return scope.call(aten.layer_norm.default, x, shape, scale, bias, node.get("epsilon", 1e-5))


def prelu(scope: Scope, node: Node, x: Any, slope: Any) -> Any:
    rank = scope.rank(x)
    if isinstance(slope, Tensor):
        full = [1] * (rank - slope.dim()) + list(slope.shape)
        if all(size == 1 for axis, size in enumerate(full) if axis != 1):
            return scope.layer(node.layer, _layers.prelu(slope), x)
    positive = scope.call(aten.gt.Scalar, x, 0)
    return scope.call(aten.where.self, positive, x, scope.call(aten.mul.Tensor, x, slope))


def max_pool(scope: Scope, node: Node, x: Any) -> Any:
    kernel, strides, dilations = _window(node)
    x, padding = _padded(scope, node, x, _pads(scope, node, x, kernel, strides, dilations), float("-inf"), kernel)
    if node.outputs > 1:
        raise node.unsupported("its second output, the indices")
    return scope.call(MAXIMUM[len(kernel)], x, kernel, strides, padding, dilations, bool(node.get("ceil_mode", 0)))


def average_pool(scope: Scope, node: Node, x: Any) -> Any:
    kernel, strides, dilations = _window(node)
    if any(item != 1 for item in dilations):
        raise node.unsupported("dilations")
    ceil, counted = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    pads = _pads(scope, node, x, kernel, strides, dilations)
    pool = AVERAGE[len(kernel)]
    padded, padding = _padded(scope, node, x, pads, 0.0, kernel)
    if padded is x or counted:
        return scope.call(pool, padded, kernel, strides, padding, ceil, counted)
    # Uneven padding that does not count: divide by the share of each window that lies inside.
    ones = scope.call(aten.ones_like.default, x)
    inside, _ = _padded(scope, node, ones, pads, 0.0, kernel)
    sums, shares = (scope.call(pool, item, kernel, strides, padding, ceil, True) for item in (padded, inside))
    return scope.call(aten.div.Tensor, sums, shares)


def global_pool(function: Any) -> Callable[..., Any]:
    def rule(scope: Scope, node: Node, x: Any) -> Any:
        return scope.call(function, x, list(range(2, scope.rank(x))), True)

    return rule


def resize(scope: Scope, node: Node, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    mode = node.get("mode", b"nearest").decode()
    if node.operator == "Upsample":
        roi, scales, sizes = None, roi, None
    rank = scope.rank(x) - 2
    if node.get("axes") is not None or node.get("antialias", 0) or rank not in (1, 2, 3):
        raise node.unsupported("axes, antialias or more than three spatial axes")
    output, factors = None, None
    if sizes is not None:
        output = scope.sizes(sizes, node)[2:]
    else:
        factors = [float(item) for item in scope.constant(scales, node).tolist()]
        if factors[:2] != [1.0, 1.0]:
            raise node.unsupported("scaling of batch or channels")
        factors = factors[2:]
    return _resize(scope, node, x, mode, output, factors)


def _resize(scope: Scope, node: Node, x: Any, mode: str, output: Any, factors: Any) -> Any:
    place = node.get("coordinate_transformation_mode", b"half_pixel" if node.opset >= 11 else b"asymmetric").decode()
    rank = scope.rank(x) - 2
    if mode == "nearest":
        whole = factors is not None and all(item == int(item) for item in factors)
        floor = node.get("nearest_mode", b"round_prefer_floor") == b"floor" and place == "asymmetric"
        if not (floor or node.operator == "Upsample" or (whole and place in ("half_pixel", "asymmetric"))):
            raise node.unsupported(f"nearest neighbours with {place} coordinates and a fractional scale")
        if whole and place == "asymmetric" and not floor and node.operator == "Resize":
            raise node.unsupported("nearest neighbours with asymmetric coordinates that are not rounded down")
        return scope.call(getattr(aten, f"upsample_nearest{rank}d").vec, x, output, factors)
    corners = place == "align_corners"
    if place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise node.unsupported(f"{mode} interpolation with {place} coordinates")
    if mode == "cubic" and (rank != 2 or abs(node.get("cubic_coeff_a", -0.75) + 0.75) > 1e-6):
        raise node.unsupported("cubic interpolation other than two-dimensional with coefficient -0.75")
    names = {1: "upsample_linear1d", 2: "upsample_bilinear2d", 3: "upsample_trilinear3d"}
    name = "upsample_bicubic2d" if mode == "cubic" else names[rank]
    return scope.call(getattr(aten, name).vec, x, output, corners, factors)


def lstm(
    scope: Scope,
    node: Node,
    x: Any,
    weight: Any,
    recurrent: Any,
    bias: Any = None,
    lengths: Any = None,
    hidden: Any = None,
    cell: Any = None,
    peephole: Any = None,
) -> Any:
    plain = {"clip", "activations", "activation_alpha", "activation_beta", "input_forget", "layout"}
    if lengths is not None or peephole is not None or plain & set(node.attributes):
        raise node.unsupported("sequence lengths, peepholes, layout or other activations")
    direction = node.get("direction", b"forward")
    if direction == b"reverse":
        raise node.unsupported("the reverse direction alone")
    count, width = (2 if direction == b"bidirectional" else 1), node.get("hidden_size")
    parameters = _recurrent(scope, node, (weight, recurrent, bias), width)
    batch = scope.shape(x)[1]
    zeros = [count, batch, width]
    states = [scope.call(aten.full.default, zeros, 0.0) if state is None else state for state in (hidden, cell)]
    result = scope.call(aten.lstm.input, x, states, parameters, bias is not None, 1, 0.0, False, count == 2, False)
    y = scope.call(aten.unflatten.int, scope.item(result, 0), 2, [count, width])
    return scope.call(aten.permute.default, y, [0, 2, 1, 3]), scope.item(result, 1), scope.item(result, 2)


def _recurrent(scope: Scope, node: Node, tensors: Sequence[Any], width: int) -> list[Tensor]:
    """Gates reordered from ONNX's input, output, forget, cell to PyTorch's input, forget, cell, output."""
    weight, recurrent, bias = (None if value is None else scope.constant(value, node) for value in tensors)
    assert weight is not None
    assert recurrent is not None
    parameters = []
    for index in range(weight.shape[0]):
        own = [weight[index], recurrent[index]]
        if bias is not None:
            own += list(bias[index].chunk(2))
        for value in own:
            i, o, f, c = torch.split(value, width)
            parameters.append(torch.cat([i, f, c, o]))
    return parameters


def _window(node: Node) -> tuple[list[int], list[int], list[int]]:
    kernel = list(node.get("kernel_shape"))
    ones = [1] * len(kernel)
    return kernel, list(node.get("strides", ones)), list(node.get("dilations", ones))


def _pads(scope: Scope, node: Node, x: Any, kernel: Any, strides: Any, dilations: Any) -> list[int]:
    """Padding as ONNX writes it: all beginnings, then all ends."""
    rank = len(kernel)
    automatic = node.get("auto_pad", b"NOTSET")
    if automatic in (b"NOTSET", b"VALID"):
        return list(node.get("pads", [0] * rank * 2))
    begin, end = [], []
    for size, k, s, d in zip(scope.shape(x)[2:], kernel, strides, dilations, strict=True):
        if isinstance(size, fx.Node) and s > 1:
            raise node.unsupported("auto_pad over a dynamic size; export with explicit pads")
        total = d * (k - 1) if s == 1 else max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begin.append(small if automatic == b"SAME_UPPER" else large)
        end.append(large if automatic == b"SAME_UPPER" else small)
    return begin + end


def _padded(
    scope: Scope, node: Node, x: Any, pads: list[int], value: float, kernel: Sequence[int] | None = None
) -> tuple[Any, list[int]]:
    """Leave even padding to the operator, put uneven padding (or more than half a window) into the graph."""
    rank = len(pads) // 2
    begin, end = pads[:rank], pads[rank:]
    fits = kernel is None or all(2 * pad <= size for pad, size in zip(begin, kernel, strict=True))
    if begin == end and fits:
        return x, begin
    pairs = [amount for axis in reversed(range(rank)) for amount in (begin[axis], end[axis])]
    return scope.call(aten.constant_pad_nd.default, x, pairs, value), [0] * rank


RULES: dict[str, Callable[..., Any]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "PRelu": prelu,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_pool(aten.mean.dim),
    "GlobalMaxPool": global_pool(aten.amax.default),
    "Resize": resize,
    "Upsample": resize,
    "LSTM": lstm,
}
