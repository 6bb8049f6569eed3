"""Weights of 1×1 convolutions as values and increments, in blocks of outputs that share their zeros.

Kernel and layout follow Elsen et al., "Fast sparse ConvNets" (arXiv:1911.09723): images in planes, one weight times a
strip of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepack.export._c_graph import Array
from edgepack.export._c_pack import rounded

BLOCKS = (1, 2, 4)  # outputs
SPAN = 256  # inputs of one part: a strip of their pixels stays in the nearest caches, and steps fit in one byte
VECTOR = 16  # pixels, of the widest instruction set


@dataclass(frozen=True)
class Columns:
    """Weights as ``nn_sparse_f32`` reads them.

    Attributes:
        block: outputs that share their zeros.
        parts: all outputs of the first ``SPAN`` inputs, then those of the next.
        behind: planes from one column to the next, each row of blocks from plane 0 of its part on.
        counts: columns of each row of blocks.
        weights: ``block`` of each column.
    """

    block: int
    parts: int
    behind: Array
    counts: Array
    weights: Array


def columns(weight: Array, block: int) -> Columns:
    """Weights (O, I) without the columns of blocks that are all zeros; outputs that are not there are zeros."""
    outputs, inputs = weight.shape
    whole = np.zeros((rounded(outputs, block), inputs), np.float32)
    whole[:outputs] = weight
    starts = range(0, inputs, SPAN)
    behind, counts, values = [], [], []
    for start in starts:
        for rows in whole[:, start : start + SPAN].reshape(len(whole) // block, block, -1):
            places = np.flatnonzero(rows.any(0))
            behind.append(np.diff(places, prepend=0))
            counts.append(places.size)
            values.append(rows[:, places].T.reshape(-1))
    return Columns(
        block,
        len(starts),
        np.concatenate(behind).astype(np.uint8),
        np.array(counts, np.uint16),
        np.concatenate(values).astype(np.float32),
    )


# What a multiplication costs in planes over one of the dense kernel, channels last; measured (docs/sparse_c.md).
COST = {1: 1.7, 2: 1.15, 4: 1.1}
PER_OUTPUT, PER_DENSE_OUTPUT = 5.0, 8.0  # multiplications that beginning and storing one output of one pixel is worth


def cost(weight: Array, pixels: int, block: int) -> float:
    """Of a sparse 1×1 convolution (O, I), in multiplications of the dense kernel."""
    outputs = rounded(weight.shape[0], block)
    padded = np.zeros((outputs, weight.shape[1]), bool)
    padded[: weight.shape[0]] = weight != 0
    stored = block * int(padded.reshape(-1, block, weight.shape[1]).any(1).sum())
    return rounded(pixels, VECTOR) * (COST[block] * stored + PER_OUTPUT * outputs)


def dense_cost(weight: Array, pixels: int) -> float:
    """Of the same convolution with channels last, whatever its weights."""
    return float(pixels * (weight.size + PER_DENSE_OUTPUT * weight.shape[0]))


def best_block(weight: Array, pixels: int) -> int:
    return min(BLOCKS, key=lambda block: cost(weight, pixels, block))
