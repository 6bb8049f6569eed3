"""Python's garbage collector, off while something runs that it only disturbs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside.

    Converters keep millions of small objects, and looking at them costs a fifth of the time; in the timing loop a
    collection would be timed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
