"""Averages of integers rounded as TFLite rounds them.

XNNPACK has no average pooling of integers; TFLite's own adds the stored integers, divides, and rounds halves away from
the stored 0. A mean of four falls halfway every fourth time, all of them to one side behind a ReLU, so float32 must
not decide:

    stored → dequantize → avg_pool2d → quantize
    stored → − zero → avg_pool2d → + zero → halves away from 0 → − zero → · step → quantize

MEAN is XNNPACK's, rounds halves to the even integer as the simulation does, and has a grid of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepack.export._alignment import PASSING, word
from edgepack.export._dialects import retrace

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from edgepack.contracts import Graph

POOLS = frozenset({"avg_pool1d", "avg_pool2d"})
GRID = slice(1, 3)  # of a quantize or dequantize operator's arguments


def with_halves(simulation: Graph) -> Graph:
    """The simulation with pools of integers rounded as the file's."""
    module: GraphModule = simulation.program.module(check_guards=False)
    pools = [node for node in module.graph.nodes if word(node) in POOLS and _integer(node)]
    for pool in pools:
        _round(module, pool)
    return replace(retrace(simulation, module), dialect=simulation.dialect) if pools else simulation


def without_halves(module: GraphModule) -> None:
    """What ``with_halves`` began with, as the converter takes it; changes the module."""
    import torch

    for pool in [node for node in module.graph.nodes if word(node) in POOLS]:
        shifted: Any = pool.args[0]
        if word(shifted) != "sub" or word(shifted.args[0]) != "to":
            continue
        (mean,) = pool.users
        (last,) = [user for user in mean.users if word(user) == "add"]
        for _ in ("trunc", "sub", "mul"):
            (last,) = last.users
        limits = (last.args[1], shifted.args[1], -128, 127, torch.int8)
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        with module.graph.inserting_before(pool):
            value = module.graph.call_function(dequantize, (shifted.args[0].args[0], *limits))
        pool.update_arg(0, value)
        last.replace_all_uses_with(pool)


def _integer(pool: Node) -> bool:
    """Whether the file averages integers: what is read and every rounding of the result are on one grid."""
    source: Any = pool.args[0]
    if "dequantize_per_tensor" not in str(source.target) or not _whole_windows(pool):
        return False
    node = pool
    while len(node.users) == 1 and word(node) in PASSING | POOLS:
        node = next(iter(node.users))
    return "quantize_per_tensor" in str(node.target) and node.args[GRID] == source.args[GRID]


def _whole_windows(pool: Node) -> bool:
    """Whether every mean is of a whole window; of others the converter makes several operators."""
    given: list[Any] = list(pool.args[3:])
    usual: list[Any] = [0, False, True, None]
    padding, ceil_mode, _, divisor = given + usual[len(given) :]
    return padding in (0, [0], [0, 0]) and not ceil_mode and divisor is None


def _round(module: GraphModule, pool: Node) -> None:
    import torch

    aten, call = torch.ops.aten, module.graph.call_function
    source: Any = pool.args[0]
    step, zero = source.args[GRID]
    readers = list(pool.users)
    with module.graph.inserting_before(pool):
        whole = call(aten.to.dtype, (source.args[0], torch.float32))
        pool.update_arg(0, call(aten.sub.Tensor, (whole, zero)))
    with module.graph.inserting_before(pool.next):
        mean = call(aten.add.Tensor, (pool, zero))
        half = call(aten.mul.Tensor, (call(aten.sign.default, (mean,)), 0.5))
        away = call(aten.trunc.default, (call(aten.add.Tensor, (mean, half)),))
        value = call(aten.mul.Tensor, (call(aten.sub.Tensor, (away, zero)), step))
    for reader in readers:
        reader.replace_input_with(pool, value)
