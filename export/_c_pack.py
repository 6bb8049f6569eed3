"""Weights in the order in which kernels read them, and constants as C."""

from __future__ import annotations

import numpy as np

from edgepack.export._c_graph import Array

WIDE, NARROW = 16, 8  # output channels whose weights stand together: one vector of AVX-512, of AVX2
DEEP = 4  # successive inputs of one output that integers are multiplied in together
PER_LINE = 12
TYPES = {"float32": "float", "int8": "int8_t", "uint8": "uint8_t", "uint16": "uint16_t", "int32": "int32_t",
         "uint32": "uint32_t"}  # fmt: skip


def block_of(outputs: int, groups: int, integers: bool) -> int:
    """Half empty vectors of AVX-512 are worth it where its products of bytes are."""
    return WIDE if outputs > NARROW or (integers and groups == 1) else NARROW


def rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def pack(weight: Array, groups: int, segments: int) -> Array:
    """(O, I, rows, columns) → (groups, blocks, segments, length, block), zeros for outputs that are not there.

    Integers stand in fours: (groups, blocks, segments, length / 4, block, 4).

    Args:
        segments: runs of successive inputs that a kernel walks: rows, or rows times columns.
    """
    outputs = weight.shape[0] // groups
    block = block_of(outputs, groups, weight.dtype == np.int8)
    taps = weight.reshape(groups, outputs, *weight.shape[1:]).transpose(0, 1, 3, 4, 2).reshape(groups, outputs, -1)
    whole = np.zeros((groups, rounded(outputs, block), taps.shape[2]), weight.dtype)
    whole[:, :outputs] = taps
    found: Array = whole.reshape(groups, -1, block, segments, taps.shape[2] // segments)
    if weight.dtype != np.int8:
        return np.ascontiguousarray(found.transpose(0, 1, 3, 4, 2))
    length = found.shape[-1]
    deep: Array = np.zeros((*found.shape[:-1], rounded(length, DEEP)), np.int8)
    deep[..., :length] = found
    deep = deep.reshape(*deep.shape[:-1], -1, DEEP)
    return np.ascontiguousarray(deep.transpose(0, 1, 3, 4, 2, 5))


def pack_outputs(values: Array, groups: int, fill: int = 0) -> Array:
    """One value per output, padded to whole blocks per group."""
    outputs = values.size // groups
    block = block_of(outputs, groups, values.dtype == np.int32)
    found = np.full((groups, rounded(outputs, block)), fill, values.dtype)
    found[:, :outputs] = values.reshape(groups, outputs)
    return found.reshape(-1)


def literals(array: Array) -> list[str]:
    """Each value as C, exact."""
    flat = np.ravel(array)
    if flat.dtype != np.float32:
        return ["(-2147483647 - 1)" if value == -(2**31) else str(value) for value in flat.tolist()]
    words = {"inf": "INFINITY", "-inf": "-INFINITY", "nan": "NAN", "0.0": "0", "-0.0": "-0.0f"}
    return [words.get(text, f"{text}f") for text in flat.astype(str).tolist()]


def number(value: float) -> str:
    """A float32 as C."""
    return literals(np.array([value], np.float32))[0] if value else "0.0f"


def definition(name: str, array: Array, storage: str = "const ") -> str:
    """An array as C, a few values a line."""
    words = literals(array)
    lines = [", ".join(words[start : start + PER_LINE]) for start in range(0, len(words), PER_LINE)]
    return f"{storage}{TYPES[str(array.dtype)]} {name}[{array.size}] = {{\n" + ",\n".join(lines) + "\n};\n"
