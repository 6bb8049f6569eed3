"""Plan → simulation for TFLite, and the simulation in the form that the converter takes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.errors import ParityError, require
from edgepack.export._dialects import _assign, _attribute, retrace
from edgepack.export._qdq import ADDITIONS, CONVOLUTIONS, LEAKY, RELUS, Dialect, quantized
from edgepack.export._tflite_file import constant
from edgepack.export._tflite_quantized import WEIGHTED, Weight
from edgepack.export._tflite_ranges import harmonized, with_slopes

if TYPE_CHECKING:
    from edgepack.plan import Plan

MEANS = frozenset({"mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d"})
TFLITE = Dialect(
    "s8s8-tflite",
    fused=RELUS,
    integer=ADDITIONS | LEAKY | MEANS | {"cat"},
    every_output=CONVOLUTIONS | {"linear"},
    signed=True,
)
DIALECTS = (TFLITE.name,)


def lower_integers(graph: Graph, plan: Plan) -> Graph:
    """The simulation. Raises Unsupported where the plan asks for what TFLite lacks."""
    graph = with_slopes(graph, plan)
    return quantized(graph, harmonized(graph, plan), TFLITE)


def float_weights(simulation: Graph) -> tuple[Graph, list[Weight]]:
    """The simulation with its integer weights and biases as floats on their grid, and the integers."""
    import torch

    module = simulation.program.module(check_guards=False)
    operator = torch.ops.quantized_decomposed.dequantize_per_channel.default
    weights = []
    for node in list(module.graph.find_nodes(op="call_function", target=operator)):
        integers, scale = (_attribute(module, source) for source in node.args[:2])
        tall = scale.reshape(-1, *[1] * (integers.ndim - 1))
        name = str(node.args[0].target)
        if integers.dtype == torch.int8:
            weights.append(Weight(name, integers.numpy(), scale.numpy(), readers=len(node.users)))
        _assign(module, f"{name}_float", torch.nn.Parameter(integers.float() * tall, requires_grad=False))
        with module.graph.inserting_before(node):
            value = module.graph.get_attr(f"{name}_float")
        node.replace_all_uses_with(value)
    return replace(retrace(simulation, module), dialect=simulation.dialect), weights


def hold_integers(data: bytes, weights: Sequence[Weight]) -> None:
    """Every operator that was planned in integers reads the planned integers of the file.

    Raises:
        ParityError: some do not; says which.
    """
    schema = require("ai_edge_litert.schema_py_generated", "tflite")

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    found = Counter(_stored(schema, model))
    for weight in weights:
        key = (weight.form, _fingerprint(weight.integers))
        if found[key] < weight.readers:
            raise ParityError(
                f"{weight.name!r} is planned in integers ({weight.form}) for {weight.readers} operators, "
                f"{found[key]} of the file read it so"
            )
        found[key] -= weight.readers


def _stored(schema: Any, model: Any) -> Iterator[tuple[str, str]]:
    """How each operator of the file reads an 8-bit weight, and the weight's fingerprint."""
    words = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    (main,) = model.subgraphs
    origins = {}
    for operator in main.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        word = words[max(code.builtinCode, code.deprecatedBuiltinCode)]
        if word == "DEQUANTIZE":
            origins[int(operator.outputs[0])] = int(operator.inputs[0])
        if word not in WEIGHTED:
            continue
        read, place = (int(tensor) for tensor in operator.inputs[:2])
        weight = main.tensors[origins.get(place, place)]
        if weight.type != schema.TensorType.INT8:
            continue
        integer = main.tensors[read].type == schema.TensorType.INT8
        form = "static" if integer else "float" if place in origins else "dynamic"
        yield form, _fingerprint(constant(schema, model, weight))


def _fingerprint(integers: Any) -> str:
    """The same for any order of axes and any signs of channels."""
    return hashlib.sha256(np.sort(np.abs(integers.astype(np.int16)), axis=None).tobytes()).hexdigest()
