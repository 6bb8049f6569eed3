"""Third parties kept from talking; what matters of it comes as an exception."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def unlogged() -> Iterator[None]:
    """No log records and no warnings inside."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def silence() -> Iterator[None]:
    """Nor anything that Python code prints, progress bars included."""
    sink = io.StringIO()
    with unlogged(), redirect_stdout(sink), redirect_stderr(sink):
        yield
