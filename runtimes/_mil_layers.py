"""MIL operators with weights or windows: convolution, linear maps, pooling, normalization, quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgepack.runtimes._mil_math import ints, per_channel, tensor

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
BOUNDS = {"int8": (-128, 127), "uint8": (0, 255)}


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    **strides: Tensor,
) -> Tensor:
    rank = x.ndim - 2
    steps, spread = _steps(rank, **strides)
    reach = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], spread, strict=True)]
    pads = _pads(x.shape[2:], reach, steps, pad_type, pad)
    before = [first for first, last in pads if first == last]
    if len(before) == rank:
        return CONVOLUTIONS[rank](x, weight, bias, steps, before, spread, groups)
    return CONVOLUTIONS[rank](F.pad(x, _torch_order(pads)), weight, bias, steps, 0, spread, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    pad_type: str = "valid",
    groups: int = 1,
    **strides: Tensor,
) -> Tensor:
    """The whole transposed convolution, then the margins cut off (or zeros put on where more is asked for)."""
    rank = x.ndim - 2
    steps, spread = _steps(rank, **strides)
    full = TRANSPOSED[rank](x, weight, None, steps, 0, 0, groups, spread)
    margins = [(0, 0)] * rank if pad is None or pad_type != "custom" else _pairs(pad)
    if pad_type in ("same", "same_lower"):
        extra = [have - size * step for have, size, step in zip(full.shape[2:], x.shape[2:], steps, strict=True)]
        margins = [_halves(total, pad_type) for total in extra]
    if output_shape is not None:
        wanted = ints(output_shape)[2:]
        pairs = zip(full.shape[2:], margins, wanted, strict=True)
        margins = [(first, have - first - size) for have, (first, _), size in pairs]
    cut = F.pad(full, [-margin for margin in _torch_order(margins)])
    return cut if bias is None else cut + per_channel(cut, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v; a boolean mask keeps what is true."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def pool(windows: Callable[[Tensor, Tensor], Tensor], filler: float) -> Callable[..., Tensor]:
    """Pooling as a reduction over sliding windows.

    Args:
        windows: values and how many of them are real (not padding) in each window → results. Window axes are last.
        filler: value of padding.
    """

    def operator(
        x: Tensor,
        kernel_sizes: Tensor,
        pad_type: str,
        strides: Tensor | None = None,
        pad: Tensor | None = None,
        exclude_padding_from_average: bool = False,
        ceil_mode: bool = False,
    ) -> Tensor:
        kernel = ints(kernel_sizes)
        steps = _each(strides, len(kernel))
        pads = _pads(x.shape[2:], kernel, steps, pad_type, pad)
        sizes = [size + sum(both) for size, both in zip(x.shape[2:], pads, strict=True)]
        real = torch.ones(1, 1, *(x.shape[2:] if exclude_padding_from_average else sizes))
        more = [
            _overhang(size, length, step, before) if ceil_mode else 0
            for size, length, step, (before, _) in zip(sizes, kernel, steps, pads, strict=True)
        ]
        wide = [(first, last + extra) for (first, last), extra in zip(pads, more, strict=True)]
        known = wide if exclude_padding_from_average else [(0, extra) for extra in more]
        values = _windows(F.pad(x, _torch_order(wide), value=filler), kernel, steps)
        return windows(values, _windows(F.pad(real, _torch_order(known)), kernel, steps).sum(-1))

    return operator


def _overhang(size: int, length: int, step: int, before: int) -> int:
    """Padding on the right that one more window needs, if that window starts inside the input."""
    count = -(-(size - length) // step) + 1
    if (count - 1) * step >= size:
        count -= 1
    return max(0, (count - 1) * step + length - size)


def _windows(x: Tensor, kernel: Sequence[int], steps: Sequence[int]) -> Tensor:
    for axis, (length, step) in enumerate(zip(kernel, steps, strict=True)):
        x = x.unfold(2 + axis, length, step)
    return x.flatten(-len(kernel))


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    factor = torch.rsqrt(variance + epsilon) * (1 if gamma is None else gamma)
    shift = (0 if beta is None else beta) - mean * factor
    return x * per_channel(x, factor) + per_channel(x, shift)


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    result = _normalized(x, list(range(2, x.ndim)), epsilon)
    result = result if gamma is None else result * per_channel(x, gamma)
    return result if beta is None else result + per_channel(x, beta)


def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    dims = list(range(x.ndim)) if axes is None else sorted(axis % x.ndim for axis in ints(axes))
    shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    result = _normalized(x, dims, epsilon)
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def quantize(
    input: Tensor,
    scale: Tensor | float,
    output_dtype: str,
    zero_point: Tensor | int | None = None,
    axis: int | None = None,
) -> Tensor:
    """round(input / scale) + zero point, within the type's range."""
    factor, offset = (_along(value, input.ndim, axis) for value in (scale, zero_point))
    levels = torch.round(input / factor) + offset
    return levels.clamp(*BOUNDS[output_dtype]).to(torch.int32)


def dequantize(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int | None = None, axis: int | None = None
) -> Tensor:
    factor, offset = (_along(value, input.ndim, axis) for value in (scale, zero_point))
    return (input - offset).to(torch.float32) * factor


def _along(value: Tensor | float | int | None, rank: int, axis: int | None) -> Tensor:
    value = tensor(0 if value is None else value)
    if value.ndim == 0 or axis is None:
        return value
    return value.reshape([-1 if index == axis % rank else 1 for index in range(rank)])


def _normalized(x: Tensor, dims: list[int], epsilon: float) -> Tensor:
    spread, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(spread + epsilon)


def _steps(rank: int, strides: Tensor | None = None, dilations: Tensor | None = None) -> tuple[list[int], list[int]]:
    """From window to window, and from element to element of one."""
    return _each(strides, rank), _each(dilations, rank)


def _each(values: Tensor | None, rank: int) -> list[int]:
    return [1] * rank if values is None else ints(values)


def _pads(
    sizes: Sequence[int], reach: Sequence[int], steps: Sequence[int], pad_type: str, pad: Tensor | None
) -> list[tuple[int, int]]:
    """Elements to put before and after each spatial axis."""
    if pad_type == "custom" and pad is not None:
        return _pairs(pad)
    if pad_type in ("valid", "custom"):
        return [(0, 0)] * len(sizes)
    totals = [
        max(0, (-(-size // step) - 1) * step + length - size)
        for size, length, step in zip(sizes, reach, steps, strict=True)
    ]
    return [_halves(total, pad_type) for total in totals]


def _halves(total: int, pad_type: str) -> tuple[int, int]:
    small = total // 2
    return (total - small, small) if pad_type == "same_lower" else (small, total - small)


def _pairs(pad: Tensor) -> list[tuple[int, int]]:
    flat = ints(pad)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _torch_order(pads: Sequence[tuple[int, int]]) -> list[int]:
    """PyTorch wants the last axis first."""
    return [amount for both in reversed(pads) for amount in both]


OPERATORS: dict[str, Callable[..., Any]] = {
    "avg_pool": pool(lambda values, real: values.sum(-1) / real, 0.0),
    "batch_norm": batch_norm,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dequantize": dequantize,
    "einsum": lambda values, equation: torch.einsum(equation, *values),
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "l2_pool": pool(lambda values, real: values.square().sum(-1).sqrt(), 0.0),
    "layer_norm": layer_norm,
    "linear": linear,
    "local_response_norm": local_response_norm,
    "matmul": matmul,
    "max_pool": pool(lambda values, real: values.amax(-1), -torch.inf),
    "quantize": quantize,
    "scaled_dot_product_attention": attention,
}
