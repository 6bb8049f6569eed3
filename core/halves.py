"""Values that fall exactly halfway between two integers, which engines round to either.

A mean of four integers does so every fourth time. ONNX Runtime and XNNPACK's means round such halves to the even
integer, TFLite's own pooling rounds them away from the stored 0, others up: each is a correct rounding, and in the
simulation float32 decides. Sums and means of values on a grid are exact in float64, so a half is seen as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.samples import Array

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

EXACT = 1e-9  # of a step; float64 keeps sums of 8-bit values times float32 steps far closer
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
LINEAR = frozenset({
    "add", "sub", "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "cat", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze",
    "contiguous", "clone", "relu",
})  # fmt: skip


def exact_steps(node: Node, known: Mapping[Node, Any], scale: float) -> Array | None:
    """A value in steps of ``scale``, in float64; None where it is no sum, mean or rearrangement of values on grids."""
    value = _exact(node, known)
    return None if value is None else value.numpy() / scale


def apart(whole: Array, wanted: Array, steps: Array | None, zero: float) -> Array:
    """By how many integers two roundings differ, none where both are correct.

    Args:
        whole, wanted: the roundings, stored integers.
        steps: what was rounded, exactly; None where that is not known.
        zero: the stored integer of 0.
    """
    difference: Array = np.abs(whole.astype(np.int32) - wanted)
    if steps is None:
        return difference
    half = np.abs(steps - np.floor(steps) - 0.5) < EXACT
    correct = np.abs(whole.astype(np.float64) - zero - steps) <= 0.5 + EXACT
    return np.where(half & correct, 0, difference)


def _exact(node: Node, known: Mapping[Node, Any]) -> Tensor | None:
    if str(node.target) == DEQUANTIZE:
        given: Any = node.args
        stored, scale, zero = given[:3]
        value: Tensor = (known[stored].double() - zero) * scale
        return value
    if str(node.target).removeprefix("aten.").partition(".")[0] not in LINEAR:
        return None
    sources = {source: _exact(source, known) for source in node.all_input_nodes}
    if any(value is None for value in sources.values()):
        return None
    import torch

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: sources[source])
    compute: Any = node.target
    result: Tensor = compute(*args, **kwargs)
    return result
