"""MIL operators that resize the last axes, by the grid of source positions that each sampling mode defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgepack.runtimes._mil_math import ints


def grid(size: int, count: int, mode: str) -> Tensor:
    """Positions in ``0 … size − 1`` that ``count`` results are read from; see MIL's resize_bilinear."""
    steps = torch.arange(count, dtype=torch.float64)
    if mode == "STRICT_ALIGN_CORNERS" or (mode == "ALIGN_CORNERS" and count > 1):
        positions = steps * ((size - 1) / max(count - 1, 1))
    elif mode == "ALIGN_CORNERS":
        positions = torch.full((1,), (size - 1) / 2, dtype=torch.float64)
    elif mode == "DEFAULT":
        positions = steps * ((size - size / count) / max(count - 1, 1))
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        positions = 0.5 * delta + steps * delta
    elif mode == "UNALIGN_CORNERS":
        positions = (steps + 0.5) * (size / count) - 0.5
    else:
        raise ValueError(f"there is no sampling mode {mode!r}")
    return positions.clamp(0, size - 1)


def linear(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Values between the two neighbours of each position."""
    low = positions.floor()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (positions - low).to(x.dtype).reshape([-1 if index == axis else 1 for index in range(x.ndim)])
    first, second = (x.index_select(axis, at.to(torch.int64)) for at in (low, high))
    return first + (second - first) * share


def nearest(x: Tensor, axis: int, count: int, scale: float | None = None) -> Tensor:
    ratio = x.shape[axis] / count if scale is None else 1 / scale
    at = (torch.arange(count, dtype=torch.float64) * ratio + 1e-9).floor().to(torch.int64)
    return x.index_select(axis, at.clamp(max=x.shape[axis] - 1))


def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    for axis, count in ((x.ndim - 2, target_size_height), (x.ndim - 1, target_size_width)):
        x = linear(x, axis, grid(x.shape[axis], count, sampling_mode))
    return x


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return nearest(nearest(x, x.ndim - 2, target_size_height), x.ndim - 1, target_size_width)


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    for axis, scale in ((x.ndim - 2, scale_factor_height), (x.ndim - 1, scale_factor_width)):
        x = nearest(x, axis, int(x.shape[axis] * scale), scale)
    return x


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    height, width = int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)
    return resize_bilinear(x, height, width, mode)


def resize(
    x: Tensor,
    shape: Tensor,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    wanted = ints(shape)[-int(resized_dims) :]
    for axis, count in enumerate(wanted, start=x.ndim - len(wanted)):
        size = count or x.shape[axis]
        positions = grid(x.shape[axis], size, sampling_mode)
        if interpolation_mode == "LINEAR":
            x = linear(x, axis, positions)
        else:
            x = nearest(x, axis, size) if sampling_mode == "DEFAULT" else _closest(x, axis, positions)
    return x


def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Values at (x, y) coordinates between −1 and 1, as PyTorch's grid_sample."""
    padding = {"constant": "zeros", "border": "border", "reflection": "reflection"}.get(padding_mode)
    if padding is None or coordinates_mode != "normalized_minus_one_to_one" or padding_value != 0:
        raise ValueError(f"resample with {padding_mode} padding by {padding_value} and {coordinates_mode} coordinates")
    return F.grid_sample(x, coordinates, sampling_mode, padding, bool(align_corners))


def _closest(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    return x.index_select(axis, positions.round().to(torch.int64))


OPERATORS: dict[str, Callable[..., Any]] = {
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
