"""A layer of ±1 along the spanning tree of its outputs, as the tables that the kernel ``tree_bits`` walks.

An output's count of matching places is its parent's plus twice its own matches at the places where they differ, less
how many these are. That last number is the same for every pixel, so it is not counted: it moves the output's limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepack.export._c_graph import Array
from edgepack.trees import ROOT, Tree

WORD = 32  # channels of a word
UNIT = 64  # bytes of pixels: a cache line and the widest vector
BAND = 4  # units of results for which planes are made at once, and whose counts are kept meanwhile
PAIR = 2  # vectors whose counts are kept
TOGETHER = 8  # planes
MOST = 1 << 16  # units that can be numbered
ALL = 0xFFFFFFFF
DEEPEST = 24  # bits of a counter, as in bits_tree.h


@dataclass(frozen=True)
class Frame:
    """Where a layer's planes come from.

    Attributes:
        height, width: of what is written.
        stride, dilation: rows then columns.
        row, pixel: words from one row and pixel of the padded input to the next.
    """

    height: int
    width: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    row: int
    pixel: int


@dataclass(frozen=True)
class Tables:
    """The members of nn_tree, and how much memory the kernel needs meanwhile."""

    numbers: dict[str, int]
    arrays: dict[str, Array]
    scratch_bytes: int


def tables(signs: Array, tree: Tree, limit: Array, turn: Array, frame: Frame) -> Tables | None:
    """Tables of a layer; None for one with more planes than can be numbered.

    Args:
        signs: bool (outputs, inputs, rows, columns), true for +1.
        limit: bits are 1 where twice the differing places are at most this; int (outputs,).
        turn: bool (outputs,).
    """
    cut = _Cut(frame, *signs.shape[1:])
    if cut.constant + 2 * cut.units > MOST:
        return None
    steps = _Steps(cut, signs.reshape(len(signs), -1), tree)
    rows, places = tree.order(), signs[0].size
    counters = int(places + steps.moved.max() + 1).bit_length()
    assert counters <= DEEPEST
    least = np.clip(places - limit // 2 + steps.moved, 0, (1 << counters) - 1)[rows]
    numbers = {
        "variants": len(cut.variants), "words": cut.words, "tile": cut.tile, "row_bytes": cut.row_bytes,
        "rows": cut.rows, "band": cut.band, "units": cut.units, "step_row": frame.stride[0] * frame.row,
        "step_pixel": frame.stride[1] * frame.pixel, "counters": counters, "outputs": len(signs),
    }  # fmt: skip
    arrays: dict[str, Array] = {
        "starts": cut.starts, "beyond": cut.beyond, "order": np.array(steps.order, np.int32),
        "places": np.concatenate(steps.places).astype(np.uint16),
        "limits": np.where((least[:, None] >> np.arange(counters)) & 1, 0, ALL).astype(np.uint32),
        "turn": np.where(turn[rows], ALL, 0).astype(np.uint32),
    }  # fmt: skip
    units = cut.constant + 2 * cut.units + len(signs) * cut.band + steps.slots * counters * PAIR
    return Tables(numbers, arrays, UNIT * units)


class _Steps:
    """The outputs, parents first.

    Attributes:
        order: per output itself, its parent's slot, its own, eights that count where 1 and where 0, bits of their sum.
        places: the planes of these eights.
        moved: what an output's count holds too much.
        slots: how many outputs have children.
    """

    def __init__(self, cut: _Cut, flat: Array, tree: Tree) -> None:
        self.order: list[list[int]] = []
        self.places: list[Array] = []
        self.moved = np.zeros(len(flat), np.int64)
        parents = dict.fromkeys(int(parent) for parent in tree.parents[tree.order()] if parent != ROOT)
        slot = {parent: place for place, parent in enumerate(parents)}
        self.slots = len(slot)
        for channel in tree.order().tolist():
            parent, differing = int(tree.parents[channel]), np.arange(flat.shape[1])
            if parent != ROOT:
                differing = np.flatnonzero(flat[channel] != flat[parent])
                self.moved[channel] = self.moved[parent] + len(differing)
            ones, zeros = (_eights(cut, differing[flat[channel, differing] == one], one) for one in (True, False))
            counts = [len(ones) // TOGETHER, len(zeros) // TOGETHER, (len(ones) + len(zeros)).bit_length()]
            self.order.append([channel, slot.get(parent, -1), slot.get(channel, -1), *counts])
            self.places += [ones, zeros]


def _eights(cut: _Cut, differing: Array, ones: bool) -> Array:
    """Planes of these places, filled up with planes that add nothing."""
    missing = -len(differing) % TOGETHER
    return np.concatenate([cut.offsets[differing], np.full(missing, cut.constant + (0 if ones else cut.units))])


class _Cut:
    """Which planes there are: one for each channel and variant, which is a column of the kernel and a phase of rows.

    Attributes:
        tile, row_bytes, rows: pixels of a row that are computed at once, their bytes, and how many rows a unit holds.
        band, units: units of results that are computed at once, and of a plane.
        offsets: unit of each place of the kernel.
        constant: unit of the plane of zeros; that of ones follows it.
    """

    def __init__(self, frame: Frame, inputs: int, rows: int, columns: int) -> None:
        shifts = [divmod(row * frame.dilation[0], frame.stride[0]) for row in range(rows)]
        self.variants = sorted({(phase, column) for _, phase in shifts for column in range(columns)})
        self.words = -(-inputs // WORD)
        self.row_bytes, self.rows = _tile(frame.height, frame.width)
        self.tile = min(8 * self.row_bytes, frame.width)
        self.band = min(BAND, -(-frame.height // self.rows))
        self.units = self.band + max(down for down, _ in shifts)
        places = [phase * frame.row + column * frame.dilation[1] * frame.pixel for phase, column in self.variants]
        self.starts = np.array(places, np.int32)
        read = {phase: max(down for down, other in shifts if other == phase) for _, phase in shifts}
        self.beyond = np.array([read[phase] for phase, _ in self.variants], np.int32)
        channels = np.arange(inputs)[:, None, None]
        variant = np.array([[self.variants.index((p, c)) for c in range(columns)] for _, p in shifts])
        down = np.array([d for d, _ in shifts])[:, None]
        self.offsets = ((variant * (self.words * WORD) + channels) * self.units + down).reshape(-1)
        self.constant = len(self.variants) * self.words * WORD * self.units


def _tile(height: int, width: int) -> tuple[int, int]:
    """Bytes of a row and rows in a unit with which the fewest units hold an image; the widest of several."""
    whole = -(-width // 8)
    found = []
    for tiles in range(-(-whole // UNIT), whole + 1):
        each = -(-whole // tiles)
        rows = (UNIT - -each % 4) // each  # a row is written in fours of bytes
        found.append((-(-whole // each) * -(-height // rows), -each, rows))
    _, each, rows = min(found)
    return -each, rows
