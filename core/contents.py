"""What a tensor holds, whatever the order of its axes: to find one weight stored twice."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

SMALL_BYTES = 256  # below this, two equal tensors are a coincidence and cost nothing


def key(array: np.ndarray[Any, Any]) -> str | None:
    """``VALUES:ORDER``: the first part is equal for equal values in any order of axes, as float32 or float16.

    None for tensors that are small or hold one value everywhere (zeros, ones): those repeat by nature.
    """
    flat = np.ravel(array)
    if flat.dtype == np.float16:
        flat = flat.astype(np.float32)
    if flat.dtype.kind == "f":
        flat = flat + 0.0  # −0 is 0
    if flat.size * flat.dtype.itemsize < SMALL_BYTES or flat.dtype.kind not in "fiu" or (flat == flat[0]).all():
        return None
    bits = np.ascontiguousarray(flat).view(f"u{flat.dtype.itemsize}").astype(np.uint64)
    mixed = bits * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    values = f"{flat.dtype.kind}{flat.size}-{int(bits.sum()):x}-{int((mixed * mixed).sum()):x}"
    return f"{values}:{zlib.crc32(np.ascontiguousarray(flat).tobytes()):x}"


def values(found: str) -> str:
    """The part of a key that does not depend on the order of axes."""
    return found.partition(":")[0]


def copies(keys: Iterable[str]) -> dict[str, int]:
    """Values → how often a file stores them in one and the same order.

    A weight that one operator needs transposed and another does not is no needless copy.
    """
    found: dict[str, int] = {}
    for item, count in Counter(keys).items():
        found[values(item)] = max(found.get(values(item), 0), count)
    return found
