"""Weights of 4 bits in TFLite: tensors of type INT4, two values in a byte, read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgepack.errors import require
from edgepack.export._tflite_file import constant


def packed_values(data: bytes) -> Iterator[np.ndarray[Any, Any]]:
    """The values of a file's tensors of 4 bits."""
    schema = require("ai_edge_litert.schema_py_generated", "tflite")

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            values = constant(schema, model, tensor) if tensor.type == schema.TensorType.INT4 else None
            if values is not None:
                yield values
