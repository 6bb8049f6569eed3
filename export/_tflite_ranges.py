"""A plan as TFLite's integer operators share grids.

A concatenation reads and writes one grid. A leaky ReLU reads and writes one step, because XNNPACK multiplies by
fractions of 256; so its slope is such a fraction too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepack.export._dialects import retrace
from edgepack.export._qdq import LEAKY, PASSING, _word, aligned

if TYPE_CHECKING:
    from torch.fx import Node

    from edgepack.contracts import Graph
    from edgepack.plan import Plan

SAME_GRID = frozenset({"cat", "avg_pool2d"})
SLOPE = 256  # XNNPACK's slopes are whole numbers of 1/256
OFF_TIES = 1 - 2.0**-16  # it rounds halves of negative numbers up; a slope that is a little less does so too
DEFAULT_SLOPE = 0.01


def with_slopes(graph: Graph, plan: Plan) -> Graph:
    """The graph with slopes of leaky ReLUs that XNNPACK has."""
    module = graph.program.module(check_guards=False)
    leaky = [node for node in aligned(module, plan) if _word(node) in LEAKY]
    for node in leaky:
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", DEFAULT_SLOPE)
        node.args, node.kwargs = (node.args[0], round(given * SLOPE) / SLOPE * OFF_TIES), {}
    return retrace(graph, module) if leaky else graph


def harmonized(graph: Graph, plan: Plan) -> Plan:
    """The plan with ranges that the dialect's grids agree in."""
    names = aligned(graph.program.module(check_guards=False), plan)
    ranges = _Ranges({name: entry["range"] for name, entry in plan.nodes.items() if "range" in entry})
    for node, name in names.items():
        if _word(node) in SAME_GRID | PASSING:
            for source in _sources(node, names):
                ranges.join(name, source)
    pairs = [(source, name) for node, name in names.items() if _word(node) in LEAKY for source in _sources(node, names)]
    while any(ranges.widen(*pair) for pair in pairs):
        pass
    return replace(plan, nodes={name: _changed(entry, ranges, name) for name, entry in plan.nodes.items()})


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

    def widen(self, one: str, two: str) -> bool:
        """Give two ranges one width; whether something changed."""
        if one not in self.parent or two not in self.parent:
            return False
        firsts = self.first(one), self.first(two)
        widths = [self.ends[name][1] - self.ends[name][0] for name in firsts]
        wide = max(widths)
        if min(widths) >= wide * (1 - 1e-9):
            return False
        for name in firsts:
            self.ends[name] = self.ends[name][0], self.ends[name][0] + wide
        return True
