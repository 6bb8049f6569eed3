"""A vision transformer for images of another size: its position embeddings interpolated, its patches as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepack import usercode
from edgepack.errors import InputError, Unsupported

POSITIONS = ("pos_embed", "pos_embedding", "position_embeddings")
SIZES = ("image_size", "img_size")
MOST_SPECIAL = 5  # tokens in front of the patches: class, distillation, registers
HINT = "build the network for this image size instead: options = {…} in [model]"


def fit(module: nn.Module, height: int, width: int) -> nn.Module:
    """Let a network take images of this size, in place; its other weights stay.

    timm's networks do it themselves. Of others the parameter with one row per patch is interpolated as timm does
    (bicubic), and where layers remember the image size, they are told the new one.

    Raises:
        InputError: the size is not made of whole patches.
        Unsupported: positions are not of a kind that is known, or the network needs its own image size elsewhere.
    """
    resize: Any = getattr(module, "set_input_size", None)
    if callable(resize):
        with usercode.blaming(f"{type(module).__name__}.set_input_size"):
            resize(img_size=(height, width))
    else:
        _by_names(module, height, width)
    _try(module, height, width)
    return module


def interpolated(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Embeddings (1, special + patches, C) of a square of patches for a grid (rows, columns); special ones stay.

    Raises:
        Unsupported: the patches were no square.
    """
    side = math.isqrt(positions.shape[1])
    special = positions.shape[1] - side**2
    if special > MOST_SPECIAL:
        raise Unsupported(f"{positions.shape[1]} positions are no square of patches; they cannot be interpolated", HINT)
    patches = positions[:, special:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :special], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _by_names(module: nn.Module, height: int, width: int) -> None:
    patches, found = _patches(module), list(_positions(module))
    if patches is None or len(found) != 1:
        raise Unsupported(
            f"{type(module).__name__} has not one parameter of positions ({', '.join(POSITIONS)}) and a convolution "
            "that makes patches, so it cannot take other image sizes", HINT,
        )  # fmt: skip
    (rows, columns), ((owner, name),) = patches.stride, found
    if height % rows or width % columns:
        raise InputError(f"images of {height} × {width} are not made of whole patches of {rows} × {columns}")
    positions = getattr(owner, name)
    with torch.no_grad():
        new = interpolated(positions, (height // rows, width // columns))
    setattr(owner, name, nn.Parameter(new, requires_grad=positions.requires_grad))
    for layer in module.modules():
        for size in SIZES:
            if isinstance(old := vars(layer).get(size), (int, tuple, list)):
                setattr(layer, size, height if isinstance(old, int) else (height, width))


def _patches(module: nn.Module) -> nn.Conv2d | None:
    return next(
        (
            layer
            for layer in module.modules()
            if isinstance(layer, nn.Conv2d) and layer.stride == layer.kernel_size and layer.stride[0] > 1
        ),
        None,
    )


def _positions(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for layer in module.modules():
        for name, value in layer.named_parameters(recurse=False):
            if name in POSITIONS and value.ndim == 3 and value.shape[0] == 1:
                yield layer, name


def _try(module: nn.Module, height: int, width: int) -> None:
    patches = _patches(module)
    channels = 3 if patches is None else patches.in_channels
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, height, width))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise Unsupported(
            f"{type(module).__name__} does not take images of {height} × {width}: {usercode.sentence(error)}", HINT
        ) from error
