"""A plan as TFLite's integer operators share grids.

A concatenation reads and writes one grid. XNNPACK's leaky ReLU and its change of grid multiply by whole numbers of
1/256, so the ratio of the steps they read and write is such a number, and so is what negative values are multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepack.export._alignment import PASSING, aligned, word
from edgepack.export._dialects import retrace
from edgepack.export._integer_dialect import LEAKY
from edgepack.export._tflite_copies import OWN

if TYPE_CHECKING:
    from torch.fx import Node

    from edgepack.contracts import Graph
    from edgepack.plan import Plan

SAME_GRID = frozenset({"cat", "avg_pool2d"})
UNITS = 256
OFF_TIES = 2.0**-18  # XNNPACK rounds halves up; so does the simulation when what it multiplies by is off by this
DEFAULT_SLOPE = 0.01


def with_slopes(graph: Graph, plan: Plan) -> Graph:
    """The graph with slopes of leaky ReLUs that XNNPACK has between the plan's grids."""
    module = graph.program.module(check_guards=False)
    names = aligned(module, plan)
    leaky = [node for node in names if word(node) in LEAKY]
    for node in leaky:
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", DEFAULT_SLOPE)
        ratios = [_width(plan, source) / _width(plan, names[node]) for source in _sources(node, names)]
        ratio = ratios[0] if ratios else 1.0
        node.args, node.kwargs = (node.args[0], round(given * ratio * UNITS) / UNITS / ratio * (1 - OFF_TIES)), {}
    return retrace(graph, module) if leaky else graph


def _width(plan: Plan, name: str) -> float:
    known = plan.nodes[name].get("range", {"low": 0.0, "high": 1.0})
    return float(known["high"] - known["low"]) or 1.0


def harmonized(graph: Graph, plan: Plan) -> Plan:
    """The plan with ranges that the dialect's grids agree in."""
    names = aligned(graph.program.module(check_guards=False), plan)
    ranges = _Ranges({name: entry["range"] for name, entry in plan.nodes.items() if "range" in entry})
    for node, name in names.items():
        if word(node) in SAME_GRID | PASSING and OWN not in plan.nodes[name]:
            for source in _sources(node, names):
                ranges.join(name, source)
    copies = [node for node in graph_order(names) if plan.nodes[names[node]].get(OWN) == "integers"]
    reached: dict[str, str] = {}
    for node in copies:  # one ratio per grid; what is copied into two shares the second
        (source,) = _sources(node, names)
        if reached.setdefault(ranges.first(source), ranges.first(names[node])) != ranges.first(names[node]):
            ranges.join(names[node], source)
    order = [node for node in graph_order(names) if word(node) in LEAKY or node in copies]
    for node in reversed(order):
        for source in _sources(node, names):
            ranges.widen(source, names[node])
    return replace(plan, nodes={name: _changed(entry, ranges, name) for name, entry in plan.nodes.items()})


def graph_order(names: Mapping[Node, str]) -> list[Node]:
    """The nodes in the order of computation."""
    everything = next(iter(names)).graph.nodes if names else ()
    return [node for node in everything if node in names]


def _sources(node: Node, names: Mapping[Node, str]) -> Iterator[str]:
    return (names[source] for source in node.all_input_nodes if source in names)


def _changed(entry: Mapping[str, Any], ranges: _Ranges, name: str) -> dict[str, Any]:
    if "range" not in entry:
        return dict(entry)
    low, high = ranges.ends[ranges.first(name)]
    return {**entry, "range": {**entry["range"], "low": low, "high": high}}


class _Ranges:
    """Ranges by name, some of them one."""

    def __init__(self, ranges: Mapping[str, Mapping[str, float]]) -> None:
        self.ends = {name: (float(known["low"]), float(known["high"])) for name, known in ranges.items()}
        self.parent = {name: name for name in ranges}

    def first(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def join(self, one: str, two: str) -> None:
        if one not in self.parent or two not in self.parent:
            return
        one, two = self.first(one), self.first(two)
        (low, high), (other_low, other_high) = self.ends[one], self.ends[two]
        self.parent[two] = one
        self.ends[one] = min(low, other_low), max(high, other_high)

    def widen(self, one: str, two: str) -> None:
        """Make the first range a little wider, so that its step is an odd number of 1/256 of the second's."""
        if one not in self.parent or two not in self.parent or self.first(one) == self.first(two):
            return
        low, high = self.ends[self.first(one)]
        other_low, other_high = self.ends[self.first(two)]
        unit = (other_high - other_low) / UNITS
        if unit <= 0 or high <= low:
            return
        count = math.ceil((high - low) / unit) | 1
        self.ends[self.first(one)] = low, low + count * unit * (1 + OFF_TIES)
