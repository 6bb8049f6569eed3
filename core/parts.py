"""Discovery: the file name is the registry.

A part's name is its file's name in its room; a room is listed without importing it and a file is imported only
when its part is asked for. Other packages add parts through the entry point group ``edgepack.parts`` (name =
the part's name) or are named in full, ``package.module:Class``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import Any, TypeVar

from edgepack.contracts import Device, Exporter, Meter, Packager, Part, Pass, Runtime
from edgepack.errors import InputError, nearest

ROOMS: dict[type[Part], str] = {
    Pass: "edgepack.compress",
    Exporter: "edgepack.export",
    Runtime: "edgepack.runtimes",
    Device: "edgepack.devices",
    Meter: "edgepack.devices.meters",
    Packager: "edgepack.deploy",
}
WORDS: dict[type[Part], str] = {
    Pass: "pass",
    Exporter: "exporter",
    Runtime: "runtime",
    Device: "device",
    Meter: "meter",
    Packager: "packager",
}
GROUP = "edgepack.parts"

P = TypeVar("P", bound=Part)


def names(kind: type[Part]) -> list[str]:
    """Names of the parts of one kind in edgepack's own rooms, without importing them."""
    room = importlib.import_module(ROOMS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(room.__path__) if not m.name.startswith("_") and not m.ispkg)


def find(kind: type[P], name: str) -> type[P]:
    """The class of a part.

    Raises:
        InputError: no such part, with the nearest name.
    """
    if ":" in name:
        return _load(kind, name)
    if name in names(kind):
        module = importlib.import_module(f"{ROOMS[kind]}.{name}")
        return _only_part(kind, module)
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _load(kind, entry.value)
    raise InputError(f"there is no {WORDS[kind]} {name!r}", nearest(name, names(kind)))


def name_of(part: Part | type[Part]) -> str:
    """The name of a part: its file's name, or its full name for a part of another package."""
    cls = part if isinstance(part, type) else type(part)
    room, _, stem = cls.__module__.rpartition(".")
    return stem if room in ROOMS.values() else f"{cls.__module__}:{cls.__qualname__}"


def options_of(part: Part) -> dict[str, Any]:
    """The options of a part as plain values, for manifests; nested tables as tables."""
    options = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}  # type: ignore[arg-type]
    return {key: dataclasses.asdict(value) if _table(value) else value for key, value in options.items()}


def _table(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def summary(cls: type[Part]) -> str:
    """First line of the part's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _only_part(kind: type[P], module: Any) -> type[P]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must hold exactly one {WORDS[kind]}, found {len(found)}")
    return found[0]


def _load(kind: type[P], full_name: str) -> type[P]:
    module_name, _, attribute = full_name.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise InputError(f"cannot load the {WORDS[kind]} {full_name!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise InputError(
            f"{full_name!r} is not a {WORDS[kind]}", f"it must subclass edgepack.contracts.{kind.__name__}"
        )
    return cls
