"""A changed model as bytes again: buffers aligned, and every grid and its vectors written once.

The schema's own classes align nothing and write a zero point of eight bytes for each channel of each weight and bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepack.errors import Unsupported, require

ALIGNMENT = 16  # of every buffer, by the schema
IDENTIFIER = b"TFL3"
ROOM_BYTES = 1 << 16


@dataclass(frozen=True)
class Blob:
    """A buffer that is written aligned."""

    data: np.ndarray[Any, Any] | None = None

    def Pack(self, builder: Any) -> Any:
        schema = require("ai_edge_litert.schema_py_generated", "tflite")

        vector = None
        if self.data is not None:
            builder.StartVector(1, self.data.size, ALIGNMENT)
            builder.head -= self.data.size
            builder.Bytes[builder.head : builder.head + self.data.size] = self.data.tobytes()
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


@dataclass(frozen=True)
class _Grid:
    """Scales and zero points; ``written`` holds the places of what is in the file already, by content."""

    scale: np.ndarray[Any, Any]
    zero: np.ndarray[Any, Any]
    axis: int
    written: dict[Any, Any] = field(repr=False)

    def Pack(self, builder: Any) -> Any:
        schema = require("ai_edge_litert.schema_py_generated", "tflite")

        scale, zero = (self._vector(builder, values) for values in (self.scale, self.zero))
        key = scale, zero, self.axis
        if key not in self.written:
            schema.QuantizationParametersStart(builder)
            schema.QuantizationParametersAddScale(builder, scale)
            schema.QuantizationParametersAddZeroPoint(builder, zero)
            schema.QuantizationParametersAddQuantizedDimension(builder, self.axis)
            self.written[key] = schema.QuantizationParametersEnd(builder)
        return self.written[key]

    def _vector(self, builder: Any, values: np.ndarray[Any, Any]) -> Any:
        key = values.dtype.char, values.tobytes()
        if key not in self.written:
            self.written[key] = builder.CreateNumpyVector(values)
        return self.written[key]


def packed(model: Any) -> bytes:
    """The file.

    Raises:
        Unsupported: it would be larger than the format allows.
    """
    flatbuffers = require("flatbuffers", "tflite")

    written: dict[Any, Any] = {}
    for tensor in (tensor for subgraph in model.subgraphs for tensor in subgraph.tensors):
        tensor.quantization = _once(tensor.quantization, written)
    size_bytes = sum(blob.data.size + ALIGNMENT for blob in model.buffers if blob.data is not None)
    builder = flatbuffers.Builder(size_bytes + ROOM_BYTES)
    try:
        builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    except flatbuffers.builder.BuilderSizeError as error:
        raise Unsupported("a TFLite file holds at most 2 GiB", "export to openvino, or compress first") from error
    return bytes(builder.Output())


def _once(how: Any, written: dict[Any, Any]) -> _Grid | None:
    if how is None or how.scale is None or len(how.scale) == 0:
        return None
    return _Grid(
        np.asarray(how.scale, np.float32), np.asarray(how.zeroPoint, np.int64), how.quantizedDimension, written
    )
