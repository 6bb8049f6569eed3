"""Weights of 4 bits in tables of values, as Core ML has them: ``constexpr_lut_to_dense``.

Sources: coremltools' definitions of the operator for iOS 16 (one table for a weight) and iOS 18 (a table for each block
of output channels).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import ParityError, Unsupported
from edgepack.export._coreml_operators import taught
from edgepack.export._dialects import _assign, _attribute, retrace
from edgepack.export._packed import nibbles

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from edgepack.contracts import Graph
    from edgepack.plan import Plan

NAME = "edgepack::look_up"
OPERATOR = "constexpr_lut_to_dense"
Array = np.ndarray[Any, Any]


def refuse_tables(plan: Plan, target: str) -> None:
    """Raises Unsupported where a weight has several tables and the oldest system knows one only."""
    for name, entry in plan.nodes.items():
        tables = plan.tensors.get(f"{name}/weight_table")
        if tables is not None and len(tables) > 1 and target != "iOS18":
            raise Unsupported(
                f"coreml: {target} looks up a weight in one table, and {name} has {len(tables)}",
                f"target = 'iOS18', or codebook = {len(tables) * entry['weight']['codebook']} in quantize",
            )


def merge_tables(graph: Graph) -> Graph:
    """Looking up codes of all tables → one operator with a code from 0 to 15 per weight, taught to coremltools.

    ::

        take (tables, 16)[codes]   becomes   look_up ((rows, …) uint8, (tables, 1, …, 16, 1))
    """
    import torch

    module = graph.program.module(check_guards=False)
    found = _looked_up(module)
    if not found:
        return graph
    operator = taught(NAME, _look_up, _written)
    for node in found:
        tables, codes = (_attribute(module, source) for source in node.all_input_nodes)
        places, shape = codes % tables.shape[1], [len(tables), *[1] * (codes.dim() - 1), tables.shape[1], 1]
        kept = []
        for suffix, value in (("places", places.to(torch.uint8)), ("values", tables.detach().reshape(shape))):
            name = f"{node.all_input_nodes[0].target}_{suffix}"
            _assign(module, name, value.contiguous())
            with module.graph.inserting_before(node):
                kept.append(module.graph.get_attr(name))
        with module.graph.inserting_before(node):
            merged = module.graph.call_function(operator, (kept[0], kept[1]))
        node.replace_all_uses_with(merged)
        module.graph.erase_node(node)
    return retrace(graph, module)


def hold_tables(function: Any, simulation: Graph) -> list[str]:
    """Every weight planned in tables lies in the file in codes of 4 bits and tables of 16 bits; said in a sentence.

    Args:
        function: the main function of the package, read again.

    Raises:
        ParityError: one does not; names it.
    """
    stored = Counter(_stored(function))
    module = simulation.program.module(check_guards=False)
    planned = _looked_up(module)
    for node in planned:
        tables, codes = (_attribute(module, source).detach().numpy() for source in node.all_input_nodes)
        if not stored[_key(codes % tables.shape[1], tables)]:
            name = str(node.all_input_nodes[0].target).removesuffix("_tables")
            raise ParityError(f"coreml: {name!r} is planned in tables of {tables.shape[1]} values, the file holds it "
                              "otherwise")  # fmt: skip
    return [f"{len(planned)} weights lie in 4 bits, looked up in tables: smaller, not faster"] if planned else []


def _stored(function: Any) -> Iterator[bytes]:
    """What identifies each weight of a package that is looked up in tables of 16."""
    for operator in function.operations:
        if operator.op_type != OPERATOR:
            continue
        codes, tables = operator.inputs["indices"].val, operator.inputs["lut"].val
        if tables.size % 16 or tables.dtype != np.float16:
            continue
        packed = "shape" in operator.inputs  # iOS 16: the bytes as they lie
        yield (np.asarray(codes).tobytes() if packed else nibbles(codes).tobytes()) + tables.tobytes()


def _key(codes: Array, tables: Array) -> bytes:
    return nibbles(codes).tobytes() + tables.astype(np.float16).tobytes()


def _looked_up(module: GraphModule) -> list[Node]:
    import torch

    return list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.take.default))


def _look_up(places: Tensor, tables: Tensor) -> Tensor:
    """``tables[block of the first axis][place]``."""
    blocks = places.reshape(len(tables), -1).long()
    return tables.reshape(len(tables), -1).gather(1, blocks).reshape(places.shape)


def _written(utils: Any, places: Array, tables: Array, name: str) -> Any:
    return utils._construct_constexpr_lut_op(places, tables, name=name)
