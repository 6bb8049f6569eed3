"""What a TFLite file holds, and which of its operators XNNPACK takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from edgepack import contents
from edgepack.contracts import Census, Graph
from edgepack.errors import require
from edgepack.export._tflite_chw import Chw
from edgepack.export._tflite_file import constant, dtypes
from edgepack.export._tflite_form import quiet
from edgepack.export._tflite_model import Model

DELEGATE = "DELEGATE"


@dataclass(frozen=True)
class Partitions:
    """How XNNPACK divides a file.

    Attributes:
        count: of groups of operators that it runs.
        taken: operators it runs.
        left: operator type → count of those it leaves to TFLite's own kernels.
    """

    count: int
    taken: int
    left: dict[str, int]


def census(data: bytes, graph: Graph) -> Census:
    """Counts of a file as it was stored."""
    schema = require("ai_edge_litert.schema_py_generated", "tflite")

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    words = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    operators = Counter(
        words[_code(model.operatorCodes[operator.opcodeIndex])]
        for subgraph in model.subgraphs
        for operator in subgraph.operators
    )
    weights, keys = _weights(schema, model)
    rules = Chw(Model(schema, model), _names(graph))
    sparse = [] if (verdict := rules.verdict()) is None else [verdict, *rules.layerwise()]
    notes = (*_transposes(operators["TRANSPOSE"], graph), _delegated(data), *sparse)
    return Census(dict(operators), weights, notes, keys)


def _names(graph: Graph) -> dict[str, str]:
    """Layers by what their weights hold."""
    found = {}
    for name, value in graph.program.state_dict.items():
        if value.is_floating_point() and (key := contents.key(value.detach().numpy())) is not None:
            found[contents.values(key)] = name.removesuffix(".weight")
    return found


def _code(entry: Any) -> int:
    return int(max(entry.builtinCode, entry.deprecatedBuiltinCode))


def _weights(schema: Any, model: Any) -> tuple[dict[str, int], tuple[str, ...]]:
    """Bytes by dtype and keys of the contents, each buffer once."""
    names, seen = dtypes(schema), set()
    weights: Counter[str] = Counter()
    keys = []
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            values = None if tensor.buffer in seen else constant(schema, model, tensor)
            if values is None:
                continue
            seen.add(tensor.buffer)
            name = "int4" if tensor.type == schema.TensorType.INT4 else names[tensor.type].name
            weights[name] += len(model.buffers[tensor.buffer].data)
            if (key := contents.key(values)) is not None:
                keys.append(key)
    return dict(weights), tuple(keys)


def _transposes(count: int, graph: Graph) -> list[str]:
    """A sentence when there are more than inputs in NCHW and image outputs account for."""
    inputs = sum(len(spec.shape) >= 3 and spec.layout != "NHWC" for spec in graph.inputs)
    needed = inputs + sum(len(spec.shape) >= 3 for spec in graph.outputs)
    if count <= needed:
        return []
    return [
        f"{count} TRANSPOSE operators, up to {needed} of them for inputs and outputs; the others are permutations "
        "of the network itself (attention heads, a flatten over channels, a large pixel shuffle …)"
    ]


def _delegated(data: bytes) -> str:
    found = partitions(data)
    total = found.taken + sum(found.left.values())
    groups = f"{found.count} partition{'' if found.count == 1 else 's'}"
    left = ", ".join(f"{name} {count}" for name, count in sorted(found.left.items()))
    return f"XNNPACK takes {found.taken} of {total} operators in {groups}" + (f"; left: {left}" if left else "")


def partitions(data: bytes) -> Partitions:
    """Load a file with XNNPACK and see what became of its operators."""
    litert = require("ai_edge_litert.interpreter", "tflite")

    with quiet():
        interpreter = litert.Interpreter(model_content=data)
        interpreter.allocate_tensors()
        nodes = interpreter._get_ops_details()
    delegates = [node for node in nodes if node["op_name"] == DELEGATE]
    plain = [node for node in nodes if node["op_name"] != DELEGATE]
    taken: set[int] = set()
    for delegate in delegates:
        taken |= _inside(plain, set(delegate["inputs"]), delegate["outputs"])
    left = Counter(node["op_name"] for node in plain if node["index"] not in taken)
    return Partitions(len(delegates), len(taken), dict(left))


def _inside(nodes: Sequence[dict[str, Any]], inputs: Collection[int], outputs: Sequence[int]) -> set[int]:
    """Operators between the inputs and the outputs of a partition; they stay in the list that TFLite shows."""
    makers = {tensor: node for node in nodes for tensor in node["outputs"]}
    found: set[int] = set()
    wanted = list(outputs)
    while wanted:
        node = makers.get(wanted.pop())
        if node is None or node["index"] in found:
            continue
        found.add(node["index"])
        wanted += [tensor for tensor in node["inputs"] if tensor not in inputs]
    return found
