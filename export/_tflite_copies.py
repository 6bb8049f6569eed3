"""Copies of values in a grid of their own, for readers that need another than the rest.

A concatenation reads and writes one grid. What only it reads is computed on that grid at once, which costs nothing.
What others read as well would lose resolution there too:

    a ─┬─ cat           a ─┬─ copy in the grid of cat ── cat
       └─ conv2d   →       └─ conv2d

What a float sum reads or gives stays float for it, and is rounded for layers with integer weights. A sum stays float
where 8 bits would hardly notice one of its parts (XNNPACK has no integers for it either).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepack.export._alignment import PASSING, aligned, word
from edgepack.export._dialects import retrace
from edgepack.export._integer_dialect import ADDITIONS
from edgepack.export._tflite_ends import drowned, skipping

if TYPE_CHECKING:
    from torch.fx import Node

    from edgepack.contracts import Graph
    from edgepack.plan import Plan

COPY = "clone"
OWN = "own_grid"  # key of a copy's entry in the plan, and of what it copies: ``integers`` or ``floats``
COARSER = 1.5  # times the step; up to here a shared grid costs less than rounding twice


def with_copies(graph: Graph, plan: Plan) -> tuple[Graph, Plan]:
    """The graph and the plan with a copy for each such value."""
    module = graph.program.module(check_guards=False)
    names = aligned(module, plan)
    drowning = {name: {**plan.nodes[name], "float": "a part of it is below its step"}
                for node, name in names.items() if _drowns(node, plan, names)}  # fmt: skip
    plan = replace(plan, nodes=plan.nodes | drowning)
    added: dict[Node, tuple[str, dict[str, Any]]] = {}
    for source, reader, like in list(_wanted(plan, names)):
        copy = _copied(source, reader)
        kind = "integers" if word(reader) == "cat" else "floats"
        entry = {"operator": COPY, "range": dict(plan.nodes[names[like]]["range"]), OWN: kind}
        added[copy] = f"{names[source]} for {names[reader]}", entry
    if not added:
        return graph, plan
    known = {node: (name, plan.nodes[name]) for node, name in names.items() if word(node) == COPY} | added
    others = {name: entry for name, entry in plan.nodes.items() if entry.get("operator") != COPY}
    copies = dict(known[node] for node in module.graph.nodes if node in known)
    return retrace(graph, module), replace(plan, nodes={**others, **copies})


def _wanted(plan: Plan, names: dict[Node, str]) -> Iterator[tuple[Node, Node, Node]]:
    """What is to be copied, for which reader, and the value whose range the copy has."""
    for node in names:
        if "range" not in plan.nodes[names[node]]:
            continue
        if word(node) == "cat":
            for source in node.all_input_nodes:
                if source in names and _read_elsewhere(source, node) and _coarser(plan, names[source], names[node]):
                    yield source, node, node
        elif "weight" in plan.nodes[names[node]] and (added := skipping(node)) is not None:
            for reader in node.users:
                if reader is not added and reader in names:
                    yield node, reader, node
        elif word(node) in ADDITIONS and "float" in plan.nodes[names[node]]:
            for reader in node.users:
                if "weight" in plan.nodes.get(names.get(reader, ""), ()):
                    yield node, reader, node


def _drowns(node: Node, plan: Plan, names: dict[Node, str]) -> bool:
    """Whether the steps of a sum are too coarse for one of its parts."""
    if word(node) not in ADDITIONS:
        return False
    parts = [names[source] for source in node.all_input_nodes if source in names]
    known = [plan.nodes[name].get("range") for name in (names[node], *parts)]
    whole, *widths = [0.0 if ends is None else ends["high"] - ends["low"] for ends in known]
    return any(width > 0 and drowned(width, whole) for width in widths)


def _coarser(plan: Plan, source: str, cat: str) -> bool:
    own, other = (plan.nodes[name].get("range") for name in (source, cat))
    if own is None or other is None:
        return False
    shared = max(own["high"], other["high"]) - min(own["low"], other["low"])
    return bool(shared > COARSER * (own["high"] - own["low"]))


def _read_elsewhere(source: Node, cat: Node) -> bool:
    """Whether anything but the concatenation computes with a value or a rearrangement of it."""
    while word(source) in PASSING and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return bool(set(_readers(source)) - {cat})


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if word(user) in PASSING:
            yield from _readers(user)
        else:
            yield user


def _copied(source: Node, reader: Node) -> Node:
    import torch

    with reader.graph.inserting_before(reader):
        copy = reader.graph.call_function(torch.ops.aten.clone.default, (source,))
    reader.replace_input_with(source, copy)
    return copy
