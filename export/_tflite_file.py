"""The finished flatbuffer: the graph's names and nothing else in words, weights once and aligned, 16 bits as asked.

Follows the TFLite schema (tensorflow/compiler/mlir/lite/schema/schema.fbs) with the classes that ai-edge-litert
ships.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.errors import Unsupported, require
from edgepack.export._dialects import exact_half
from edgepack.export._packed import unpacked
from edgepack.export._tflite_packing import Blob, packed

METADATA = "edgepack"
KEPT_METADATA = (b"min_runtime_version",)


def finish(
    data: bytes, graph: Graph, half: bool, describe: bool, change: Callable[[Any, Any], None] | None = None
) -> bytes:
    """The file to be stored, from what the converter wrote.

    Args:
        half: store weights that lie on the 16-bit grid as float16.
        describe: put labels and preprocessing into the file's metadata.
        change: what else is to be done to the model, given the schema and the model.
    """
    schema = require("ai_edge_litert.schema_py_generated", "tflite")

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    _refuse_custom(schema, model)
    _name(model, graph)
    if half:
        _store_half(schema, model)
    if change is not None:
        change(schema, model)
    facts = _described(graph) if describe else None
    _gather_buffers(schema, model, facts)
    return packed(model)


def used_only(model: Any) -> None:
    """Drop tensors that no operator names any more, and number the others again."""
    (main,) = model.subgraphs
    names = [*main.inputs, *main.outputs]
    for operator in main.operators:
        names += [*operator.inputs, *operator.outputs]
    used = sorted({int(tensor) for tensor in names if tensor >= 0})
    places = {old: new for new, old in enumerate(used)} | {-1: -1}
    main.tensors = [main.tensors[old] for old in used]
    for holder in (main, *main.operators):
        holder.inputs = [places[int(tensor)] for tensor in holder.inputs]
        holder.outputs = [places[int(tensor)] for tensor in holder.outputs]
    for signature in model.signatureDefs:
        for entry in (*signature.inputs, *signature.outputs):
            entry.tensorIndex = places[int(entry.tensorIndex)]


def _refuse_custom(schema: Any, model: Any) -> None:
    names = [code.customCode.decode() for code in model.operatorCodes if code.customCode]
    if names:
        raise Unsupported(
            f"operator {', '.join(names)} is none of TFLite's own", "export to another format, or replace the operator"
        )


def _name(model: Any, graph: Graph) -> None:
    """Inputs and outputs get the graph's names, in its order; every other name goes."""
    model.description = None
    (signature,) = model.signatureDefs
    main = model.subgraphs[signature.subgraphIndex]
    for subgraph in model.subgraphs:
        subgraph.name = None
        for tensor in subgraph.tensors:
            tensor.name = None
    for entries, prefix, specs in (
        (signature.outputs, "output", graph.outputs), (signature.inputs, "args", graph.inputs),
    ):  # fmt: skip
        entries.sort(key=lambda entry: int(entry.name.decode().rpartition("_")[2]))
        if [entry.name.decode() for entry in entries] != [f"{prefix}_{index}" for index in range(len(specs))]:
            raise AssertionError(f"the converter wrote {entries}, expected {len(specs)} of {prefix}_N")
        for entry, spec in zip(entries, specs, strict=True):
            entry.name = main.tensors[entry.tensorIndex].name = spec.name.encode()
    main.inputs = [entry.tensorIndex for entry in signature.inputs]
    main.outputs = [entry.tensorIndex for entry in signature.outputs]


def _store_half(schema: Any, model: Any) -> None:
    """weight → operator becomes float16 weight → DEQUANTIZE → operator."""
    code = len(model.operatorCodes)
    main = model.subgraphs[0]
    made = []
    for index, tensor in enumerate(list(main.tensors)):
        values = constant(schema, model, tensor)
        # XNNPACK takes 16-bit weights beside a 32-bit bias, but not the other way round.
        if values is None or values.ndim < 2 or index in main.outputs or (stored := exact_half(values)) is None:
            continue
        weight = schema.TensorT()
        weight.shape, weight.type = tensor.shape, schema.TensorType.FLOAT16
        weight.buffer = len(model.buffers)
        model.buffers.append(Blob(_bytes(stored)))
        tensor.buffer = 0
        operator = schema.OperatorT()
        operator.opcodeIndex = code
        operator.inputs, operator.outputs = [len(main.tensors)], [index]
        operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
        operator.builtinOptions = schema.DequantizeOptionsT()
        main.tensors.append(weight)
        made.append(operator)
    if made:
        kind = schema.OperatorCodeT()
        kind.builtinCode = kind.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
        kind.version = 3  # the first that takes float16
        model.operatorCodes.append(kind)
        main.operators = [*made, *main.operators]


def _gather_buffers(schema: Any, model: Any, facts: bytes | None) -> None:
    """Every content once; buffer 0 is the empty one, as the schema asks."""
    kept, places = [Blob()], {b"": 0}

    def place(number: int) -> int:
        data = model.buffers[number].data
        content = b"" if data is None else np.asarray(data, np.uint8).tobytes()
        if content not in places:
            places[content] = len(kept)
            kept.append(Blob(np.frombuffer(content, np.uint8)))
        return places[content]

    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            tensor.buffer = place(tensor.buffer)
    metadata = [entry for entry in model.metadata or [] if entry.name in KEPT_METADATA]
    for entry in metadata:
        entry.buffer = place(entry.buffer)
    if facts is not None:
        entry = schema.MetadataT()
        entry.name, entry.buffer = METADATA.encode(), len(kept)
        kept.append(Blob(np.frombuffer(facts, np.uint8)))
        metadata.append(entry)
    model.metadata, model.metadataBuffer, model.buffers = metadata, None, kept


def _described(graph: Graph) -> bytes:
    facts = {
        "labels": list(graph.labels),
        "preprocessing": {name: asdict(how) for name, how in graph.preprocessing.items()},
    }
    return json.dumps(facts, ensure_ascii=False).encode()


def constant(schema: Any, model: Any, tensor: Any) -> np.ndarray[Any, Any] | None:
    """A stored tensor's values, those of 4 bits as int8; None for a computed one, or a dtype that NumPy lacks."""
    data = model.buffers[tensor.buffer].data
    dtype = dtypes(schema).get(tensor.type)
    if data is None or len(data) == 0 or dtype is None:
        return None
    shape = [] if tensor.shape is None else [int(size) for size in tensor.shape]
    if tensor.type == schema.TensorType.INT4:
        return unpacked(np.asarray(data, np.uint8), shape)
    values = np.asarray(data, np.uint8).view(dtype)
    return values.reshape(shape) if tensor.sparsity is None else unfolded(tensor, values)


def unfolded(tensor: Any, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The weight that a sparse tensor stands for: along its last axis only what is not 0 is stored."""
    last = tensor.sparsity.dimMetadata[-1]
    starts, columns = (np.asarray(vector.values) for vector in (last.arraySegments, last.arrayIndices))
    shape = [int(size) for size in tensor.shape]
    found = np.zeros((math.prod(shape[:-1]), shape[-1]), values.dtype)
    found[np.repeat(np.arange(len(found)), np.diff(starts)), columns] = values
    return found.reshape(shape)


def dtypes(schema: Any) -> dict[int, np.dtype[Any]]:
    """TFLite's number of a type → NumPy's."""
    names = ("FLOAT32", "FLOAT16", "FLOAT64", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT32", "BOOL")
    found = {getattr(schema.TensorType, name): np.dtype(name.lower()) for name in names}
    return {**found, schema.TensorType.INT4: np.dtype(np.int8)}  # unpacked


def _bytes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
