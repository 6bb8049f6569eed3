"""Integer operators in the flatbuffer: a float operator between DEQUANTIZE and QUANTIZE becomes one of integers.

The converter writes the simulation's pairs of quantize / dequantize where they stand, with weights as floats that lie
on their grid. Operators that only move values pass the integers on, so that their DEQUANTIZE comes later or never.

Follows TFLite's specification of 8-bit quantization: weights from −127 to 127 per channel with zero point 0, biases of
32 bits in the product of the two steps, concatenations in one grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepack.export._tflite_concatenations import join_by_fives
from edgepack.export._tflite_ends import drowned
from edgepack.export._tflite_file import used_only
from edgepack.export._tflite_model import Model
from edgepack.export._tflite_weights import Weight

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
COMPUTED = frozenset({"ADD", "SUB", "MUL", "LOGISTIC", "MEAN", "CONCATENATION", "LEAKY_RELU", "AVERAGE_POOL_2D"})
SAME_GRID = frozenset({"CONCATENATION", "AVERAGE_POOL_2D"})
# The first version of each operator that takes int8 (weights per channel, of those that have them).
VERSIONS = {
    "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "RESHAPE": 1, "SQUEEZE": 1, "EXPAND_DIMS": 1,
    "MUL": 2, "SUB": 2, "SPACE_TO_DEPTH": 2, "DEPTH_TO_SPACE": 2,
}  # fmt: skip
# Of those that take int16; what else moves integers of 16 bits stays float.
WIDE_VERSIONS = {
    "CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 12, "ADD": 4, "RESHAPE": 1, "TRANSPOSE": 4, "PAD": 3,
    "STRIDED_SLICE": 4, "MAX_POOL_2D": 3, "QUANTIZE": 3,
}  # fmt: skip
HYBRID_VERSIONS = {"CONV_2D": 5, "DEPTHWISE_CONV_2D": 6, "FULLY_CONNECTED": 12}


def quantize(schema: Any, model: Any, weights: Sequence[Weight], packed: bool = False) -> None:
    """Change a model in place; ``packed`` stores weights that fit 4 bits two in a byte."""
    _Rewriter(Model(schema, model, packed), weights).run()


@dataclass(eq=False)
class _Rewriter:
    file: Model
    weights: Sequence[Weight]
    twins: dict[int, int] = field(default_factory=dict)  # float tensor → the integers it stands for
    made: list[Any] = field(default_factory=list)
    readers: dict[int, list[Any]] = field(default_factory=dict)

    def run(self) -> None:
        for operator in self.file.main.operators:
            operator.inputs, operator.outputs = ([int(t) for t in side] for side in (operator.inputs, operator.outputs))
        while self._quantize_earlier():
            pass
        self.readers = self.file.readers()
        for operator in list(self.file.main.operators):
            self._visit(operator)
        self._drop_dead()
        join_by_fives(self.file)
        used_only(self.file.model)

    def _quantize_earlier(self) -> bool:
        """operator → move → QUANTIZE becomes operator → QUANTIZE → move."""
        makers = {int(tensor): operator for operator in self.file.main.operators for tensor in operator.outputs}
        readers = self.file.readers()
        for operator in self.file.main.operators:
            move = makers.get(int(operator.inputs[0])) if self.file.word(operator) == "QUANTIZE" else None
            if move is None or not self._movable(move) or len(readers[int(move.outputs[0])]) != 1:
                continue
            place = MOVES[self.file.word(move)]
            source, stored = int(move.inputs[place]), int(operator.outputs[0])
            before = makers.get(source)
            # Padding with minus infinity has no integers of its own; see below.
            if before is None or self.file.word(before) in ("DEQUANTIZE", "PADV2") or len(readers[source]) != 1:
                continue
            early = self.file.like(source, stored)
            operator.inputs, operator.outputs = [source], [early]
            move.inputs[place] = early
            move.outputs = [stored]
            order = self.file.main.operators
            one, two = order.index(move), order.index(operator)
            order[one], order[two] = operator, move
            return True
        return False

    def _movable(self, operator: Any) -> bool:
        word = self.file.word(operator)
        if word not in MOVES or len(operator.outputs) != 1 or word == "PADV2":
            return False
        return not getattr(operator.builtinOptions, ACTIVATION, None)

    def _visit(self, operator: Any) -> None:
        word = self.file.word(operator)
        if word == "DEQUANTIZE" and self.file.type(operator.inputs[0]) in (self.file.kinds.INT8, self.file.kinds.INT16):
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
            if self.file.grid(self.twins[source]) == self.file.grid(stored):
                self.file.replace(stored, self.twins[source])
                return
            operator.inputs = [self.twins[source]]
            self._version(operator, "QUANTIZE", stored)
        elif (maker := self._maker(source)) is not None and self._takes_over(maker, source, stored):
            return
        self.made.append(operator)

    def _takes_over(self, maker: Any, source: int, stored: int) -> bool:
        """Let an operator compute integers; once more in float for readers that want another grid.

        The converter computes once what the simulation does twice.
        """
        if len(self.readers[source]) > 1:
            again = copy(maker)
            if self._computes(again, stored):
                self.made.append(again)
                return True
            return False
        if not self._computes(maker, stored):
            return False
        self.twins[source] = stored
        self.made.append(self.file.dequantize(stored, source))
        return True

    def _maker(self, tensor: int) -> Any:
        return next((operator for operator in self.made if tensor in [int(t) for t in operator.outputs]), None)

    def _computes(self, operator: Any, stored: int) -> bool:
        """Let an operator compute integers; False where it cannot."""
        word = self.file.word(operator)
        if word in WEIGHTED:
            if not self._weighted(operator, word, stored):
                return False
        elif word not in COMPUTED or not self._all_integer(operator, word, stored):
            return False
        else:
            operator.inputs = [self.twins.get(int(tensor), int(tensor)) for tensor in operator.inputs]
            self._version(operator, word, stored)
            if word == "ADD" and self._wide(stored):
                operator.builtinOptions.potScaleInt16 = False  # or TFLite wants one part to have the sum's own step
        operator.outputs = [stored]
        return True

    def _all_integer(self, operator: Any, word: str, stored: int) -> bool:
        floats = [int(t) for t in operator.inputs if self.file.type(t) == self.file.kinds.FLOAT32]
        if not all(tensor in self.twins for tensor in floats):
            return False
        if self._wide(stored):
            return word in WIDE_VERSIONS
        if word == "ADD" and any(drowned(self.file.grid(self.twins[t])[0], self.file.grid(stored)[0]) for t in floats):
            return False
        return word not in SAME_GRID or all(
            self.file.grid(self.twins[tensor]) == self.file.grid(stored) for tensor in floats
        )

    def _weighted(self, operator: Any, word: str, stored: int) -> bool:
        source = self.twins.get(int(operator.inputs[0]))
        found = None if source is None else self._planned(operator, word, "static")
        if source is None or found is None:
            return False
        integers, scale = found
        axis = WEIGHTED[word]
        weight = self.file.constant(integers, scale, axis, int(operator.inputs[1]))
        steps = (scale * np.float32(self.file.grid(source)[0])).astype(np.float32)
        bias = self._bias(operator, steps, self._wide(source))
        operator.inputs = [source, weight, bias]
        self._version(operator, word, source)
        return True

    def _wide(self, tensor: int) -> bool:
        """Whether integers are of 16 bits."""
        return bool(self.file.type(tensor) == self.file.kinds.INT16)

    def _version(self, operator: Any, word: str, tensor: int) -> None:
        """Of an operator that computes integers such as this tensor's."""
        self.file.version(operator, WIDE_VERSIONS[word] if self._wide(tensor) else VERSIONS.get(word, 2))

    def _planned(self, operator: Any, word: str, *forms: str) -> tuple[Array, Array] | None:
        values = self.file.values(int(operator.inputs[1]))
        if values is None or values.dtype != np.float32:
            return None
        matches = (weight.stored(values, WEIGHTED[word]) for weight in self.weights if weight.form in forms)
        return next((match for match in matches if match is not None), None)

    def _bias(self, operator: Any, steps: Array, wide: bool = False) -> int:
        place = int(operator.inputs[2]) if len(operator.inputs) > 2 else -1
        values = np.zeros(len(steps)) if place < 0 else self.file.values(place)
        if values is None:
            raise AssertionError("a bias is computed")
        whole = np.clip(np.rint(values.astype(np.float64) / steps), -INT32_MAX, INT32_MAX)
        kind, dtype = (self.file.kinds.INT64, np.int64) if wide else (self.file.kinds.INT32, np.int32)
        return self.file.tensor(list(whole.shape), kind, (steps, 0), whole.astype(dtype))

    def _hybrid(self, operator: Any, word: str) -> None:
        """Integer weights for an operator that reads floats: rounded by the engine, or the weights made floats."""
        axis, place = WEIGHTED[word], int(operator.inputs[1])
        dynamic = self._planned(operator, word, "dynamic")
        found = dynamic or self._planned(operator, word, "float")
        if found is None:
            return
        weight = self.file.constant(*found, axis, place)
        if dynamic is not None:
            operator.inputs[1] = weight
            self.file.version(operator, HYBRID_VERSIONS[word])
            if word == "FULLY_CONNECTED":
                operator.builtinOptions.asymmetricQuantizeInputs = True
        elif place not in self.twins:
            self.twins[place] = weight
            self.made.append(self.file.dequantize(weight, place))
            self.file.main.tensors[place].buffer = 0

    def _moves(self, operator: Any, word: str) -> bool:
        place = MOVES.get(word, 0)
        twin = self.twins.get(int(operator.inputs[place]))
        picks = self._picks(operator, word)
        if twin is None or not (word in MOVES or picks) or getattr(operator.builtinOptions, ACTIVATION, None):
            return False
        if self._wide(twin) and word not in WIDE_VERSIONS:
            return False
        if word == "PADV2" and not self._pads_lowest(operator, twin):
            return False
        operator.inputs[place] = twin
        if picks:
            self._pick(operator, word, twin)
        outputs = [int(tensor) for tensor in operator.outputs]
        operator.outputs = [self.file.like(tensor, twin) for tensor in outputs]
        if word != "PADV2":
            self._version(operator, word, twin)
        self.made.append(operator)
        for tensor, integers in zip(outputs, operator.outputs, strict=True):
            self.twins[tensor] = integers
            self.made.append(self.file.dequantize(integers, tensor))
        return True

    def _picks(self, operator: Any, word: str) -> bool:
        """Whether a convolution only puts single values into places."""
        if word not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            return False
        weight, bias = (self.file.values(place) for place in operator.inputs[1:3])
        if weight is None or np.any(bias) or not np.isin(weight, (0, 1)).all():
            return False
        return bool(
            (np.moveaxis(weight, WEIGHTED[word], 0).reshape(weight.shape[WEIGHTED[word]], -1).sum(1) <= 1).all()
        )

    def _pick(self, operator: Any, word: str, twin: int) -> None:
        place, axis = operator.inputs[1], WEIGHTED[word]
        weight = self.file.values(place)
        assert weight is not None
        whole = 1 if self._wide(twin) else INT8_MAX  # 16-bit steps are multiplied exactly by powers of two alone
        one = np.full(weight.shape[axis], np.float32(1 / whole), np.float32)
        integers = self.file.constant((weight * whole).astype(np.int8), one, axis, place)
        steps = one * np.float32(self.file.grid(twin)[0])
        operator.inputs = [twin, integers, self._bias(operator, steps, self._wide(twin))]

    def _pads_lowest(self, operator: Any, twin: int) -> bool:
        """Minus infinity, before a maximum, is the smallest integer."""
        values = self.file.values(int(operator.inputs[2]))
        readers = self.file.readers()[int(operator.outputs[0])]
        if values is None or any(reader is None or self.file.word(reader) != "MAX_POOL_2D" for reader in readers):
            return False
        scale, zero = self.file.grid(twin)
        if float(values) > (INT8_MIN - zero) * scale:
            return False
        if zero == INT8_MIN:  # PAD fills with the zero point, and XNNPACK knows it
            operator.opcodeIndex = self.file.code("PAD", 2)
            ends = self.file.values(operator.inputs[1])
            assert ends is not None
            operator.inputs = [operator.inputs[0], self.file.numbers(ends)]
            operator.builtinOptionsType = self.file.schema.BuiltinOptions.PadOptions
            operator.builtinOptions = self.file.schema.PadOptionsT()
        else:
            low = np.full(1, INT8_MIN, np.int8).reshape(values.shape)
            operator.inputs[2] = self.file.tensor(
                list(low.shape), self.file.kinds.INT8, (np.array([scale]), 0), low, zero
            )
            self.file.version(operator, 2)
        return True

    def _drop_dead(self) -> None:
        alive = {int(tensor) for tensor in self.file.main.outputs}
        kept = []
        for operator in reversed(self.made):
            if any(int(tensor) in alive for tensor in operator.outputs):
                kept.append(operator)
                alive |= {int(tensor) for tensor in operator.inputs}
        self.file.main.operators = kept[::-1]
