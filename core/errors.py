"""Every error edgepack raises on purpose, and the exit status each one carries.

EdgepackError                 1   our own bug when nothing below fits
├── InputError                2   command line, recipe, or a file it names
│   └── RecipeError           2   several problems of one recipe, reported together
├── MissingExtra              3   an optional package (or tool) is not installed
├── DeviceError               3   a device cannot be reached
├── BudgetError               4   a budget of the recipe was not met
├── MeasurementError          5   a demanded measurement is inconclusive or unavailable
├── ParityError               6   an artifact does not compute what it must
├── Unsupported               7   the format cannot do this
├── IntegrityError            8   a hash does not match
├── StorageError              9   disk full, no permission
└── StepError                 (that of its cause, else 1)   a step of the pipeline failed
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any


def together(failures: Sequence[EdgepackError]) -> EdgepackError:
    """Several failures as one, with the exit status of the first; one alone is itself."""
    first = failures[0]
    if len(failures) == 1:
        return first
    lines = [f"{len(failures)} artifacts failed:", *(f"  - {error.message}" for error in failures)]
    made = EdgepackError("\n".join(lines), first.hint)
    made.__class__ = type(first)
    made.details = {"failures": [{"kind": type(e).__name__, "message": e.message, **e.details} for e in failures]}
    return made


class EdgepackError(Exception):
    """A failure with one clear sentence, an optional next step, and an exit status."""

    exit_status = 1
    details: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class InputError(EdgepackError):
    """The command line, the recipe or a file it names is missing, damaged, unsafe or does not fit."""

    exit_status = 2


class RecipeError(InputError):
    """All problems of one recipe.

    Attributes:
        problems: one line each, as ``file: key: what is wrong``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "\n".join([f"{counted(len(problems), 'problem')} in the recipe:", *(f"  - {line}" for line in problems)])
        )


class MissingExtra(EdgepackError):
    """An optional package is not installed; the hint is the install command."""

    exit_status = 3


class DeviceError(EdgepackError):
    """A device is absent or was lost."""

    exit_status = 3


class BudgetError(EdgepackError):
    """A budget of the recipe was not met; the artifact stays, marked."""

    exit_status = 4


class MeasurementError(EdgepackError):
    """A measurement that the recipe demands is inconclusive or unavailable."""

    exit_status = 5


class ParityError(EdgepackError):
    """An artifact does not compute what its simulation computes.

    Attributes:
        details: the operator at fault as plain values, empty where it is not known.
    """

    exit_status = 6

    def __init__(self, message: str, hint: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, hint)
        self.details = details or {}


class Unsupported(EdgepackError):
    """A format, engine or pass cannot do this; the hint says what to use instead."""

    exit_status = 7


class IntegrityError(EdgepackError):
    """A file's hash does not match its manifest."""

    exit_status = 8


class StorageError(EdgepackError):
    """Reading or writing failed: disk full, permission; nothing is left half-written."""

    exit_status = 9


class StepError(EdgepackError):
    """A pipeline step failed unexpectedly; carries the exit status of its cause."""

    def __init__(self, message: str, cause: BaseException) -> None:
        super().__init__(message, getattr(cause, "hint", None))
        self.exit_status = getattr(cause, "exit_status", 1)
        self.__cause__ = cause


def counted(number: int, word: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def nearest(word: str, valid: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a near miss, else the list of valid words."""
    words = sorted(valid)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(words)}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra installs it.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if missing != module.split(".")[0]:
            raise
        raise MissingExtra(f"the package {missing!r} is not installed", f"pip install 'edgepack[{extra}]'") from error
