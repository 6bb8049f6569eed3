"""Progress of long work, shown by whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """What the pipeline reports to; the command line draws it."""

    def start(self, text: str, total: int | None = None) -> Callable[[int], None]:
        """Begin a piece of work of ``total`` steps; call the result with the number of steps just finished."""

    def done(self) -> None:
        """The last piece of work has ended."""


class Silent:
    """Progress that nobody watches."""

    def start(self, text: str, total: int | None = None) -> Callable[[int], None]:
        return lambda steps: None

    def done(self) -> None:
        return None
