"""Third parties kept from talking; what matters of it comes as an exception."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


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


@contextmanager
def muted(channel: int) -> Iterator[None]:
    """Nor what compiled code writes, past Python, to the process's output (1) or error (2) channel."""
    if (stream := sys.stdout if channel == 1 else sys.stderr) is not None:  # a program without a terminal has none
        stream.flush()
    kept = os.dup(channel)
    try:
        with Path(os.devnull).open("w") as sink:
            os.dup2(sink.fileno(), channel)
            yield
    finally:
        os.dup2(kept, channel)
        os.close(kept)
