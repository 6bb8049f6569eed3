"""PyTorch's own format: ``torch.export``'s archive."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgepack.contracts import Census, Exporter, Graph
from edgepack.export._dialects import half_storage, lower_float, refuse_plan
from edgepack.graph import MODEL, save_graph

if TYPE_CHECKING:
    from edgepack.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Pt2(Exporter):
    """Write a ``torch.export`` program (model.pt2) that PyTorch loads without the network's code."""

    format: ClassVar[str] = "pt2"

    def lower(self, graph: Graph, plan: Plan) -> Graph:
        refuse_plan(plan, self.format, self.precision)
        return lower_float(graph, self.precision)

    def write(self, simulation: Graph, folder: Path) -> Census:
        save_graph(half_storage(simulation) if self.precision == "float16" else simulation, folder)
        return _census(folder / MODEL)


def _census(path: Path) -> Census:
    from edgepack.models.pt2 import load_program

    program = load_program(path)
    operators = Counter(
        str(node.target).removeprefix("aten.") for node in program.graph.nodes if node.op == "call_function"
    )
    weights: Counter[str] = Counter()
    for tensor in {id(tensor): tensor for tensor in program.state_dict.values()}.values():
        weights[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return Census(dict(operators), dict(weights))
