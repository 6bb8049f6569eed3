"""Operators in the form that litert-torch converts exactly, or into fewer operators.

Its own forms of some are wrong or fail: nearest resizing by a factor that is not whole, bilinear resizing by a
factor that the sizes do not give, transposed convolution with output padding. Others become chains of gathers and
transpositions that two matrix products or a small convolution replace, and sorting alone has no operator.
Values stay what they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from edgepack.export._tflite_rows import rows as row_operator

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

NOT_NEGATIVE = ("relu", "relu_", "relu6", "relu6_", "sigmoid")
SHUFFLED = 16  # channels up to which a pixel shuffle is cheaper as a convolution with zeros and ones

WIDENED = 8192  # weights up to which a convolution is cheaper than a change of layout
PICKED = "picked"


def rewrite(module: GraphModule, keep_weights: bool = False) -> None:
    """Change the module in place.

    Args:
        keep_weights: prevent the converter from multiplying other constants into weights.
    """
    for node in list(module.graph.nodes):
        name = str(getattr(node.target, "overloadpacket", "")).removeprefix("aten.")
        rule = RULES.get(name)
        if rule is None:
            continue
        with module.graph.inserting_before(node):
            made = rule(module, node)
        if made is not None:
            made.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(made)
    if keep_weights:
        _fence(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def _fence(module: GraphModule) -> None:
    """The factors of a layer normalization stay out of the weights that follow it."""
    import torch

    barrier = torch.ops.litert_torch.optimization_barrier.default
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default):
        with module.graph.inserting_after(node):
            fence = module.graph.call_function(barrier, ([node, node],))  # one alone is not converted
        with module.graph.inserting_after(fence):
            made = module.graph.call_function(operator.getitem, (fence, 0))
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made, delete_user_cb=partial(operator.is_not, fence))


def _transposed(module: GraphModule, node: Any) -> Any:
    """Without padding, then cut to size: TFLite has no other padding than none and "same"."""
    import torch

    source, weight, bias, stride, padding, extra, groups, dilation = _arguments(node)
    kernel = weight.meta["val"].shape[2:]
    stride, padding, extra, dilation = (_each(value, len(kernel)) for value in (stride, padding, extra, dilation))
    same = all(
        p == 0 or 2 * p == d * (k - 1) + 1 - s for p, d, k, s in zip(padding, dilation, kernel, stride, strict=True)
    )
    if same and not any(extra):
        return None
    none = [0] * len(kernel)
    made = _call(module, node.target, source, weight, None, stride, none, none, groups, dilation)
    aten = torch.ops.aten
    beyond = [max(e - p, 0) for e, p in zip(extra, padding, strict=True)]
    if any(beyond):
        made = _call(module, aten.constant_pad_nd.default, made, [v for end in reversed(beyond) for v in (0, end)], 0.0)
    for axis, (start, size) in enumerate(zip(padding, node.meta["val"].shape[2:], strict=True), start=2):
        made = _call(module, aten.slice.Tensor, made, axis, start, start + size)
    if bias is None:
        return made
    tall = _call(module, aten.reshape.default, bias, [1, -1, *(1 for _ in kernel)])
    return _call(module, aten.add.Tensor, made, tall)


def _repeat(module: GraphModule, node: Any) -> Any:
    """Joined copies: the converter's change of layout does not turn the counts of ``repeat``."""
    import torch

    source, counts = node.args[:2]
    first = source.meta["val"].ndim - len(counts)
    made: Any = source
    if first < 0:  # a new axis
        return None
    for axis, times in enumerate(counts, start=first):
        if times != 1:
            made = _call(module, torch.ops.aten.cat.default, [made] * times, axis)
    return None if made is source else made


def _nearest(module: GraphModule, node: Any) -> Any:
    """Two gathers, unless every pixel is repeated a whole number of times."""
    import torch

    height, width = _sizes(node.args[0])
    rows, columns = _sizes(node)
    if rows % height == 0 and columns % width == 0:
        return None
    ramps = torch.arange(height).reshape(1, 1, -1, 1), torch.arange(width).reshape(1, 1, 1, -1)
    made: Any = node.args[0]
    for axis, ramp in zip((2, 3), ramps, strict=True):
        places = _apply(node, ramp.expand(1, 1, height, width).float())[0, 0].select(3 - axis, 0).long()
        made = _call(module, torch.ops.aten.index_select.default, made, axis, _constant(module, node, places))
    return made


def _bilinear(module: GraphModule, node: Any) -> Any:
    """Left to the converter unless the given factors are not what the sizes say."""
    factors, corners = node.args[3] if len(node.args) > 3 else None, node.args[2]
    exact = all(
        size * factor == made
        for size, factor, made in zip(_sizes(node.args[0]), factors or (), _sizes(node), strict=False)
    )
    return None if corners or exact else _separable(module, node)


def _separable(module: GraphModule, node: Any) -> Any:
    """Rows and columns are resized by one constant matrix each."""
    import torch

    height, width = _sizes(node.args[0])
    down = _apply(node, torch.eye(height).reshape(1, height, height, 1).expand(-1, -1, -1, width))[0, :, :, 0].T
    right = _apply(node, torch.eye(width).reshape(1, width, 1, width).expand(-1, -1, height, -1))[0, :, 0, :]
    matmul = torch.ops.aten.matmul.default
    made = _call(module, matmul, node.args[0], _constant(module, node, right.contiguous()))
    return _call(module, matmul, _constant(module, node, down.contiguous()), made)


def _shuffle(module: GraphModule, node: Any) -> Any:
    """A transposed convolution that puts every value into its place."""
    import torch

    source, factor = node.args[:2]
    weight = _places(node.meta["val"], factor)
    if weight is None:
        return None
    convolution = torch.ops.aten.conv_transpose2d.input
    step = [factor, factor]
    return _call(module, convolution, source, _constant(module, node, weight), None, step, [0, 0], [0, 0], 1, [1, 1])


def _unshuffle(module: GraphModule, node: Any) -> Any:
    import torch

    source, factor = node.args[:2]
    weight = _places(source.meta["val"], factor)
    if weight is None:
        return None
    return _call(module, torch.ops.aten.conv2d.default, source, _constant(module, node, weight), None, [factor, factor])


def _strided(module: GraphModule, node: Any) -> Any:
    """Every n-th row and column: a convolution of each channel with a single 1, which XNNPACK can do."""
    import torch

    here, behind = _step(node), [_step(user) for user in node.users]
    if here is None or (len(behind) == 1 and behind[0] is not None):  # that one takes both
        return None
    source, stride = node.args[0], {2: 1, 3: 1} | dict([here])
    before = _step(source)
    if before is not None and before[0] != here[0] and len(source.users) == 1:
        source, stride = source.args[0], stride | dict([before])
    channels = source.meta["val"].shape[1]
    weight = _constant(module, node, torch.ones(channels, 1, 1, 1))
    steps = [stride[2], stride[3]]
    made = _call(module, torch.ops.aten.conv2d.default, source, weight, None, steps, [0, 0], [1, 1], channels)
    made.meta[PICKED] = True
    return made


def _widened(module: GraphModule, node: Any) -> Any:
    """Channels of zeros around what was just picked: the convolution can make them, and stays in the layout it has."""
    import torch

    source, ends, *how = _arguments(node)
    if not source.meta.get(PICKED) or len(ends) != 6 or any(ends[:4]) or (how[0] != "constant" or how[1]):
        return None
    data, ones, _, stride = source.args[:4]
    channels = ones.meta["val"].shape[0]
    weight = torch.nn.functional.pad(torch.eye(channels), (0, 0, ends[4], ends[5])).reshape(-1, channels, 1, 1)
    if weight.numel() > WIDENED:
        return None
    return _call(module, torch.ops.aten.conv2d.default, data, _constant(module, node, weight), None, stride)


def _step(node: Any) -> tuple[int, int] | None:
    """Axis and step of a slice that takes every n-th row or column of all of them."""
    import torch

    if str(node.target) != "aten.slice.Tensor":
        return None
    source, axis, start, end, step = _arguments(node)
    value = source.meta["val"]
    if value.ndim != 4 or value.dtype != torch.float32 or step == 1 or axis % 4 not in (2, 3):
        return None
    whole = not start and (end is None or end >= value.shape[axis])
    return (axis % 4, step) if whole else None


def _pooled(module: GraphModule, node: Any) -> Any:
    """After a ReLU the padding may be zeros, which XNNPACK can do, instead of minus infinity."""
    import torch

    source, kernel, stride, padding, dilation, ceil_mode = _arguments(node)
    above, below = (*_each(padding, 2),)
    before = str(getattr(source.target, "overloadpacket", "")).removeprefix("aten.")
    if ceil_mode or not (above or below) or before not in NOT_NEGATIVE:
        return None
    made = _call(module, torch.ops.aten.constant_pad_nd.default, source, [below, below, above, above], 0.0)
    return _call(module, node.target, made, kernel, stride, [0, 0], dilation)


def _joined(module: GraphModule, node: Any) -> Any:
    """Every part in the dtype of the whole, which PyTorch sees to by itself."""
    import torch

    sources, axis = _arguments(node)
    dtype = node.meta["val"].dtype
    if all(source.meta["val"].dtype == dtype for source in sources):
        return None
    alike = [_call(module, torch.ops.aten._to_copy.default, source) for source in sources]
    for made, source in zip(alike, sources, strict=True):
        made.kwargs, made.meta["val"] = {"dtype": dtype}, source.meta["val"].to(dtype)
    return module.graph.call_function(node.target, (alike, axis))


def _averaged(module: GraphModule, node: Any) -> Any:
    """Over height and width with axes kept, then a reshape: the converter would put channels first for it."""
    import torch

    if str(node.target) != "aten.mean.dim":
        return None
    source, axes, kept, dtype = _arguments(node)
    if kept or dtype is not None or source.meta["val"].ndim != 4 or {axis % 4 for axis in axes or ()} != {2, 3}:
        return None
    made = _call(module, node.target, source, [2, 3], True)
    return _call(module, torch.ops.aten.reshape.default, made, list(node.meta["val"].shape))


def _ordered(module: GraphModule, node: Any) -> Any:
    """top-k, sort and argsort through the one form that has an operator: places of the largest, then their values."""
    import torch

    aten, values, name = torch.ops.aten, dict(_named(node)), str(node.target.overloadpacket)
    source, axis = values["self"], values["dim"]
    largest = values["largest"] if name == "aten.topk" else values["descending"]
    if name == "aten.topk" and largest and any(user.args[1] == 1 and user.users for user in node.users):
        return None
    count = values["k"] if name == "aten.topk" else source.meta["val"].shape[axis]
    asked = source if largest else _call(module, aten.neg.default, source)
    both = _call(module, aten.topk.default, asked, count, axis)
    places = module.graph.call_function(operator.getitem, (both, 1))
    places.meta["val"] = both.meta["val"][1]
    if name == "aten.argsort":
        return places
    sorted_values = _call(module, aten.gather.default, source, axis, places)
    for user in list(node.users):
        user.replace_all_uses_with(places if user.args[1] == 1 else sorted_values)
    return None


def _rows(module: GraphModule, node: Any) -> Any:
    """Whole rows of a single sample: one index for each, not one for every number in it."""
    import torch

    aten = torch.ops.aten
    source, axis, index = _arguments(node)[:3]
    shape, widened = source.meta["val"].shape, str(index.target) == "aten.expand.default"
    if len(shape) != 3 or shape[0] != 1 or axis != 1 or not widened or index.args[0].meta["val"].shape[2] != 1:
        return None
    rows = _call(module, aten.reshape.default, source, list(shape[1:]))
    places = _call(module, aten.reshape.default, index.args[0], [-1])
    made = _call(module, row_operator(), rows, places)
    return _call(module, aten.reshape.default, made, list(node.meta["val"].shape))


def _places(wide: torch.Tensor, factor: Any) -> torch.Tensor | None:
    """One 1 per channel of the narrow form: (channels · factor², channels, factor, factor)."""
    import torch

    channels = wide.shape[1] if wide.ndim == 4 else SHUFFLED + 1
    if channels > SHUFFLED:
        return None
    return torch.eye(channels * factor**2).reshape(-1, channels, factor, factor)


def _named(node: Any) -> Iterator[tuple[str, Any]]:
    """All arguments of an operator by name, in the order of its schema."""
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        yield argument.name, given


def _arguments(node: Any) -> list[Any]:
    return [value for _, value in _named(node)]


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def _sizes(node: Any) -> tuple[int, int]:
    height, width = node.meta["val"].shape[-2:]
    return height, width


def _apply(node: Any, value: torch.Tensor) -> torch.Tensor:
    """The node's operator, with its options, on a value of the same height and width."""
    made: torch.Tensor = node.target(value, *node.args[1:], **node.kwargs)
    return made


def _call(module: GraphModule, target: Any, *args: Any) -> Any:
    """A new operator, its result's shape worked out."""
    import torch

    made = module.graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda source: source.meta["val"])
    made.meta["val"] = target(*(_meta(value) for value in values))
    return made


def _meta(value: Any) -> Any:
    import torch

    return (
        torch.empty(tuple(value.shape), dtype=value.dtype, device="meta") if isinstance(value, torch.Tensor) else value
    )


def _constant(module: GraphModule, node: Any, value: torch.Tensor) -> Any:
    number = 0
    while hasattr(module, name := f"{node.name}_constant{number}"):
        number += 1
    module.register_buffer(name, value)
    made = module.graph.get_attr(name)
    made.meta["val"] = value
    return made


RULES: dict[str, Callable[[GraphModule, Any], Any]] = {
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "upsample_nearest2d": _nearest,
    "upsample_bilinear2d": _bilinear,
    "upsample_bicubic2d": _separable,
    "_upsample_bilinear2d_aa": _separable,
    "_upsample_bicubic2d_aa": _separable,
    "pixel_shuffle": _shuffle,
    "pixel_unshuffle": _unshuffle,
    "slice": _strided,
    "pad": _widened,
    "max_pool2d": _pooled,
    "mean": _averaged,
    "cat": _joined,
    "repeat": _repeat,
    "tile": _repeat,
    "topk": _ordered,
    "sort": _ordered,
    "argsort": _ordered,
    "gather": _rows,
}
