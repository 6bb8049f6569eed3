"""Load what the user wrote: ``file.py:callable`` or ``package.module:callable``. The only place that runs user code."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from edgepack.errors import EdgepackError, InputError, nearest


def is_source(text: str) -> bool:
    """Whether a word of the recipe names code, rather than a file or something built in."""
    where, _, name = text.rpartition(":")
    return bool(where) and name.isidentifier()


def load(source: str, folder: Path) -> Any:
    """The object that ``file.py:name`` (relative to ``folder``) or ``package.module:name`` names.

    Raises:
        InputError: no such file, module or name (the nearest is offered), or the file raises when it is run.
    """
    where, _, name = source.rpartition(":")
    if not is_source(source):
        raise InputError(f"{source!r} does not name code", "write file.py:callable or package.module:callable")
    module = _from_file(folder / where) if where.endswith(".py") else _from_package(where, folder)
    try:
        return getattr(module, name)
    except AttributeError:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{where} has no {name!r}", nearest(name, own)) from None


def call(source: str, folder: Path, options: Mapping[str, Any]) -> Any:
    """Call what ``source`` names with the recipe's options. Raises InputError for whatever goes wrong in it."""
    function = load(source, folder)
    if not callable(function):
        raise InputError(f"{source} is not callable")
    with blaming(source):
        return function(**options)


@contextmanager
def blaming(source: str) -> Iterator[None]:
    """Turn what user code raises into an InputError that names it."""
    try:
        yield
    except EdgepackError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{source} failed: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    path = path.resolve()
    text = str(path).encode() + path.read_bytes()
    name = f"edgepack_user_{path.stem}_{hashlib.sha256(text).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        with _importable(path.parent), blaming(str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_package(name: str, folder: Path) -> ModuleType:
    with _importable(folder), blaming(f"import {name}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise InputError(f"{name} needs the package {error.name!r}, which is not installed") from error
            raise InputError(f"there is no module {name!r} (looked in {folder} too)") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let code import what lies beside it, as when it is run as a script."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
