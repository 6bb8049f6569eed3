"""A flatbuffer's model, taken apart: what its tensors and operators are, and new ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepack.export._packed import fits, nibbles
from edgepack.export._tflite_file import constant

Array = np.ndarray[Any, Any]


@dataclass(eq=False)
class Model:
    """The main graph of a model, to be changed in place.

    Attributes:
        schema: the classes of the format.
        model: the whole model.
        packed: store weights that fit 4 bits two in a byte.
        shared: new constants, by the one they stand for and their scales.
    """

    schema: Any
    model: Any
    packed: bool = False
    shared: dict[tuple[int, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.main,) = self.model.subgraphs
        self.kinds = self.schema.TensorType
        self.words: dict[int, str] = {
            number: name for name, number in vars(self.schema.BuiltinOperator).items() if not name.startswith("_")
        }

    def word(self, operator: Any) -> str:
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self.words[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def readers(self) -> dict[int, list[Any]]:
        readers = defaultdict(list)
        for operator in self.main.operators:
            for tensor in operator.inputs:
                readers[int(tensor)].append(operator)
        for tensor in self.main.outputs:
            readers[int(tensor)].append(None)
        return readers

    def constant(self, integers: Array, scale: Array, axis: int, place: int) -> int:
        key = (place, scale.tobytes().hex())
        if key not in self.shared:
            four = self.packed and fits(integers)
            kind, values = (self.kinds.INT4, nibbles(integers)) if four else (self.kinds.INT8, integers)
            self.shared[key] = self.tensor(list(integers.shape), kind, (scale, axis), values)
        return self.shared[key]

    def numbers(self, values: Array) -> int:
        """Paddings: XNNPACK reads those of 32 bits."""
        buffer, tensor = self.schema.BufferT(), self.schema.TensorT()
        buffer.data = np.frombuffer(values.astype(np.int32).tobytes(), np.uint8)
        tensor.shape, tensor.type = list(values.shape), self.kinds.INT32
        tensor.buffer = len(self.model.buffers)
        self.model.buffers.append(buffer)
        self.main.tensors.append(tensor)
        return len(self.main.tensors) - 1

    def tensor(self, shape: list[int], kind: int, scales: tuple[Array, int], values: Array, zero: int = 0) -> int:
        """A new constant; ``scales`` are along an axis."""
        tensor, buffer = self.schema.TensorT(), self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        tensor.shape, tensor.type, tensor.buffer = shape, kind, len(self.model.buffers)
        tensor.quantization = self.schema.QuantizationParametersT()
        tensor.quantization.scale = np.asarray(scales[0], np.float32)
        tensor.quantization.zeroPoint = np.full(len(scales[0]), zero, np.int64)
        tensor.quantization.quantizedDimension = scales[1]
        self.model.buffers.append(buffer)
        self.main.tensors.append(tensor)
        return len(self.main.tensors) - 1

    def like(self, shape_of: int, grid_of: int) -> int:
        """A computed tensor of integers."""
        tensor = self.schema.TensorT()
        tensor.shape, tensor.shapeSignature = (
            self.main.tensors[shape_of].shape,
            self.main.tensors[shape_of].shapeSignature,
        )
        tensor.type, tensor.buffer = self.type(grid_of), 0
        tensor.quantization = self.main.tensors[grid_of].quantization
        self.main.tensors.append(tensor)
        return len(self.main.tensors) - 1

    def dequantize(self, source: int, target: int) -> Any:
        operator = self.schema.OperatorT()
        versions = {self.kinds.INT4: 6, self.kinds.INT16: 3}
        operator.opcodeIndex = self.code("DEQUANTIZE", versions.get(self.type(source), 2))
        operator.inputs, operator.outputs = [source], [target]
        operator.builtinOptionsType = self.schema.BuiltinOptions.DequantizeOptions
        operator.builtinOptions = self.schema.DequantizeOptionsT()
        return operator

    def code(self, word: str, version: int) -> int:
        number = getattr(self.schema.BuiltinOperator, word)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                code.version = max(code.version, version)
                return index
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def version(self, operator: Any, least: int) -> None:
        code = self.model.operatorCodes[operator.opcodeIndex]
        code.version = max(code.version, least)

    def values(self, tensor: Any) -> Array | None:
        """A stored tensor's values; None for a computed one."""
        return constant(self.schema, self.model, self.main.tensors[int(tensor)])

    def type(self, tensor: Any) -> Any:
        return None if tensor < 0 else self.main.tensors[int(tensor)].type

    def grid(self, tensor: int) -> tuple[float, int]:
        quantization = self.main.tensors[tensor].quantization
        return float(quantization.scale[0]), int(quantization.zeroPoint[0])

    def replace(self, old: int, new: int) -> None:
        for operator in self.main.operators:
            operator.inputs = [new if int(tensor) == old else int(tensor) for tensor in operator.inputs]
        self.main.outputs = [new if int(tensor) == old else int(tensor) for tensor in self.main.outputs]
