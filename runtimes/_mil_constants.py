"""Weights as Core ML stores them: plain, in 16 bits, quantized, in look-up tables, sparse. NumPy only.

Each function takes the inputs of the ``constexpr_*`` operator of its name (coremltools' MIL reference, forms of iOS 16
and iOS 18) and returns the dense values the engine decompresses them to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: int) -> Array:
    shape = [1] * quantized_data.ndim
    if np.ndim(scale) or np.ndim(zero_point):
        shape[int(axis)] = -1
    factor = np.asarray(scale)
    offset = np.asarray(zero_point).astype(factor.dtype)
    factor, offset = (value.reshape(shape) if value.ndim else value for value in (factor, offset))
    return np.asarray((quantized_data.astype(factor.dtype) - offset) * factor)


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """``scale · (data − offset)``, each scale for a block of the tensor."""
    factor = _spread(scale, data.shape)
    shifted = data.astype(scale.dtype)
    if offset is not None:
        shifted = shifted - _spread(offset.astype(scale.dtype), data.shape)
    return np.asarray(factor * shifted)


def cast(source_val: Array, output_dtype: str) -> Array:
    return source_val.astype({"fp32": np.float32, "fp16": np.float16}[str(output_dtype)])


def lut_to_dense(indices: Array, lut: Array, shape: Array | None = None, vector_axis: int | None = None) -> Array:
    """Values looked up by index: in one table (iOS 16, indices packed) or in one table per block (iOS 18)."""
    if shape is not None:
        count, bits = int(np.prod(shape)), int(lut.size).bit_length() - 1
        return np.asarray(lut[_unpacked(indices, bits, count)].reshape([int(size) for size in shape]))
    tables = lut.reshape(-1, *lut.shape[-2:])
    which = _spread(np.arange(len(tables)).reshape(lut.shape[:-2]), indices.shape)
    vectors = tables[which, indices.astype(np.int64)]
    if lut.shape[-1] == 1:
        return np.asarray(vectors[..., 0])
    axis = int(vector_axis or 0) % indices.ndim
    merged = np.moveaxis(vectors, -1, axis + 1)
    return np.asarray(merged.reshape(*indices.shape[:axis], -1, *indices.shape[axis + 1 :]))


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Values where the mask has ones, zero elsewhere."""
    if shape is not None:
        bits = np.unpackbits(mask, count=int(np.prod(shape)), bitorder="little")
        mask = bits.reshape([int(size) for size in shape])
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: int | None = None
) -> tuple[Array, Array]:
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, None, vector_axis)
    mask = indices_mask if lut.shape[-1] == 1 else np.repeat(indices_mask, lut.shape[-1], int(vector_axis or 0))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
    """Each value repeated over its block of a tensor of this shape."""
    for axis, (size, count) in enumerate(zip(shape, values.shape, strict=True)):
        values = np.repeat(values, size // count, axis)
    return values


def _unpacked(packed: Array, bits: int, count: int) -> Array:
    """Integers of ``bits`` bits, least significant bit first across bytes."""
    stream = np.unpackbits(packed, bitorder="little")[: bits * count].reshape(count, bits)
    return np.asarray((stream.astype(np.int64) << np.arange(bits)).sum(1))


CONSTANTS: dict[str, Callable[..., Any]] = {
    f"constexpr_{function.__name__}": function
    for function in (
        affine_dequantize, blockwise_shift_scale, cast, lut_to_dense, sparse_to_dense, lut_to_sparse,
        sparse_blockwise_shift_scale,
    )
}  # fmt: skip
