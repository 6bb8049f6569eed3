"""The terminal: results on stdout, people's output where it does not disturb them, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cache
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 20.0
WIDTH_IN_FILES = 160


class Screen:
    """Where a command writes.

    Attributes:
        people: tables and sentences; stderr when stdout carries a JSON document.
        errors: always stderr.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.errors = _console(stderr=True)
        self.people = self.errors if as_json else _console(stderr=False)
        self.progress = TerminalProgress(self.errors, quiet)

    def show(self, *items: RenderableType) -> None:
        """Tables and sentences for people; nothing with ``--quiet``."""
        self.progress.done()
        for item in items if not self.quiet else ():
            self.people.print(item)

    def say(self, text: str) -> None:
        """One plain line for people; brackets in it are not markup."""
        self.show(escape(text))

    def result(self, document: Any) -> None:
        """The one JSON document, on stdout, if it was asked for."""
        if self.as_json:
            sys.stdout.write(to_json(document) + "\n")
            sys.stdout.flush()


@contextmanager
def stdout_for_people(as_json: bool) -> Iterator[None]:
    """With ``--json``, whatever user code or an engine prints goes to stderr, so that stdout is one document."""
    if not as_json or sys.__stdout__ is None or sys.stdout is not sys.__stdout__:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@cache
def screen(as_json: bool = False, quiet: bool = False) -> Screen:
    """The process's one screen of each kind."""
    return Screen(as_json, quiet)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_IN_FILES
    return console


def to_json(document: Any) -> str:
    """Strict JSON text; paths and other foreign values as words."""
    return json.dumps(document, indent=2, allow_nan=False, default=str)


class TerminalProgress:
    """Progress of work that takes over two seconds: a bar with the time left, or now and then a line.

    Follows ``edgepack.progress.Progress``.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._timer: threading.Timer | None = None
        self._work: _Bar | _Lines | None = None
        self._lock = threading.Lock()

    def start(self, text: str, total: int | None = None) -> Callable[[int], None]:
        self.done()
        if self._quiet:
            return lambda steps: None
        kind = _Bar if self._console.is_terminal else _Lines
        self._work = work = kind(self._console, text, total)
        self._timer = threading.Timer(SHOW_AFTER_S, self._show, [work])
        self._timer.daemon = True
        self._timer.start()
        return work.advance

    def done(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._work is not None:
                self._work.hide()
            self._timer = self._work = None

    def _show(self, work: _Bar | _Lines) -> None:
        with self._lock:
            if self._work is work:
                work.show()


class _Bar:
    def __init__(self, console: Console, text: str, total: int | None) -> None:
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(text, total=total)

    def show(self) -> None:
        self._bar.start()

    def hide(self) -> None:
        self._bar.stop()

    def advance(self, steps: int) -> None:
        self._bar.advance(self._task, steps)


class _Lines:
    def __init__(self, console: Console, text: str, total: int | None) -> None:
        self._console, self._text, self._total = console, text, total
        self._began = self._spoke = time.monotonic()
        self._steps = 0

    def show(self) -> None:
        self._console.print(f"{self._text} …", markup=False)

    def hide(self) -> None:
        """A line stays."""

    def advance(self, steps: int) -> None:
        self._steps += steps
        now = time.monotonic()
        if self._total and 0 < self._steps < self._total and now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            left = (now - self._began) / self._steps * (self._total - self._steps)
            self._console.print(f"{self._text}: {self._steps / self._total:.0%}, about {left:.0f} s left", markup=False)
