"""Factored layers as chains of stages: shapes, counts and modules; what the weights are stands in ``_decompose.py``.

c inputs, o outputs, kernel k (k_h × k_w), g groups; ranks r, r_c, r_o are those of one group:

    channel-svd   k: c → g·r             1: g·r → o                                 (linear layers and 1×1: low rank)
    spatial-svd   k_h×1: c → g·r         1×k_w: g·r → o                             (two axes only)
    tucker        1: c → g·r_c           k: g·r_c → g·r_o        1: g·r_o → o
    cp            1: c → g·r             along each axis, depthwise               1: g·r → o
    3-way         1: c → o·r             along each axis, depthwise               1: o·r → o, ones

Stride, padding and dilation of an axis stand where the kernel of that axis is; zeros may be padded there because no
stage but the last has a bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
METHODS = ("channel-svd", "spatial-svd", "tucker", "cp")


@dataclass(frozen=True)
class Stage:
    """A convolution, or with an empty kernel a linear layer, without its weights.

    Attributes:
        inputs: channels; so ``outputs``.
        padding: zeros at both ends of each axis, or ``same`` or ``valid``.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False

    @classmethod
    def of(cls, layer: nn.Module) -> Stage:
        """The shape of a convolution or linear layer."""
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        assert isinstance(layer, CONVOLUTIONS)
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        return cls(
            layer.in_channels, layer.out_channels, tuple(layer.kernel_size), tuple(layer.stride), padding,
            tuple(layer.dilation), layer.groups, layer.bias is not None,
        )  # fmt: skip

    @property
    def weights(self) -> int:
        return self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)

    @property
    def values(self) -> int:
        """Parameters, bias included."""
        return self.weights + self.outputs * self.bias

    def size_behind(self, size: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the spatial axes of the result; those of a linear layer stay."""
        if not self.kernel:
            return tuple(size)
        return tuple(
            (length + self._padded(axis) - self.dilation[axis] * (self.kernel[axis] - 1) - 1) // self.stride[axis] + 1
            for axis, length in enumerate(size)
        )

    def _padded(self, axis: int) -> int:
        if isinstance(self.padding, str):
            return self.dilation[axis] * (self.kernel[axis] - 1) if self.padding == "same" else 0
        return 2 * self.padding[axis]

    def pointwise(self, inputs: int, outputs: int, bias: bool = False) -> Stage:
        """A stage of kernel 1 between the same groups."""
        ones = (1,) * len(self.kernel)
        return Stage(inputs, outputs, ones, ones, (0,) * len(ones), ones, self.groups, bias)

    def along(self, axis: int, inputs: int, outputs: int, groups: int) -> Stage:
        """This stage's kernel along one axis alone."""

        def only(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
            return tuple(value if index == axis else neutral for index, value in enumerate(values))

        padding = self.padding if isinstance(self.padding, str) else only(self.padding, 0)
        return Stage(
            inputs, outputs, only(self.kernel, 1), only(self.stride, 1), padding, only(self.dilation, 1), groups
        )

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer, with PyTorch's own first weights."""
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs, self.bias, dtype=dtype)
        kind = CONVOLUTIONS[len(self.kernel) - 1]
        return kind(
            self.inputs, self.outputs, self.kernel, self.stride, self.padding, self.dilation, self.groups,  # type: ignore[arg-type]
            self.bias, dtype=dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One way to write a layer: dense, or a method with the ranks of one group."""

    method: str
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.method, "×".join(map(str, self.ranks))]).strip()


DENSE = Form("dense")


def suits(dense: Stage, method: str) -> bool:
    """Whether a layer can be written so; a linear layer and a kernel of 1 have no space to factor."""
    if method == "channel-svd":
        return True
    if method == "spatial-svd":
        return len(dense.kernel) == 2 and min(dense.kernel) > 1
    return math.prod(dense.kernel) > 1


def full_ranks(dense: Stage, method: str) -> tuple[int, ...]:
    """Ranks at which a method is exact."""
    inputs, outputs = dense.inputs // dense.groups, dense.outputs // dense.groups
    taps = math.prod(dense.kernel)
    if method == "tucker":
        return min(inputs, outputs * taps), min(outputs, inputs * taps)
    if method == "spatial-svd":
        return (min(inputs * dense.kernel[0], outputs * dense.kernel[1]),)
    if method == "channel-svd":
        return (min(inputs * taps, outputs),)
    modes = (outputs, inputs, *dense.kernel)
    return (math.prod(modes) // max(modes),)


def stages(dense: Stage, form: Form) -> list[Stage]:
    """The chain that computes a layer in a form."""
    ranks = [dense.groups * rank for rank in form.ranks]
    if form.method == "dense":
        return [dense]
    if form.method == "channel-svd":
        return [replace(dense, outputs=ranks[0], bias=False), dense.pointwise(ranks[0], dense.outputs, dense.bias)]
    if form.method == "3-way":
        return _three_way(dense, form.ranks[0])
    if form.method == "shared":
        return stages(dense, Form("spatial-svd" if len(dense.kernel) > 1 else "channel-svd", form.ranks))
    if form.method == "spatial-svd":
        across = replace(dense.along(1, ranks[0], dense.outputs, dense.groups), bias=dense.bias)
        return [dense.along(0, dense.inputs, ranks[0], dense.groups), across]
    first, last = dense.pointwise(dense.inputs, ranks[0]), dense.pointwise(ranks[-1], dense.outputs, dense.bias)
    if form.method == "tucker":
        return [first, replace(dense, inputs=ranks[0], outputs=ranks[1], bias=False), last]
    axes = [axis for axis, taps in enumerate(dense.kernel) if taps > 1]
    return [_short(dense, first), *(dense.along(axis, ranks[0], ranks[0], ranks[0]) for axis in axes), last]


def _three_way(dense: Stage, rank: int) -> list[Stage]:
    """1×1 to R channels per output, one depthwise stage per axis, and the sum over R by ones (where R > 1)."""
    wide = dense.outputs * rank
    axes = [dense.along(axis, wide, wide, wide) for axis in range(len(dense.kernel))]
    first, ones = dense.pointwise(dense.inputs, wide), (1,) * len(dense.kernel)
    if rank == 1:
        return [first, *axes[:-1], replace(axes[-1], bias=dense.bias)]
    last = Stage(wide, dense.outputs, ones, ones, (0,) * len(ones), ones, dense.outputs, dense.bias)
    return [first, *axes, last]


def _short(dense: Stage, first: Stage) -> Stage:
    """The first stage with stride and padding of the axes that have one tap only and so no stage of their own."""
    stride = tuple(step if taps == 1 else 1 for step, taps in zip(dense.stride, dense.kernel, strict=True))
    if isinstance(dense.padding, str):
        return first
    padding = tuple(zeros if taps == 1 else 0 for zeros, taps in zip(dense.padding, dense.kernel, strict=True))
    return replace(first, stride=stride, padding=padding)


def values(chain: Sequence[Stage]) -> int:
    """Parameters of a chain."""
    return sum(stage.values for stage in chain)


def chain_macs(chain: Sequence[Stage], size: Sequence[int]) -> int:
    """Multiply-accumulates of a chain for one sample whose spatial axes have these sizes (linear: its positions)."""
    total, now = 0, tuple(size)
    for stage in chain:
        now = stage.size_behind(now)
        total += stage.weights * math.prod(now)
    return total


def chain_module(chain: Sequence[Stage], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The layers of a chain, in inference mode."""
    return nn.Sequential(*(stage.layer(dtype) for stage in chain)).eval()


def fill(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Give a stage's layer its numbers."""
    with torch.no_grad():
        for own, values_ in ((layer.weight, weight), (layer.bias, bias)):
            if values_ is not None:
                assert isinstance(own, torch.Tensor)
                own.copy_(values_.reshape(own.shape))
