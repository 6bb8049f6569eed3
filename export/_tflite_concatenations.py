"""Concatenations of as many values as XNNPACK joins at once.

The rest would be left to TFLite's own kernels, and the file divided there:

    a, b, c, d, e, f ── CONCATENATION   →   a, b ── CONCATENATION ─┐
                                            c, d, e, f ────────────┴─ CONCATENATION
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from math import prod
from typing import Any

from edgepack.export._tflite_model import Model

MOST = 5  # inputs


def join_by_fives(file: Model) -> None:
    """Join integers by fives, the smallest neighbours first, so that little is copied twice."""
    file.main.operators = [
        step
        for operator in file.main.operators
        for step in (_joined(file, operator) if _wide(file, operator) else [operator])
    ]


def _wide(file: Model, operator: Any) -> bool:
    return (
        file.word(operator) == "CONCATENATION"
        and len(operator.inputs) > MOST
        and file.type(operator.outputs[0]) == file.kinds.INT8
    )


def _joined(file: Model, operator: Any) -> Iterator[Any]:
    """The operators that take the place of one."""
    while len(operator.inputs) > MOST:
        count = min(MOST, len(operator.inputs) - MOST + 1)
        starts = range(len(operator.inputs) - count + 1)
        start = min(starts, key=lambda first: _size(file, operator.inputs[first : first + count]))
        part = copy.copy(operator)
        part.inputs = operator.inputs[start : start + count]
        part.outputs = [_part(file, part.inputs, operator)]
        operator.inputs = [*operator.inputs[:start], *part.outputs, *operator.inputs[start + count :]]
        yield part
    yield operator


def _part(file: Model, tensors: list[int], operator: Any) -> int:
    """A new tensor for some of what an operator joins."""
    whole = int(operator.outputs[0])
    made = file.like(whole, whole)
    shape = [int(size) for size in file.main.tensors[whole].shape]
    axis = operator.builtinOptions.axis
    shape[axis] = sum(int(file.main.tensors[tensor].shape[axis]) for tensor in tensors)
    file.main.tensors[made].shape, file.main.tensors[made].shapeSignature = shape, None
    return made


def _size(file: Model, tensors: list[int]) -> int:
    return sum(prod(int(size) for size in file.main.tensors[tensor].shape) for tensor in tensors)
