"""How the ±1 weights of a layer are stored: as they are, or as a tree of differences.

A layer is ``channels`` rows of ``places`` bits (1 is +1, 0 is −1). Its code is a stream of bits, the most significant
first, filled with zeros to whole bytes; the reader knows channels and places. ``⌈log₂ n⌉`` below is ``width(n)``.

==========  ====================================================================================================
bits        what
==========  ====================================================================================================
2           the form: 0 raw, 1 index lists, 2 Rice-coded gaps
raw         then all rows, one after the other
else        per channel ``width(channels)`` bits: its parent; the root is its own parent
            the root's row
            per other channel, in their order: ``width(places + 1)`` bits: in how many places it differs from its
            parent; then these places, rising:

            * index lists: ``width(places)`` bits each
            * Rice: 4 bits, the parameter k; then per place the gap g to the one before it (places between them):
              g >> k ones, a zero, and the k low bits of g
==========  ====================================================================================================

``encode`` writes the shortest of the three. Rice codes: R. F. Rice, "Some practical universal noiseless coding
techniques", JPL 79-22, 1979.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError

Signs = NDArray[np.bool_]
Ints = NDArray[np.int64]
FORMS = ("raw", "indices", "rice")
FORM_BITS, RICE_BITS = 2, 4
LARGEST_RICE = (1 << RICE_BITS) - 1


def width(count: int) -> int:
    """Bits that tell ``count`` things apart."""
    return max(count - 1, 0).bit_length()


def encode(signs: Signs, parents: Ints) -> bytes:
    """The shortest code of a layer.

    Args:
        signs: bool (channels, places), true for +1.
        parents: of a tree over the channels, −1 for its root; int64 (channels,).
    """
    codes = [_raw(signs), _tree(signs, parents, "indices"), _tree(signs, parents, "rice")]
    return np.packbits(min(codes, key=len)).tobytes()


def form(code: bytes) -> str:
    """Which of ``FORMS`` a code has."""
    return FORMS[code[0] >> (8 - FORM_BITS)]


def _bits(values: Ints, each: int) -> NDArray[np.uint8]:
    """The ``each`` low bits of every value."""
    shifts = np.arange(each - 1, -1, -1)
    return ((values[:, None] >> shifts) & 1).astype(np.uint8).ravel()


def _one(value: int, each: int) -> NDArray[np.uint8]:
    return _bits(np.array([value]), each)


def _raw(signs: Signs) -> NDArray[np.uint8]:
    return np.concatenate([_one(FORMS.index("raw"), FORM_BITS), signs.astype(np.uint8).ravel()])


def _tree(signs: Signs, parents: Ints, form: str) -> NDArray[np.uint8]:
    channels, places = signs.shape
    own = np.where(parents < 0, np.arange(channels), parents)
    root = int(np.flatnonzero(parents < 0)[0])
    parts = [_one(FORMS.index(form), FORM_BITS), _bits(own, width(channels)), signs[root].astype(np.uint8)]
    for channel in _others(own):
        differs = np.flatnonzero(signs[channel] != signs[own[channel]])
        parts.append(_one(len(differs), width(places + 1)))
        parts.append(_bits(differs, width(places)) if form == "indices" else _rice(differs))
    return np.concatenate(parts)


def _others(own: Ints) -> Iterable[int]:
    return (channel for channel, parent in enumerate(own.tolist()) if parent != channel)


def _rice(places: Ints) -> NDArray[np.uint8]:
    gaps = np.diff(places, prepend=-1) - 1
    lengths = [int((gaps >> k).sum()) + len(gaps) * (1 + k) for k in range(LARGEST_RICE + 1)]
    k = int(np.argmin(lengths))
    ones = gaps >> k
    ends = np.cumsum(ones + 1 + k)
    bits = np.ones(lengths[k], np.uint8)
    stops = ends - k - 1
    bits[stops] = 0
    for position in range(k):
        bits[stops + 1 + position] = (gaps >> (k - 1 - position)) & 1
    return np.concatenate([_one(k, RICE_BITS), bits])


def decode(code: bytes, channels: int, places: int) -> Signs:
    """The rows that ``encode`` was given; bool (channels, places).

    Raises:
        InputError: the code is damaged, or of a layer of another shape.
    """
    reader = _Reader(code)
    try:
        kind = FORMS[reader.number(FORM_BITS)]
        if kind == "raw":
            signs = reader.take(channels * places).astype(bool).reshape(channels, places)
        else:
            signs = _grow(reader, channels, places, kind)
        if len(code) != -(-reader.at // 8) or reader.take(len(code) * 8 - reader.at).any():
            raise IndexError("more bits than the layer has")
    except IndexError as error:
        raise InputError(f"the code of a binary layer of {channels} × {places} weights is damaged: {error}") from None
    return signs


def _grow(reader: _Reader, channels: int, places: int, form: str) -> Signs:
    own = np.array([reader.number(width(channels)) for _ in range(channels)])
    roots = np.flatnonzero(own == np.arange(channels))
    if own.max() >= channels or len(roots) != 1:
        raise IndexError("its channels are no tree")
    signs = np.zeros((channels, places), bool)
    signs[roots[0]] = reader.take(places)
    flips = {channel: _places(reader, places, form) for channel in _others(own)}
    for channel in _parents_first(own, int(roots[0])):
        signs[channel] = signs[own[channel]]
        signs[channel, flips[channel]] ^= True
    return signs


def _parents_first(own: Ints, root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for channel in _others(own):
        children.setdefault(int(own[channel]), []).append(channel)
    order = [root]
    for channel in order:
        order += children.get(channel, [])
    if len(order) != len(own):
        raise IndexError("its channels are no tree")
    return order[1:]


def _places(reader: _Reader, places: int, form: str) -> Ints:
    count = reader.number(width(places + 1))
    if form == "indices":
        found = np.array([reader.number(width(places)) for _ in range(count)], np.int64)
    else:
        k = reader.number(RICE_BITS)
        gaps = [(reader.ones() << k) | reader.number(k) for _ in range(count)]
        found = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    if count and (found.max() >= places or (np.diff(found) <= 0).any()):
        raise IndexError("a place lies outside its row")
    return found


class _Reader:
    """Bits of a code, one after the other."""

    def __init__(self, code: bytes) -> None:
        self.bits = np.unpackbits(np.frombuffer(code, np.uint8))
        self.zeros = np.flatnonzero(self.bits == 0)
        self.at = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        if self.at + count > len(self.bits):
            raise IndexError("it ends too early")
        self.at += count
        return self.bits[self.at - count : self.at]

    def number(self, count: int) -> int:
        return int.from_bytes(np.packbits(self.take(count)).tobytes()) >> (-count % 8)

    def ones(self) -> int:
        """How many ones stand before the next zero; both are read."""
        after = int(np.searchsorted(self.zeros, self.at))
        if after == len(self.zeros):
            raise IndexError("it ends too early")
        count = int(self.zeros[after]) - self.at
        self.at += count + 1
        return count
