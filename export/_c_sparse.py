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
FURTHEST = 255  # planes from one column to the next, in one byte; what lies behind is reached over a column of zeros
VECTOR = 16  # pixels, of the widest instruction set


@dataclass(frozen=True)
class Columns:
    """Weights as ``nn_sparse_f32`` reads them.

    Attributes:
        block: outputs that share their zeros.
        behind: planes from one column to the next, each row of blocks from plane 0 on.
        counts: columns of each row of blocks.
        weights: ``block`` of each column.
    """

    block: int
    behind: Array
    counts: Array
    weights: Array

    @property
    def stored(self) -> int:
        return int(self.weights.size)


def columns(weight: Array, block: int) -> Columns:
    """Weights (O, I) without the columns of blocks that are all zeros; outputs that are not there are zeros."""
    outputs, inputs = weight.shape
    whole = np.zeros((rounded(outputs, block), inputs), np.float32)
    whole[:outputs] = weight
    behind, counts, values = [], [], []
    for rows in whole.reshape(-1, block, inputs):
        places = _reachable(np.flatnonzero(rows.any(0)))
        behind.append(np.diff(places, prepend=0))
        counts.append(places.size)
        values.append(rows[:, places].T.reshape(-1))
    return Columns(
        block,
        np.concatenate(behind).astype(np.uint8),
        np.array(counts, np.uint16),
        np.concatenate(values).astype(np.float32),
    )


def _reachable(places: Array) -> Array:
    """Places with more between those that are too far apart."""
    ends = [0, *places.tolist()]
    between = [np.arange(start, stop, FURTHEST)[1:] for start, stop in zip(ends, ends[1:], strict=False)]
    found: Array = np.union1d(places, np.concatenate([np.empty(0, np.int64), *between])).astype(np.int64)
    return found


# What a multiplication costs in planes over one of the dense kernel, channels last; measured (docs/sparse_c.md).
COST = {1: 1.7, 2: 1.3, 4: 1.1}
PER_OUTPUT = 6.0  # multiplications that beginning and storing one output of one pixel is worth


def cost(weight: Array, pixels: int, block: int) -> float:
    """Of a sparse 1×1 convolution (O, I), in multiplications of the dense kernel."""
    outputs = rounded(weight.shape[0], block)
    padded = np.zeros((outputs, weight.shape[1]), bool)
    padded[: weight.shape[0]] = weight != 0
    stored = block * int(padded.reshape(-1, block, weight.shape[1]).any(1).sum())
    return rounded(pixels, VECTOR) * (COST[block] * stored + PER_OUTPUT * outputs)


def best_block(weight: Array, pixels: int) -> int:
    return min(BLOCKS, key=lambda block: cost(weight, pixels, block))
