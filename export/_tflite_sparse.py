"""Weights full of zeros in the encoding of TFLite: what is not zero, row by row, behind a DENSIFY operator.

::

    weight → CONV_2D      becomes      what is not 0, and its columns → DENSIFY → CONV_2D

Every engine of the format unpacks it once, when the file is loaded. XNNPACK also takes it as the sign that it may
compute convolutions 1×1 from their non-zero weights alone; it then wants a global mean that keeps its axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgepack.export._tflite_model import Model
from edgepack.export._tflite_packing import Blob

Array = np.ndarray[Any, Any]
READERS = {"CONV_2D": 1, "FULLY_CONNECTED": 1, "DEQUANTIZE": 0}  # which of their inputs is the weight
WORTH = 0.9  # of the bytes that the dense weight takes; more is not worth an operator
INDICES = ((256, "Uint8Vector", np.uint8), (65536, "Uint16Vector", np.uint16))


def store_sparse(schema: Any, model: Any) -> None:
    """Encode the floating-point weights for which that is smaller, in place."""
    file = Model(schema, model)
    made, readers = [], file.readers()
    for operator in list(file.main.operators):
        slot = READERS.get(file.word(operator))
        index = -1 if slot is None else int(operator.inputs[slot])
        values = None if index < 0 or len(readers[index]) > 1 else file.values(index)
        if values is None or values.ndim < 2 or values.dtype not in (np.float32, np.float16):
            continue
        found = _encoded(file.schema, values)
        if found is not None:
            made.append(_densify(file, index, values, found))
    if made:
        file.main.operators = [*made, *file.main.operators]
        _keep_axes(file)


def _encoded(schema: Any, values: Array) -> tuple[Array, Any] | None:
    """What is not zero, and where; None where that takes hardly fewer bytes."""
    rows = values.reshape(-1, values.shape[-1])
    fitting = [entry for entry in INDICES if values.shape[-1] <= entry[0]]
    count = int(np.count_nonzero(rows))
    if not fitting or count == 0:
        return None
    _, name, dtype = fitting[0]
    size = count * (values.itemsize + np.dtype(dtype).itemsize) + 4 * (len(rows) + 1)
    if size > WORTH * values.nbytes:
        return None
    where, columns = np.nonzero(rows)
    starts = np.concatenate([[0], np.bincount(where, minlength=len(rows)).cumsum()])
    found = schema.SparsityParametersT()
    found.traversalOrder = list(range(values.ndim))
    found.dimMetadata = [_axis(schema, size) for size in values.shape[:-1]]
    last = schema.DimensionMetadataT()
    last.format = schema.DimensionType.SPARSE_CSR
    last.arraySegmentsType, last.arraySegments = _vector(schema, "Int32Vector", starts.astype(np.int32))
    last.arrayIndicesType, last.arrayIndices = _vector(schema, name, columns.astype(dtype))
    found.dimMetadata.append(last)
    return rows[where, columns], found


def _axis(schema: Any, size: int) -> Any:
    made = schema.DimensionMetadataT()
    made.format, made.denseSize = schema.DimensionType.DENSE, size
    return made


def _vector(schema: Any, name: str, values: Array) -> tuple[int, Any]:
    made = getattr(schema, f"{name}T")()
    made.values = values
    return getattr(schema.SparseIndexVector, name), made


def _densify(file: Model, index: int, values: Array, found: tuple[Array, Any]) -> Any:
    """The encoded weight as a tensor of its own; the tensor that was the weight is computed from it."""
    stored, sparsity = found
    weight, main = file.schema.TensorT(), file.main
    weight.shape, weight.type, weight.sparsity = main.tensors[index].shape, main.tensors[index].type, sparsity
    weight.buffer = len(file.model.buffers)
    file.model.buffers.append(Blob(np.frombuffer(stored.tobytes(), np.uint8)))
    main.tensors[index].buffer = 0
    main.tensors.append(weight)
    operator = file.schema.OperatorT()
    operator.opcodeIndex = file.code("DENSIFY", 1)
    operator.inputs, operator.outputs = [len(main.tensors) - 1], [index]
    operator.builtinOptionsType = file.schema.BuiltinOptions.DensifyOptions
    operator.builtinOptions = file.schema.DensifyOptionsT()
    return operator


def _keep_axes(file: Model) -> None:
    """MEAN over height and width keeps them, as 1, and a RESHAPE drops them."""
    found = []
    for operator in file.main.operators:
        found.append(operator)
        source, result = (file.main.tensors[int(ends[0])] for ends in (operator.inputs, operator.outputs))
        if file.word(operator) != "MEAN" or operator.builtinOptions.keepDims or len(source.shape) != 4:
            continue
        axes = sorted(int(axis) % 4 for axis in np.ravel(np.asarray(file.values(operator.inputs[1]))))
        if axes != [1, 2]:
            continue
        wide = file.schema.TensorT()
        wide.shape, wide.type, wide.buffer = [source.shape[0], 1, 1, source.shape[3]], result.type, 0
        place = len(file.main.tensors)
        file.main.tensors.append(wide)
        reshape = file.schema.OperatorT()
        reshape.opcodeIndex = file.code("RESHAPE", 1)
        shape = file.numbers(np.array(result.shape))
        reshape.inputs, reshape.outputs = [place, shape], list(operator.outputs)
        operator.outputs, operator.builtinOptions.keepDims = [place], True
        reshape.builtinOptionsType = file.schema.BuiltinOptions.ReshapeOptions
        reshape.builtinOptions = file.schema.ReshapeOptionsT()
        reshape.builtinOptions.newShape = [int(size) for size in result.shape]
        found.append(reshape)
    file.main.operators = found
