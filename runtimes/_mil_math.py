"""MIL operators that work element by element, and reductions.

Parameters are named as in coremltools' MIL reference; scalars arrive as Python numbers, everything else as tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Number = float | int | bool
DTYPES = {"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool, "int32": torch.int32}
NARROW = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}


def tensor(value: Tensor | Number) -> Tensor:
    """A scalar constant as a tensor of the dtype the operator sees."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int32 if type(value) is int else None)


def ints(value: Tensor | Number) -> list[int]:
    return [int(item) for item in tensor(value).reshape(-1).tolist()]


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: function(tensor(x), tensor(y))


def unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(tensor(x))


def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Integers divide toward zero, as in the language MIL is compiled to."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def cast(x: Tensor | Number, dtype: str) -> Tensor:
    """To another type. Narrow integers are held in 32 bits, with their own wrap-around."""
    x = tensor(x)
    if dtype in DTYPES:
        return x.to(DTYPES[dtype])
    whole = x.to(torch.int32)
    return whole & 0xFFFF if dtype == "uint16" else whole.to(NARROW[dtype]).to(torch.int32)


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def per_channel(x: Tensor, values: Tensor) -> Tensor:
    """One value per channel (axis 1), broadcast over the rest."""
    return values.reshape([-1 if axis == 1 else 1 for axis in range(x.ndim)])


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * per_channel(x, alpha))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return per_channel(x, alpha) * F.softplus(per_channel(x, beta) * x)


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(tensor(cond), tensor(a), tensor(b))


def reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: bool = False) -> Tensor:
        dims = list(range(x.ndim)) if axes is None else ints(axes)
        return function(x, dims, bool(keep_dims)).to(x.dtype)

    return reduce


def product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((dim % x.ndim for dim in dims), reverse=True):
        x = torch.prod(x, dim, keepdim=keep)
    return x


def position(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
        return cast(function(x, axis, keepdim=bool(keep_dims)), output_dtype)

    return reduce


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    total = torch.cumsum(x, axis).to(x.dtype)
    total = total - x if exclusive else total
    return total.flip(axis) if reverse else total


UNARY = {
    name: unary(getattr(torch, name))
    for name in [
        "abs",
        "acos",
        "asin",
        "atan",
        "atanh",
        "ceil",
        "cos",
        "cosh",
        "erf",
        "exp",
        "exp2",
        "floor",
        "logical_not",
        "relu",
        "round",
        "sigmoid",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "tan",
        "tanh",
    ]
}
BINARY = {
    name: binary(getattr(torch, word))
    for name, word in {
        "add": "add", "sub": "sub", "mul": "mul", "pow": "pow", "maximum": "maximum", "minimum": "minimum",
        "floor_div": "floor_divide", "mod": "remainder", "equal": "eq", "not_equal": "ne", "greater": "gt",
        "greater_equal": "ge", "less": "lt", "less_equal": "le", "logical_and": "logical_and",
        "logical_or": "logical_or", "logical_xor": "logical_xor",
    }.items()
}  # fmt: skip
REDUCTIONS = {
    "reduce_mean": reduction(torch.mean),
    "reduce_sum": reduction(torch.sum),
    "reduce_max": reduction(torch.amax),
    "reduce_min": reduction(torch.amin),
    "reduce_prod": reduction(product),
    "reduce_l1_norm": reduction(lambda x, dims, keep: x.abs().sum(dims, keep)),
    "reduce_l2_norm": reduction(lambda x, dims, keep: x.square().sum(dims, keep).sqrt()),
    "reduce_log_sum": reduction(lambda x, dims, keep: x.sum(dims, keep).log()),
    "reduce_log_sum_exp": reduction(torch.logsumexp),
    "reduce_sum_square": reduction(lambda x, dims, keep: x.square().sum(dims, keep)),
    "reduce_argmax": position(torch.argmax),
    "reduce_argmin": position(torch.argmin),
}
OPERATORS: dict[str, Callable[..., Any]] = {
    **UNARY,
    **BINARY,
    **REDUCTIONS,
    "real_div": binary(real_div),
    "cast": cast,
    "clip": clip,
    "clamped_relu": clamped_relu,
    "cumsum": cumsum,
    "elu": lambda x, alpha: F.elu(x, alpha),
    "gelu": gelu,
    "identity": lambda x: x,
    "inverse": inverse,
    "leaky_relu": lambda x, alpha: F.leaky_relu(x, alpha),
    "linear_activation": lambda x, alpha, beta: alpha * x + beta,
    "log": log,
    "prelu": prelu,
    "relu6": unary(F.relu6),
    "rsqrt": rsqrt,
    "scaled_tanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "select": select,
    "sigmoid_hard": sigmoid_hard,
    "silu": unary(F.silu),
    "softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "softplus": unary(F.softplus),
    "softplus_parametric": softplus_parametric,
    "softsign": unary(F.softsign),
    "threshold": lambda x, alpha: x.clamp(min=alpha),
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0.0),
}
