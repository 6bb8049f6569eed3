"""Standard layers from the arguments of ATen operators and constant tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgepack.models._builder import filled

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def conv(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> nn.Module:
    """nn.Conv1d … nn.Conv3d for a weight (out, in / groups, kernel …)."""
    rank = weight.dim() - 2
    module = CONVS[rank](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=_spread(stride, rank),
        padding=padding if isinstance(padding, str) else _spread(padding, rank),
        dilation=_spread(dilation, rank),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    return filled(module, weight=weight, bias=bias)


def conv_transpose(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> nn.Module:
    """nn.ConvTranspose1d … nn.ConvTranspose3d for a weight (in, out / groups, kernel …)."""
    rank = weight.dim() - 2
    module = TRANSPOSED[rank](
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=_spread(stride, rank),
        padding=_spread(padding, rank),
        output_padding=_spread(output_padding, rank),
        groups=groups,
        bias=bias is not None,
        dilation=_spread(dilation, rank),
        device="meta",
    )
    return filled(module, weight=weight, bias=bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """nn.Linear for a weight (out, in)."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return filled(module, weight=weight, bias=bias)


def batch_norm(
    rank: int, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> nn.Module:
    """nn.BatchNorm1d … nn.BatchNorm3d for an input of ``rank`` axes."""
    if weight is None and bias is not None:
        weight = torch.ones_like(mean)
    if bias is None and weight is not None:
        bias = torch.zeros_like(mean)
    module = BATCH_NORMS[rank](mean.numel(), eps=eps, affine=weight is not None, device="meta")
    return filled(module, weight=weight, bias=bias, running_mean=mean, running_var=variance)


def layer_norm(shape: Sequence[int], weight: Tensor, bias: Tensor | None, eps: float) -> nn.Module:
    module = nn.LayerNorm(list(shape), eps=eps, bias=bias is not None, device="meta")
    return filled(module, weight=weight, bias=bias)


def rms_norm(shape: Sequence[int], weight: Tensor, eps: float | None) -> nn.Module:
    return filled(nn.RMSNorm(list(shape), eps=eps, device="meta"), weight=weight)


def group_norm(groups: int, weight: Tensor, bias: Tensor | None, eps: float) -> nn.Module:
    bias = torch.zeros_like(weight) if bias is None else bias
    return filled(nn.GroupNorm(groups, weight.numel(), eps=eps, device="meta"), weight=weight, bias=bias)


def instance_norm(rank: int, weight: Tensor, bias: Tensor | None, eps: float) -> nn.Module:
    bias = torch.zeros_like(weight) if bias is None else bias
    module = INSTANCE_NORMS[rank](weight.numel(), eps=eps, affine=True, device="meta")
    return filled(module, weight=weight, bias=bias)


def prelu(weight: Tensor) -> nn.Module:
    return filled(nn.PReLU(weight.numel(), device="meta"), weight=weight.reshape(-1))


def embedding(weight: Tensor) -> nn.Module:
    return filled(nn.Embedding(weight.shape[0], weight.shape[1], device="meta"), weight=weight)


def _spread(values: Sequence[int], rank: int) -> tuple[int, ...]:
    values = tuple(values)
    return values * rank if len(values) == 1 else values


Arguments = Mapping[str, Any]
Constant = Callable[[Any], "Tensor | None"]
