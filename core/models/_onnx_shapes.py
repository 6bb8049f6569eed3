"""ONNX operators that only move, select or describe data."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from edgepack.models._onnx_scope import Node, Scope, Sizes, vector

aten = torch.ops.aten
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}
END = 2**31 - 1


def identity(scope: Scope, node: Node, x: Any, *_: Any) -> Any:
    return x


def constant(scope: Scope, node: Node) -> Any:
    for key in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if key in node.attributes:
            value = node.attributes[key]
            dtype = torch.float32 if "float" in key else torch.int64
            return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
    raise node.unsupported("a constant that is no tensor")


def shape(scope: Scope, node: Node, x: Any) -> Any:
    sizes = scope.shape(scope.tensor(x))
    return vector(sizes[slice(node.get("start", 0), node.get("end"))])


def size(scope: Scope, node: Node, x: Any) -> Any:
    count: Any = 1
    for item in scope.shape(scope.tensor(x)):
        count = scope.call(operator.mul, count, item)
    return vector([count], scalar=True)


def cast(scope: Scope, node: Node, x: Any) -> Any:
    dtype = DTYPES.get(node.get("to"))
    if dtype is None:
        raise node.unsupported(f"a cast to element type {node.get('to')}")
    if isinstance(x, Sizes) and dtype in (torch.int64, torch.int32):
        return x
    x = scope.tensor(x)
    return x if scope.dtype(x) == dtype else scope.call(aten.to.dtype, x, dtype)


def cast_like(scope: Scope, node: Node, x: Any, other: Any) -> Any:
    return scope.call(aten.to.dtype, scope.tensor(x), scope.dtype(scope.tensor(other)))


def reshape(scope: Scope, node: Node, x: Any, target: Any) -> Any:
    wanted = scope.sizes(target, node)
    if isinstance(x, Sizes):
        return vector(x.items, scalar=not wanted)
    if not node.get("allowzero", 0) and 0 in wanted:
        own = scope.shape(x)
        wanted = [own[axis] if _is(item, 0) else item for axis, item in enumerate(wanted)]
    return scope.call(aten.reshape.default, x, _one_unknown(wanted))


def _is(item: Any, number: int) -> bool:
    return not isinstance(item, fx.Node) and item == number


def _one_unknown(sizes: list[Any]) -> list[Any]:
    """With a single dynamic size, -1 says the same and needs no node."""
    dynamic = [axis for axis, item in enumerate(sizes) if isinstance(item, fx.Node)]
    if len(dynamic) == 1 and -1 not in sizes and 0 not in sizes:
        return [-1 if axis == dynamic[0] else item for axis, item in enumerate(sizes)]
    return sizes


def flatten(scope: Scope, node: Node, x: Any) -> Any:
    rank = scope.rank(x)
    axis = node.get("axis", 1)
    axis = axis + rank if axis < 0 else axis
    if axis == 0:
        return scope.call(aten.reshape.default, x, [1, -1])
    if axis == rank:
        return scope.call(aten.reshape.default, x, [-1, 1])
    if axis < rank - 1:
        x = scope.call(aten.flatten.using_ints, x, axis, -1)
    return scope.call(aten.flatten.using_ints, x, 0, axis - 1) if axis > 1 else x


def transpose(scope: Scope, node: Node, x: Any) -> Any:
    order = node.get("perm") or list(range(scope.rank(x)))[::-1]
    return scope.call(aten.permute.default, x, list(order))


def squeeze(scope: Scope, node: Node, x: Any, axes: Any = None) -> Any:
    if isinstance(x, Sizes):
        return Sizes(x.items, scalar=True)
    chosen = node.get("axes") if axes is None else scope.ints(axes, node)
    if chosen is None:
        chosen = [axis for axis, item in enumerate(scope.shape(x)) if _is(item, 1)]
    return scope.call(aten.squeeze.dims, x, list(chosen))


def unsqueeze(scope: Scope, node: Node, x: Any, axes: Any = None) -> Any:
    if isinstance(x, Sizes):
        return Sizes(x.items)
    chosen = node.get("axes") if axes is None else scope.ints(axes, node)
    rank = scope.rank(x) + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = scope.call(aten.unsqueeze.default, x, axis)
    return x


def concat(scope: Scope, node: Node, *values: Any) -> Any:
    if any(isinstance(value, Sizes) for value in values):
        return vector([item for value in values for item in scope.sizes(value, node)])
    return scope.call(aten.cat.default, list(values), node.get("axis"))


def split(scope: Scope, node: Node, x: Any, sizes: Any = None) -> Any:
    axis = node.get("axis", 0)
    wanted = node.get("split") if sizes is None else scope.sizes(sizes, node)
    if wanted is None:
        result = scope.call(aten.chunk.default, x, node.get("num_outputs", node.outputs), axis)
    else:
        result = scope.call(aten.split_with_sizes.default, x, list(wanted), axis)
    return tuple(scope.item(result, index) for index in range(node.outputs))


def slice_(scope: Scope, node: Node, x: Any, *bounds: Any) -> Any:
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = ([*bounds, *[None] * 4])[:4] if bounds else [node.get(name) for name in names]
    first, last = scope.sizes(starts, node), scope.sizes(ends, node)
    chosen = list(range(len(first))) if axes is None else scope.ints(axes, node)
    jumps = [1] * len(first) if steps is None else scope.ints(steps, node)
    if isinstance(x, Sizes):
        return vector(x.items[slice(first[0], last[0], jumps[0])])
    for axis, start, end, step in zip(chosen, first, last, jumps, strict=True):
        if step < 0:
            if step != -1 or (start != -1 and start < END) or end > -END:
                raise node.unsupported("a negative step that does not reverse the whole axis")
            x = scope.call(aten.flip.default, x, [axis])
        else:
            x = scope.call(aten.slice.Tensor, x, axis, start, end, step)
    return x


def gather(scope: Scope, node: Node, x: Any, indices: Any) -> Any:
    axis = node.get("axis", 0)
    if isinstance(x, Sizes):
        chosen = scope.constant(indices, node)
        return vector([x.items[index] for index in chosen.reshape(-1).tolist()], scalar=chosen.dim() == 0)
    indices = scope.tensor(indices)
    if isinstance(indices, Tensor) and indices.dim() == 0:
        return scope.call(aten.select.int, x, axis, int(indices))
    axis = axis % scope.rank(x)
    if isinstance(indices, Tensor):
        length = scope.shape(x)[axis]
        if not isinstance(length, fx.Node):
            indices = indices % length
    return scope.call(aten.index.Tensor, x, [None] * axis + [indices])


def gather_elements(scope: Scope, node: Node, x: Any, indices: Any) -> Any:
    return scope.call(aten.gather.default, x, node.get("axis", 0), indices)


def expand(scope: Scope, node: Node, x: Any, target: Any) -> Any:
    wanted, own = scope.sizes(target, node), scope.shape(x)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    own = [1] * (len(wanted) - len(own)) + own
    return scope.call(aten.expand.default, x, [a if _is(b, 1) else b for a, b in zip(own, wanted, strict=True)])


def tile(scope: Scope, node: Node, x: Any, repeats: Any) -> Any:
    return scope.call(aten.repeat.default, x, scope.sizes(repeats, node))


def constant_of_shape(scope: Scope, node: Node, target: Any) -> Any:
    value = node.get("value")
    filling = torch.zeros(1) if value is None else value
    return scope.call(aten.full.default, scope.sizes(target, node), filling.item(), dtype=filling.dtype)


def range_(scope: Scope, node: Node, start: Any, limit: Any, delta: Any) -> Any:
    bounds = []
    for value in (start, limit, delta):
        bounds.append(value.items[0] if isinstance(value, Sizes) else scope.constant(value, node).item())
    return scope.call(aten.arange.start_step, *bounds)


def pad(scope: Scope, node: Node, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    mode = node.get("mode", b"constant").decode()
    amounts = node.get("pads") if pads is None else scope.sizes(pads, node)
    rank = scope.rank(x)
    chosen = range(rank) if axes is None else scope.ints(axes, node)
    before: dict[int, Any] = {}
    after: dict[int, Any] = {}
    for index, axis in enumerate(chosen):
        before[axis % rank], after[axis % rank] = amounts[index], amounts[index + len(amounts) // 2]
    pairs = [amount for axis in reversed(range(rank)) for amount in (before.get(axis, 0), after.get(axis, 0))]
    while len(pairs) > 2 and _is(pairs[-1], 0) and _is(pairs[-2], 0):
        del pairs[-2:]
    if mode == "constant":
        filling = node.get("value", 0.0) if value is None else scope.constant(value, node).item()
        return scope.call(aten.constant_pad_nd.default, x, pairs, filling)
    modes = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    return scope.call(aten.pad.default, x, pairs, modes[mode])


def depth_to_space(scope: Scope, node: Node, x: Any) -> Any:
    block = node.get("blocksize")
    if node.get("mode", b"DCR") == b"CRD":
        return scope.call(aten.pixel_shuffle.default, x, block)
    n, c, h, w = scope.shape(x)
    x = scope.call(aten.reshape.default, x, [n, block, block, c // block**2, h, w])
    x = scope.call(aten.permute.default, x, [0, 3, 4, 1, 5, 2])
    height, width = (scope.call(operator.mul, item, block) for item in (h, w))
    return scope.call(aten.reshape.default, x, [n, c // block**2, height, width])


def space_to_depth(scope: Scope, node: Node, x: Any) -> Any:
    block = node.get("blocksize")
    n, c, _, _ = scope.shape(x)
    x = scope.call(aten.pixel_unshuffle.default, x, block)
    h, w = scope.shape(x)[2:]
    x = scope.call(aten.reshape.default, x, [n, c, block * block, h, w])
    return scope.call(aten.flatten.using_ints, scope.call(aten.transpose.int, x, 1, 2), 1, 2)


RULES: dict[str, Callable[..., Any]] = {
    "Identity": identity,
    "Dropout": identity,
    "Constant": constant,
    "Shape": shape,
    "Size": size,
    "Cast": cast,
    "CastLike": cast_like,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "GatherElements": gather_elements,
    "Expand": expand,
    "Tile": tile,
    "ConstantOfShape": constant_of_shape,
    "Range": range_,
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
