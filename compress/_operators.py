"""Which operators of a captured graph quantization knows, and how to walk among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgepack.compress._axis import COPIES, DROPOUTS, RESHAPES
from edgepack.compress._graph import argument, operator_of, readers

aten = torch.ops.aten
WEIGHTED = (aten.conv1d, aten.conv2d, aten.conv3d, aten.linear)
RELUS = (aten.relu, aten.relu_)
LEAKY = (aten.leaky_relu, aten.leaky_relu_)
CLIPS = (aten.hardtanh, aten.hardtanh_, aten.relu6, aten.relu6_)
FUSED = (*RELUS, *LEAKY, *CLIPS)  # engines compute these with the layer before, and round once, behind them
AVERAGES = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d)
MAXIMA = (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)


def floating(node: fx.Node) -> bool:
    """Whether a node computes one float32 tensor."""
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype == torch.float32


def word(node: fx.Node) -> str:
    """``aten.conv2d.default`` → ``conv2d``."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def only_reader(node: fx.Node) -> fx.Node | None:
    """The single node that reads a node's values, None where there are none or several."""
    users = readers(node)
    return users[0] if len(users) == 1 else None


def fused(node: fx.Node | None) -> bool:
    """Whether engines compute an operator with the layer before it."""
    return node is not None and operator_of(node) in FUSED


def slope(node: fx.Node | None) -> float:
    """What negative values are multiplied by when they are read: 0 before a ReLU, 1 before most operators."""
    if node is None or not fused(node):
        return 1.0
    kind = operator_of(node)
    if kind in LEAKY:
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return float(given)
    lowest: Any = 0.0
    if kind in (aten.hardtanh, aten.hardtanh_):
        lowest = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", -1.0)
    return 0.0 if lowest >= 0 else 1.0


MOVES = (
    *COPIES, *DROPOUTS, *RESHAPES, *MAXIMA, aten.permute, aten.transpose, aten.slice, aten.select, aten.expand,
    aten.chunk, aten.split, aten.unbind,
)  # fmt: skip


def passes(node: fx.Node) -> bool:
    """Whether a node's values are values of its first argument, with zeros at most."""
    if operator_of(node) is aten.pad:
        return argument(node, "mode") != "constant" or (argument(node, "value") or 0.0) == 0.0
    return operator_of(node) in MOVES
