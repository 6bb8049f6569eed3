"""Integer operators in the flatbuffer: a float operator between DEQUANTIZE and QUANTIZE becomes one of integers.

The converter writes the simulation's pairs of quantize / dequantize where they stand, with weights as floats that lie
on their grid. Operators that only move values pass the integers on, so that their DEQUANTIZE comes later or never.

Follows TFLite's specification of 8-bit quantization: weights from −127 to 127 per channel with zero point 0, biases of
32 bits in the product of the two steps, concatenations in one grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepack.export._tflite_file import constant, used_only

Array = np.ndarray[Any, Any]
INT8_MIN, INT8_MAX, INT32_MAX = -128, 127, 2**31 - 1
ACTIVATION = "fusedActivationFunction"

# Operator → place of the value it moves; those that compute nothing.
MOVES = {
    "RESHAPE": 0, "TRANSPOSE": 0, "SQUEEZE": 0, "EXPAND_DIMS": 0, "STRIDED_SLICE": 0, "SLICE": 0, "SPLIT": 1,
    "SPLIT_V": 0, "GATHER": 0, "PAD": 0, "PADV2": 0, "MAX_POOL_2D": 0, "BROADCAST_TO": 0, "TILE": 0,
    "DEPTH_TO_SPACE": 0, "SPACE_TO_DEPTH": 0, "RESIZE_NEAREST_NEIGHBOR": 0,
}  # fmt: skip
# Operator with a weight → axis of output channels in it.
WEIGHTED = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
COMPUTED = frozenset({"ADD", "SUB", "MUL", "MEAN", "CONCATENATION", "LEAKY_RELU", "AVERAGE_POOL_2D"})
SAME_GRID = frozenset({"CONCATENATION", "AVERAGE_POOL_2D"})
# The first version of each operator that takes int8 (weights per channel, of those that have them).
VERSIONS = {
    "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "RESHAPE": 1, "SQUEEZE": 1, "EXPAND_DIMS": 1,
    "MUL": 2, "SUB": 2, "SPACE_TO_DEPTH": 2, "DEPTH_TO_SPACE": 2,
}  # fmt: skip
HYBRID_VERSIONS = {"CONV_2D": 5, "DEPTHWISE_CONV_2D": 6, "FULLY_CONNECTED": 12}
LIKENESS = 1e-3  # of a step; how far a float weight of the file may be from its integer


@dataclass(frozen=True)
class Weight:
    """A planned weight, output channels first, as PyTorch has it.

    Attributes:
        form: of the activations it meets: ``static``, ``dynamic`` or ``float``.
        readers: operators that read it.
    """

    name: str
    integers: Array
    scale: Array
    form: str = "static"
    readers: int = 1

    def stored(self, values: Array, axis: int) -> tuple[Array, Array] | None:
        """Integers and scales of a weight of the file if it is this one, up to a factor per channel."""
        if values.size != self.integers.size or values.shape[axis] != self.integers.shape[0]:
            return None
        last = np.moveaxis(self.integers, 1, -1) if self.integers.ndim > 1 else self.integers
        whole = (np.moveaxis(last, 0, -1) if axis else last).reshape(values.shape)
        tall = [-1 if place == axis else 1 for place in range(values.ndim)]
        if np.array_equal(whole * self.scale.astype(np.float32).reshape(tall), values):
            return whole, self.scale
        return _rescaled(whole, values, axis)


def _rescaled(whole: Array, values: Array, axis: int) -> tuple[Array, Array] | None:
    rows, floats = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (whole, values))
    place = np.abs(rows.astype(np.int16)).argmax(1)[:, None]
    top, bottom = np.take_along_axis(floats, place, 1), np.take_along_axis(rows, place, 1).astype(np.float64)
    factor = np.divide(top, bottom, out=np.ones_like(bottom), where=bottom != 0)
    if (factor == 0).any() or np.abs(floats / factor - rows).max(initial=0.0) > LIKENESS:
        return None
    sign = np.moveaxis(np.sign(factor).astype(np.int8).reshape(-1, *[1] * (whole.ndim - 1)), 0, axis)
    return whole * sign, np.abs(factor[:, 0]).astype(np.float32)


def quantize(schema: Any, model: Any, weights: Sequence[Weight]) -> None:
    """Change a model in place."""
    (main,) = model.subgraphs
    _Rewriter(schema, model, main, weights).run()


@dataclass(eq=False)
class _Rewriter:
    schema: Any
    model: Any
    main: Any
    weights: Sequence[Weight]
    twins: dict[int, int] = field(default_factory=dict)  # float tensor → the integers it stands for
    made: list[Any] = field(default_factory=list)
    words: dict[int, str] = field(default_factory=dict)
    shared: dict[tuple[int, str], int] = field(default_factory=dict)

    def run(self) -> None:
        self.words = {
            number: name for name, number in vars(self.schema.BuiltinOperator).items() if not name.startswith("_")
        }
        for operator in self.main.operators:
            operator.inputs, operator.outputs = ([int(t) for t in side] for side in (operator.inputs, operator.outputs))
        while self._quantize_earlier():
            pass
        for operator in list(self.main.operators):
            self._visit(operator)
        self._drop_dead()
        used_only(self.model)

    def _word(self, operator: Any) -> str:
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self.words[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def _readers(self) -> dict[int, list[Any]]:
        readers = defaultdict(list)
        for operator in self.main.operators:
            for tensor in operator.inputs:
                readers[int(tensor)].append(operator)
        for tensor in self.main.outputs:
            readers[int(tensor)].append(None)
        return readers

    def _quantize_earlier(self) -> bool:
        """operator → move → QUANTIZE becomes operator → QUANTIZE → move."""
        makers = {int(tensor): operator for operator in self.main.operators for tensor in operator.outputs}
        readers = self._readers()
        for operator in self.main.operators:
            move = makers.get(int(operator.inputs[0])) if self._word(operator) == "QUANTIZE" else None
            if move is None or not self._movable(move) or len(readers[int(move.outputs[0])]) != 1:
                continue
            place = MOVES[self._word(move)]
            source, stored = int(move.inputs[place]), int(operator.outputs[0])
            before = makers.get(source)
            # Padding with minus infinity has no integers of its own; see below.
            if before is None or self._word(before) in ("DEQUANTIZE", "PADV2") or len(readers[source]) != 1:
                continue
            early = self._like(source, stored)
            operator.inputs, operator.outputs = [source], [early]
            move.inputs[place] = early
            move.outputs = [stored]
            order = self.main.operators
            one, two = order.index(move), order.index(operator)
            order[one], order[two] = operator, move
            return True
        return False

    def _movable(self, operator: Any) -> bool:
        word = self._word(operator)
        if word not in MOVES or len(operator.outputs) != 1 or word == "PADV2":
            return False
        return not getattr(operator.builtinOptions, ACTIVATION, None)

    def _visit(self, operator: Any) -> None:
        word = self._word(operator)
        if word == "DEQUANTIZE" and self._type(operator.inputs[0]) == self.schema.TensorType.INT8:
            self.twins[int(operator.outputs[0])] = int(operator.inputs[0])
        elif word == "QUANTIZE":
            self._quantized(operator)
            return
        elif self._moves(operator, word):
            return
        elif word in WEIGHTED:
            self._hybrid(operator, word)
        self.made.append(operator)

    def _quantized(self, operator: Any) -> None:
        source, stored = int(operator.inputs[0]), int(operator.outputs[0])
        if source in self.twins:
            if self._grid(self.twins[source]) == self._grid(stored):
                self._replace(stored, self.twins[source])
                return
            operator.inputs = [self.twins[source]]
            self._version(operator, 2)
        elif (maker := self._maker(source)) is not None and self._computes(maker, stored):
            self.twins[source] = stored
            self.made.append(self._dequantize(stored, source))
            return
        self.made.append(operator)

    def _maker(self, tensor: int) -> Any:
        return next((operator for operator in self.made if tensor in [int(t) for t in operator.outputs]), None)

    def _computes(self, operator: Any, stored: int) -> bool:
        """Let an operator compute integers; False where it cannot."""
        word = self._word(operator)
        if word in WEIGHTED:
            if not self._weighted(operator, word, stored):
                return False
        elif word not in COMPUTED or not self._all_integer(operator, word, stored):
            return False
        else:
            operator.inputs = [self.twins.get(int(tensor), int(tensor)) for tensor in operator.inputs]
            self._version(operator, VERSIONS.get(word, 2))
        operator.outputs = [stored]
        return True

    def _all_integer(self, operator: Any, word: str, stored: int) -> bool:
        floats = [int(t) for t in operator.inputs if self._type(t) == self.schema.TensorType.FLOAT32]
        if not all(tensor in self.twins for tensor in floats):
            return False
        return word not in SAME_GRID or all(self._grid(self.twins[tensor]) == self._grid(stored) for tensor in floats)

    def _weighted(self, operator: Any, word: str, stored: int) -> bool:
        source = self.twins.get(int(operator.inputs[0]))
        found = None if source is None else self._planned(operator, word, "static")
        if source is None or found is None:
            return False
        integers, scale = found
        axis = WEIGHTED[word]
        weight = self._constant(integers, scale, axis, int(operator.inputs[1]))
        steps = (scale * np.float32(self._grid(source)[0])).astype(np.float32)
        bias = self._bias(operator, steps)
        operator.inputs = [source, weight, bias]
        self._version(operator, VERSIONS[word])
        return True

    def _planned(self, operator: Any, word: str, *forms: str) -> tuple[Array, Array] | None:
        values = constant(self.schema, self.model, self.main.tensors[int(operator.inputs[1])])
        if values is None or values.dtype != np.float32:
            return None
        matches = (weight.stored(values, WEIGHTED[word]) for weight in self.weights if weight.form in forms)
        return next((match for match in matches if match is not None), None)

    def _bias(self, operator: Any, steps: Array) -> int:
        place = int(operator.inputs[2]) if len(operator.inputs) > 2 else -1
        values = np.zeros(len(steps)) if place < 0 else constant(self.schema, self.model, self.main.tensors[place])
        if values is None:
            raise AssertionError("a bias is computed")
        whole = np.clip(np.rint(values.astype(np.float64) / steps), -INT32_MAX, INT32_MAX).astype(np.int32)
        return self._tensor(list(whole.shape), self.schema.TensorType.INT32, (steps, np.zeros(len(steps)), 0), whole)

    def _hybrid(self, operator: Any, word: str) -> None:
        """Integer weights for an operator that reads floats: rounded by the engine, or the weights made floats."""
        axis, place = WEIGHTED[word], int(operator.inputs[1])
        dynamic = self._planned(operator, word, "dynamic")
        found = dynamic or self._planned(operator, word, "float")
        if found is None:
            return
        weight = self._constant(*found, axis, place)
        if dynamic is not None:
            operator.inputs[1] = weight
            self._version(operator, HYBRID_VERSIONS[word])
            if word == "FULLY_CONNECTED":
                operator.builtinOptions.asymmetricQuantizeInputs = True
        elif place not in self.twins:
            self.twins[place] = weight
            self.made.append(self._dequantize(weight, place))
            self.main.tensors[place].buffer = 0

    def _moves(self, operator: Any, word: str) -> bool:
        place = MOVES.get(word, 0)
        twin = self.twins.get(int(operator.inputs[place]))
        picks = self._picks(operator, word)
        if twin is None or not (word in MOVES or picks) or getattr(operator.builtinOptions, ACTIVATION, None):
            return False
        if word == "PADV2" and not self._pads_lowest(operator, twin):
            return False
        operator.inputs[place] = twin
        if picks:
            self._pick(operator, word, twin)
        outputs = [int(tensor) for tensor in operator.outputs]
        operator.outputs = [self._like(tensor, twin) for tensor in outputs]
        if word != "PADV2":
            self._version(operator, VERSIONS.get(word, 2))
        self.made.append(operator)
        for tensor, integers in zip(outputs, operator.outputs, strict=True):
            self.twins[tensor] = integers
            self.made.append(self._dequantize(integers, tensor))
        return True

    def _picks(self, operator: Any, word: str) -> bool:
        """Whether a convolution only puts single values into places."""
        if word not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            return False
        weight, bias = (constant(self.schema, self.model, self.main.tensors[place]) for place in operator.inputs[1:3])
        if weight is None or np.any(bias) or not np.isin(weight, (0, 1)).all():
            return False
        return bool(
            (np.moveaxis(weight, WEIGHTED[word], 0).reshape(weight.shape[WEIGHTED[word]], -1).sum(1) <= 1).all()
        )

    def _pick(self, operator: Any, word: str, twin: int) -> None:
        place, axis = operator.inputs[1], WEIGHTED[word]
        weight = constant(self.schema, self.model, self.main.tensors[place])
        assert weight is not None
        one = np.full(weight.shape[axis], np.float32(1 / INT8_MAX), np.float32)
        integers = self._constant((weight * INT8_MAX).astype(np.int8), one, axis, place)
        operator.inputs = [twin, integers, self._bias(operator, one * np.float32(self._grid(twin)[0]))]

    def _pads_lowest(self, operator: Any, twin: int) -> bool:
        """Minus infinity, before a maximum, is the smallest integer."""
        values = constant(self.schema, self.model, self.main.tensors[int(operator.inputs[2])])
        readers = self._readers()[int(operator.outputs[0])]
        if values is None or any(reader is None or self._word(reader) != "MAX_POOL_2D" for reader in readers):
            return False
        scale, zero = self._grid(twin)
        if float(values) > (INT8_MIN - zero) * scale:
            return False
        if zero == INT8_MIN:  # PAD fills with the zero point, and XNNPACK knows it
            operator.opcodeIndex = self._code("PAD", 2)
            ends = constant(self.schema, self.model, self.main.tensors[operator.inputs[1]])
            assert ends is not None
            operator.inputs = [operator.inputs[0], self._numbers(ends)]
            operator.builtinOptionsType = self.schema.BuiltinOptions.PadOptions
            operator.builtinOptions = self.schema.PadOptionsT()
        else:
            low = np.full(1, INT8_MIN, np.int8).reshape(values.shape)
            operator.inputs[2] = self._tensor(
                list(low.shape), self.schema.TensorType.INT8, (np.array([scale]), np.array([zero]), 0), low
            )
            self._version(operator, 2)
        return True

    def _constant(self, integers: Array, scale: Array, axis: int, place: int) -> int:
        key = (place, scale.tobytes().hex())
        if key not in self.shared:
            quantization = (scale, np.zeros(len(scale)), axis)
            self.shared[key] = self._tensor(
                list(integers.shape), self.schema.TensorType.INT8, quantization, np.ascontiguousarray(integers)
            )
        return self.shared[key]

    def _numbers(self, values: Array) -> int:
        """Paddings: XNNPACK reads those of 32 bits."""
        buffer, tensor = self.schema.BufferT(), self.schema.TensorT()
        buffer.data = np.frombuffer(values.astype(np.int32).tobytes(), np.uint8)
        tensor.shape, tensor.type = list(values.shape), self.schema.TensorType.INT32
        tensor.buffer = len(self.model.buffers)
        self.model.buffers.append(buffer)
        self.main.tensors.append(tensor)
        return len(self.main.tensors) - 1

    def _tensor(self, shape: list[int], kind: int, quantization: tuple[Array, Array, int], values: Array) -> int:
        tensor, buffer = self.schema.TensorT(), self.schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        tensor.shape, tensor.type, tensor.buffer = shape, kind, len(self.model.buffers)
        tensor.quantization = self.schema.QuantizationParametersT()
        scale, zero, axis = quantization
        tensor.quantization.scale = np.asarray(scale, np.float32)
        tensor.quantization.zeroPoint = np.asarray(zero, np.int64)
        tensor.quantization.quantizedDimension = axis
        self.model.buffers.append(buffer)
        self.main.tensors.append(tensor)
        return len(self.main.tensors) - 1

    def _like(self, shape_of: int, grid_of: int) -> int:
        """A computed tensor of integers."""
        tensor = self.schema.TensorT()
        tensor.shape, tensor.shapeSignature = (
            self.main.tensors[shape_of].shape,
            self.main.tensors[shape_of].shapeSignature,
        )
        tensor.type, tensor.buffer = self.schema.TensorType.INT8, 0
        tensor.quantization = self.main.tensors[grid_of].quantization
        self.main.tensors.append(tensor)
        return len(self.main.tensors) - 1

    def _dequantize(self, source: int, target: int) -> Any:
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._code("DEQUANTIZE", 2)
        operator.inputs, operator.outputs = [source], [target]
        operator.builtinOptionsType = self.schema.BuiltinOptions.DequantizeOptions
        operator.builtinOptions = self.schema.DequantizeOptionsT()
        return operator

    def _code(self, word: str, version: int) -> int:
        number = getattr(self.schema.BuiltinOperator, word)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                code.version = max(code.version, version)
                return index
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def _version(self, operator: Any, least: int) -> None:
        code = self.model.operatorCodes[operator.opcodeIndex]
        code.version = max(code.version, least)

    def _type(self, tensor: Any) -> Any:
        return None if tensor < 0 else self.main.tensors[int(tensor)].type

    def _grid(self, tensor: int) -> tuple[float, int]:
        quantization = self.main.tensors[tensor].quantization
        return float(quantization.scale[0]), int(quantization.zeroPoint[0])

    def _replace(self, old: int, new: int) -> None:
        for operator in self.main.operators:
            operator.inputs = [new if int(tensor) == old else int(tensor) for tensor in operator.inputs]
        self.main.outputs = [new if int(tensor) == old else int(tensor) for tensor in self.main.outputs]

    def _drop_dead(self) -> None:
        alive = {int(tensor) for tensor in self.main.outputs}
        kept = []
        for operator in reversed(self.made):
            if any(int(tensor) in alive for tensor in operator.outputs):
                kept.append(operator)
                alive |= {int(tensor) for tensor in operator.inputs}
        self.main.operators = kept[::-1]
