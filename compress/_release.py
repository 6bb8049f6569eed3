"""Freed memory given back to the system.

glibc keeps what large results leave behind for later ones, in pieces that fit none of them: a long calibration comes
to hold several times what it uses.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release() -> None:
    """Give back what is free, where the C library can be asked to."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no list of everything loaded
        return None
    return found
