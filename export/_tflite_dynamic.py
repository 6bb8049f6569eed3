"""Activations rounded in ranges that TFLite finds at run time: which operators, and how a simulation does it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from edgepack.contracts import Graph
from edgepack.export._alignment import aligned, word
from edgepack.export._dialects import _groups, retrace
from edgepack.export._integer_dialect import Dialect

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from edgepack.plan import Plan

MOST_TAPS = 25  # of XNNPACK's depthwise kernels
PASSING = frozenset({  # they hand on integers as they are
    "permute", "transpose", "reshape", "view", "flatten", "squeeze", "unsqueeze", "contiguous", "clone", "dropout",
    "alias", "pad", "constant_pad_nd", "max_pool2d", "avg_pool2d", "split", "chunk", "getitem",
})  # fmt: skip


def forms_of(module: GraphModule, plan: Plan, names: Mapping[Node, str], dialect: Dialect) -> dict[str, str]:
    """Weighted operator → how its activations are rounded: ``static``, ``dynamic`` or ``float``.

    Where the plan asks for ranges found at run time, linear layers and patches have them, and so have 1×1 convolutions
    of floats, such as those behind a norm: integers would be made for that one operator alone, in another order of
    axes. A depthwise one of floats stays float where XNNPACK has a kernel of that many taps; it has none for 7×7, and
    TFLite's own, in integers, is faster than what it does instead. Other convolutions are faster in ranges known
    before.
    """
    kept = dialect.fused | dialect.integer | dialect.split | PASSING
    floats: set[Node] = set()
    forms: dict[str, str] = {}
    for node in module.graph.nodes:
        name = names.get(node)
        if name is not None and "weight" in plan.nodes[name]:
            source: Any = node.args[0]
            forms[name] = _form(node, str(plan.nodes[name].get("activations", "static")), source in floats)
            if forms[name] != "static":
                floats.add(node)
        elif node.op == "call_function" and (word(node) not in kept or floats & set(node.all_input_nodes)):
            floats.add(node)
    return forms


def _form(node: Node, asked: str, of_floats: bool) -> str:
    if asked != "dynamic" or word(node) == "linear":
        return asked
    if word(node) != "conv2d" or _in_groups(node):
        return "static"
    if _groups(node) > 1:
        return ("dynamic" if prod(_kernel(node)) > MOST_TAPS else "float") if of_floats else "static"
    return "dynamic" if _patches(node) or (of_floats and _pointwise(node)) else "static"


def _in_groups(node: Node) -> bool:
    """Whether there are groups of several channels each."""
    weight: Any = node.args[1]
    return _groups(node) > 1 and int(weight.meta["val"].shape[1]) > 1


def _pointwise(node: Node) -> bool:
    return word(node) == "conv2d" and set(_kernel(node)) == {1} and set(_stride(node)) == {1}


def _patches(node: Node) -> bool:
    return _kernel(node) == _stride(node) and not _pointwise(node)


def _kernel(node: Node) -> tuple[int, ...]:
    weight: Any = node.args[1]
    return tuple(weight.meta["val"].shape[2:])


def _stride(node: Node) -> tuple[int, ...]:
    given: Any = node.args[3] if len(node.args) > 3 else 1
    return tuple(given) * (2 // len(given)) if isinstance(given, (list, tuple)) else (given, given)


def fixed(entry: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    """What is rounded at run time reads floats, as far as ranges are concerned."""
    return dict(entry) if form is None else {**entry, "activations": "float" if form == "dynamic" else form}


def rounding(simulation: Graph, plan: Plan, dynamic: Collection[str], dialect: str) -> Graph:
    """Round what operators with dynamic activations read as XNNPACK does: rows, the channels of a point, images."""
    module = simulation.program.module(check_guards=False)
    kinds = {plan.nodes[name]["operator"] for name in dynamic}  # others may be constants by now
    planned = {name: entry for name, entry in plan.nodes.items() if entry["operator"] in kinds}
    rounded: dict[tuple[Node, str], Node] = {}
    for node, name in aligned(module, replace(plan, nodes=planned)).items():
        if name not in dynamic:
            continue
        source: Any = node.args[0]
        what = "rows" if word(node) == "linear" else "points" if _pointwise(node) else "images"
        with module.graph.inserting_before(node):
            if (source, what) not in rounded:
                rounded[source, what] = _rounded(module, source, what)
        node.update_arg(0, rounded[source, what])
    return replace(retrace(simulation, module), dialect=dialect)


def _rounded(module: GraphModule, source: Node, what: str) -> Node:
    import torch

    aten, operators = torch.ops.aten, torch.ops.quantized_decomposed
    call = module.graph.call_function
    rows = source
    if what == "images":
        rows = call(aten.flatten.using_ints, (source, 1))
    elif what == "points":
        rows = call(aten.permute.default, (source, [0, 2, 3, 1]))
    how = call(operators.choose_qparams_per_token_asymmetric.default, (rows, torch.int8))
    step, zero = call(operator.getitem, (how, 0)), call(operator.getitem, (how, 1))
    limits = (step, zero, -128, 127, torch.int8)
    stored = call(operators.quantize_per_token.default, (rows, *limits))
    value = call(operators.dequantize_per_token.default, (stored, *limits, torch.float32))
    if what == "images":
        return call(aten.view_as.default, (value, source))
    return call(aten.permute.default, (value, [0, 3, 1, 2])) if what == "points" else value
