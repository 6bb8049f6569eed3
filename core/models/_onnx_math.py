"""ONNX operators that compute element by element, reduce, or multiply matrices."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from edgepack.models._onnx_scope import Node, Scope, Sizes, vector

aten = torch.ops.aten
Rule = Callable[..., Any]


def unary(function: Any) -> Rule:
    def rule(scope: Scope, node: Node, x: Any) -> Any:
        return scope.call(function, scope.tensor(x))

    return rule


def binary(function: Any, on_sizes: Callable[[Any, Any], Any] | None = None) -> Rule:
    """Numpy-style broadcasting; on sizes, item by item."""

    def rule(scope: Scope, node: Node, x: Any, y: Any) -> Any:
        if isinstance(x, Sizes) or isinstance(y, Sizes):
            if on_sizes is not None and _integral(scope, x) and _integral(scope, y):
                return _item_by_item(scope, node, on_sizes, x, y)
            x, y = scope.tensor(x), scope.tensor(y)
        x, y = _plain_scalars(scope, x, y)
        plain = isinstance(y, (int, float))
        return scope.call(WITH_NUMBER.get(function, function) if plain else function, x, y)

    return rule


def _integral(scope: Scope, value: Any) -> bool:
    return isinstance(value, Sizes) or (isinstance(value, Tensor) and not value.is_floating_point() and value.dim() < 2)


def _item_by_item(scope: Scope, node: Node, function: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    left, right = scope.sizes(x, node), scope.sizes(y, node)
    count = max(len(left), len(right))
    pairs = zip(left * count if len(left) == 1 else left, right * count if len(right) == 1 else right, strict=True)
    scalar = all(value.scalar if isinstance(value, Sizes) else value.dim() == 0 for value in (x, y))
    return vector([scope.call(function, a, b) for a, b in pairs], scalar)


def _plain_scalars(scope: Scope, x: Any, y: Any) -> tuple[Any, Any]:
    """A constant of one element as a Python number, which every exporter and pass understands."""
    if isinstance(y, Tensor) and isinstance(x, fx.Node) and y.numel() == 1 and y.dim() <= scope.rank(x):
        return x, y.item()
    return x, y


def divide(scope: Scope, node: Node, x: Any, y: Any) -> Any:
    if isinstance(x, Sizes) or isinstance(y, Sizes):
        return binary(None, operator.floordiv)(scope, node, x, y)
    if scope.dtype(x).is_floating_point:
        return scope.call(aten.div.Tensor, *_plain_scalars(scope, x, y))
    return scope.call(aten.div.Tensor_mode, x, y, rounding_mode="trunc")


def power(scope: Scope, node: Node, x: Any, y: Any) -> Any:
    x, y = scope.tensor(x), scope.tensor(y)
    if isinstance(y, Tensor) and y.numel() == 1:
        exponent = y.item()
        exponent = int(exponent) if exponent == int(exponent) else exponent
        return scope.call(aten.pow.Tensor_Scalar, x, exponent)
    return scope.call(aten.pow.Tensor_Tensor, x, y)


def equal(scope: Scope, node: Node, x: Any, y: Any) -> Any:
    if not (isinstance(x, Sizes) or isinstance(y, Sizes)):
        return binary(aten.eq.Tensor)(scope, node, x, y)
    results = []
    for a, b in zip(scope.sizes(x, node), scope.sizes(y, node), strict=True):
        known = [item for item in (a, b) if not isinstance(item, fx.Node)]
        if len(known) == 1 and known[0] > 0:
            raise node.unsupported("a comparison depends on a dynamic size")
        # A size is never negative or zero, and exporters compare with -1 only.
        results.append(a == b if len(known) == 2 else a is b)
    return torch.tensor(results)


# These take a number only in another form of theirs.
WITH_NUMBER = {
    aten.gt.Tensor: aten.gt.Scalar,
    aten.ge.Tensor: aten.ge.Scalar,
    aten.lt.Tensor: aten.lt.Scalar,
    aten.le.Tensor: aten.le.Scalar,
    aten.eq.Tensor: aten.eq.Scalar,
    aten.remainder.Tensor: aten.remainder.Scalar,
}


def minmax(function: Any, on_sizes: Any) -> Rule:
    def rule(scope: Scope, node: Node, *values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            if isinstance(result, Sizes) or isinstance(value, Sizes):
                result = binary(None, on_sizes)(scope, node, result, value)
            else:
                result = scope.call(function, result, value)
        return result

    return rule


def variadic_sum(scope: Scope, node: Node, *values: Any) -> Any:
    result = values[0]
    for value in values[1:]:
        result = scope.call(aten.add.Tensor, result, value)
    return scope.call(aten.div.Tensor, result, len(values)) if node.operator == "Mean" else result


def where(scope: Scope, node: Node, condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, Tensor) and (isinstance(x, Sizes) or isinstance(y, Sizes)):
        flags, left, right = condition.reshape(-1).tolist(), scope.sizes(x, node), scope.sizes(y, node)
        count = max(len(flags), len(left), len(right))
        flags, left, right = (items * count if len(items) == 1 else items for items in (flags, left, right))
        return vector([a if flag else b for flag, a, b in zip(flags, left, right, strict=True)], condition.dim() == 0)
    return scope.call(aten.where.self, condition, scope.tensor(x), scope.tensor(y))


def leaky_relu(scope: Scope, node: Node, x: Any) -> Any:
    return scope.call(aten.leaky_relu.default, x, node.get("alpha", 0.01))


def elu(scope: Scope, node: Node, x: Any) -> Any:
    return scope.call(aten.elu.default, x, node.get("alpha", 1.0))


def hard_sigmoid(scope: Scope, node: Node, x: Any) -> Any:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return scope.call(aten.hardsigmoid.default, x)
    scaled = scope.call(aten.add.Tensor, scope.call(aten.mul.Tensor, x, alpha), beta)
    return scope.call(aten.hardtanh.default, scaled, 0.0, 1.0)


def gelu(scope: Scope, node: Node, x: Any) -> Any:
    return scope.call(aten.gelu.default, x, approximate=_text(node.get("approximate", "none")))


def clip(scope: Scope, node: Node, x: Any, low: Any = None, high: Any = None) -> Any:
    if node.opset < 11:
        low, high = node.get("min"), node.get("max")
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        return scope.call(aten.clamp.Tensor, x, low, high)
    low, high = (bound.item() if isinstance(bound, Tensor) else bound for bound in (low, high))
    if low is not None and high is not None and low < high and scope.dtype(x).is_floating_point:
        return scope.call(aten.hardtanh.default, x, low, high)
    return scope.call(aten.clamp.default, x, low, high)


def softmax(function: Any) -> Rule:
    def rule(scope: Scope, node: Node, x: Any) -> Any:
        rank = scope.rank(x)
        axis = node.get("axis", -1 if node.opset >= 13 else 1)
        if node.opset < 13 and axis % rank != rank - 1:
            raise node.unsupported(
                f"opset {node.opset} flattens the axes after axis {axis}; export with opset 13 or later"
            )
        return scope.call(function, x, axis)

    return rule


def reduce(function: Any) -> Rule:
    def rule(scope: Scope, node: Node, x: Any, axes: Any = None) -> Any:
        if isinstance(x, Sizes):
            return _reduce_sizes(scope, node, x)
        chosen = node.get("axes") if axes is None else scope.ints(axes, node)
        if not chosen and node.get("noop_with_empty_axes", 0):
            return x
        chosen = list(chosen or range(scope.rank(x)))
        return _reduce(scope, function, x, chosen, bool(node.get("keepdims", 1)))

    return rule


def _reduce(scope: Scope, function: Any, x: Any, axes: list[int], keep: bool) -> Any:
    if function is aten.prod.dim_int:
        for axis in sorted((axis % scope.rank(x) for axis in axes), reverse=True):
            x = scope.call(function, x, axis, keep)
        return x
    if function is aten.linalg_vector_norm.default:
        return scope.call(function, x, 2, axes, keep)
    return scope.call(function, x, axes, keep)


def _reduce_sizes(scope: Scope, node: Node, x: Sizes) -> Any:
    functions: dict[str, Callable[[Any, Any], Any]] = {"ReduceProd": operator.mul, "ReduceSum": operator.add}
    if node.operator not in functions:
        raise node.unsupported("it works on dynamic sizes")
    result = x.items[0]
    for item in x.items[1:]:
        result = scope.call(functions[node.operator], result, item)
    return vector([result], scalar=not node.get("keepdims", 1))


def arg_extreme(function: Any) -> Rule:
    def rule(scope: Scope, node: Node, x: Any) -> Any:
        if node.get("select_last_index", 0):
            raise node.unsupported("select_last_index")
        return scope.call(function, x, node.get("axis", 0), bool(node.get("keepdims", 1)))

    return rule


def top_k(scope: Scope, node: Node, x: Any, k: Any) -> Any:
    (count,) = scope.sizes(k, node)
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    result = scope.call(aten.topk.default, x, count, node.get("axis", -1), largest, ordered)
    return scope.item(result, 0), scope.item(result, 1)


def cumulative_sum(scope: Scope, node: Node, x: Any, axis: Any) -> Any:
    if node.get("exclusive", 0) or node.get("reverse", 0):
        raise node.unsupported("exclusive or reverse")
    return scope.call(aten.cumsum.default, x, scope.ints(axis, node)[0])


def einsum(scope: Scope, node: Node, *values: Any) -> Any:
    return scope.call(aten.einsum.default, _text(node.get("equation")), list(values))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


RULES: dict[str, Rule] = {
    **{
        name: unary(function)
        for name, function in {
            "Relu": aten.relu.default,
            "Sigmoid": aten.sigmoid.default,
            "Tanh": aten.tanh.default,
            "Sqrt": aten.sqrt.default,
            "Exp": aten.exp.default,
            "Log": aten.log.default,
            "Erf": aten.erf.default,
            "Abs": aten.abs.default,
            "Neg": aten.neg.default,
            "Floor": aten.floor.default,
            "Ceil": aten.ceil.default,
            "Round": aten.round.default,
            "Sign": aten.sign.default,
            "Sin": aten.sin.default,
            "Cos": aten.cos.default,
            "Reciprocal": aten.reciprocal.default,
            "Softplus": aten.softplus.default,
            "HardSwish": aten.hardswish.default,
            "Mish": aten.mish.default,
            "Not": aten.logical_not.default,
            "IsNaN": aten.isnan.default,
        }.items()
    },
    "Add": binary(aten.add.Tensor, operator.add),
    "Sub": binary(aten.sub.Tensor, operator.sub),
    "Mul": binary(aten.mul.Tensor, operator.mul),
    "Mod": binary(aten.remainder.Tensor, operator.mod),
    "Div": divide,
    "Pow": power,
    "Equal": equal,
    "Greater": binary(aten.gt.Tensor),
    "GreaterOrEqual": binary(aten.ge.Tensor),
    "Less": binary(aten.lt.Tensor),
    "LessOrEqual": binary(aten.le.Tensor),
    "And": minmax(aten.logical_and.default, None),
    "Or": minmax(aten.logical_or.default, None),
    "Min": minmax(aten.minimum.default, torch.sym_min),
    "Max": minmax(aten.maximum.default, torch.sym_max),
    "Sum": variadic_sum,
    "Mean": variadic_sum,
    "Where": where,
    "LeakyRelu": leaky_relu,
    "Elu": elu,
    "HardSigmoid": hard_sigmoid,
    "Gelu": gelu,
    "Clip": clip,
    "Softmax": softmax(aten.softmax.int),
    "LogSoftmax": softmax(aten.log_softmax.int),
    "ReduceMean": reduce(aten.mean.dim),
    "ReduceSum": reduce(aten.sum.dim_IntList),
    "ReduceMax": reduce(aten.amax.default),
    "ReduceMin": reduce(aten.amin.default),
    "ReduceProd": reduce(aten.prod.dim_int),
    "ReduceL2": reduce(aten.linalg_vector_norm.default),
    "ArgMax": arg_extreme(aten.argmax.default),
    "ArgMin": arg_extreme(aten.argmin.default),
    "TopK": top_k,
    "CumSum": cumulative_sum,
    "Einsum": einsum,
}
