"""The recipe, ``edgepack.toml``: read, checked whole, turned into parts.

All problems are found before any work and reported together, each with file and key. ``python -m edgepack.recipe``
prints the JSON Schema that editors use.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from edgepack import parts
from edgepack._overrides import override_in
from edgepack.contracts import Device, Exporter, Part, Pass, Runtime, Settings
from edgepack.errors import EdgepackError, InputError, RecipeError, StorageError, nearest
from edgepack.sheet import Sheet, Table, files_named, message, read_sheet

FILE = "edgepack.toml"
RESERVED = ("compressed", "baseline", "profiles", "packages", "work")
P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Measurement:
    """One ``[[profile]]`` entry."""

    device: Device
    runtime: Runtime | None
    settings: Settings


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        path: the file; relative paths in it are relative to its folder.
        sheet: what it says.
        passes, exporters, measurements: the parts it names, in order.
    """

    path: Path
    sheet: Sheet
    passes: tuple[Pass, ...]
    exporters: tuple[Exporter, ...]
    measurements: tuple[Measurement, ...]

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def files(self) -> set[str]:
        """Files and folders it names, relative to its folder."""
        return set(files_named(self.sheet).values())

    @property
    def out(self) -> Path:
        """Where results go unless ``--out`` says otherwise."""
        return self.folder / "edgepack-out"


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the file, or the folder with an ``edgepack.toml``.
        overrides: ``compress.quantize.bits=4``; list entries by index, ``use`` or ``name``.

    Raises:
        RecipeError: everything that is wrong with it.
        InputError: the file is missing or not TOML, or an override is malformed.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    table = _read(path)
    for override in overrides:
        override_in(table, override)
    problems: list[str] = []
    sheet = read_sheet(table, problems)
    passes = _parts(Pass, table, "compress", problems)
    exporters = _parts(Exporter, table, "export", problems)
    measurements = tuple(_measurements(sheet, problems)) if sheet else ()
    problems += _order(passes) + _names(exporters) + (_files(sheet, path.parent) if sheet else [])
    if problems or sheet is None:
        raise RecipeError([f"{path.name}: {problem}" for problem in problems])
    return Recipe(path, sheet, passes, exporters, measurements)


def build(kind: type[P], entry: Mapping[str, Any]) -> P:
    """Make a part from ``{use = NAME, option = value …}``.

    Raises:
        InputError: no such part, unknown option (nearest one offered), or a value out of range; one line each.
    """
    options = dict(entry)
    name = options.pop("use", None)
    if not isinstance(name, str):
        raise InputError("'use' is missing: it names the part")
    cls = parts.find(kind, name)
    if unknown := list(_unknown(cls, options, name)):
        raise InputError("\n".join(unknown))
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        raise InputError("\n".join(_line(item) for item in error.errors())) from error


def _unknown(cls: type, options: Mapping[str, Any], name: str) -> Iterator[str]:
    """What is said of options that a part, or a table among its options, does not have."""
    known = list(getattr(cls, "__dataclass_fields__", {}))
    types = get_type_hints(cls) if any(isinstance(value, Mapping) for value in options.values()) else {}
    for key, value in options.items():
        if key not in known:
            yield f"{name} has no option {key!r}, {nearest(key, known) if known else 'it has none'}"
        elif isinstance(value, Mapping) and (table := _table_in(types[key])) is not None:
            yield from _unknown(table, value, f"{name}: {key}")


def _table_in(annotation: Any) -> type | None:
    """The dataclass that an option's type allows, if there is one."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return annotation
    return next((found for item in get_args(annotation) if (found := _table_in(item))), None)


def build_with(kind: type[P], name: str, section: str, overrides: Sequence[str]) -> P:
    """Make a part by name, its options from overrides such as ``deploy.linux.samples=4``."""
    parts.find(kind, name)
    table: Table = {section: [{"use": name}]}
    for override in overrides:
        override_in(table, override)
    return build(kind, table[section][0])


def schema() -> dict[str, Any]:
    """JSON Schema of the recipe, with every part edgepack ships and its options."""
    whole = Sheet.model_json_schema()
    for section, kind in (("compress", Pass), ("export", Exporter)):
        choices = [part_schema(name, parts.find(kind, name), whole["$defs"]) for name in parts.names(kind)]
        open_choice = {"properties": {"use": {"type": "string", "pattern": ":"}}, "required": ["use"]}
        whole["properties"][section]["items"] = {"anyOf": [*choices, open_choice]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "edgepack recipe", **whole}


def part_schema(name: str, cls: type[Part], tables: dict[str, Any]) -> dict[str, Any]:
    """Of one entry of ``[[compress]]`` or ``[[export]]``; adds the tables among its options to the schema's."""
    found = TypeAdapter(cls).json_schema()
    for table, form in found.pop("$defs", {}).items():
        tables[table] = {**form, "additionalProperties": False} if form.get("type") == "object" else form
    found["properties"] = {"use": {"const": name}, **found.get("properties", {})}
    return {**found, "required": ["use"], "additionalProperties": False}


def _read(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", "edgepack init writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _line(item: Mapping[str, Any]) -> str:
    where = ".".join(str(word) for word in item["loc"])
    return f"{where}: {message(item)}" if where else message(item)


def _parts(kind: type[P], table: Table, section: str, problems: list[str]) -> tuple[P, ...]:
    entries = table.get(section, [])
    built = []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if not isinstance(entry, dict):
            continue
        where = f"{section}.{entry.get('use', index)}"
        built += _try(lambda entry=entry: build(kind, entry), where, problems)
    return tuple(built)


def _try(make: Any, where: str, problems: list[str]) -> list[Any]:
    try:
        return [make()]
    except InputError as error:
        hint = f" ({error.hint})" if error.hint else ""
        problems += [f"{where}: {line}{hint}" for line in error.message.splitlines()]
    except EdgepackError as error:
        problems.append(f"{where}: {error.message}")
    return []


def _measurements(sheet: Sheet, problems: list[str]) -> Iterator[Measurement]:
    for index, entry in enumerate(sheet.profile):
        device = dict(entry.device)
        threads = device.pop("threads", 1)
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            problems.append(f"profile.{index}.device.threads: a whole number from 1, not {threads!r}")
            continue
        runtime = {"use": entry.runtime} if isinstance(entry.runtime, str) else entry.runtime
        devices = _try(lambda device=device: build(Device, device), f"profile.{index}.device", problems)
        runtimes = [None] if runtime is None else _try(
            lambda runtime=runtime: build(Runtime, runtime), f"profile.{index}.runtime", problems)  # fmt: skip
        if devices and runtimes:
            settings = Settings(threads=threads, instances=entry.instances, max_seconds=entry.seconds)
            yield Measurement(devices[0], runtimes[0], settings)


def _order(passes: Sequence[Pass]) -> list[str]:
    """Passes that need layers come before those that fix weights and ranges."""
    right = sorted(passes, key=lambda item: item.stage)
    if list(passes) == right:
        return []
    given, wanted = (", ".join(parts.name_of(item) for item in order) for order in (passes, right))
    return [f"compress: the order {given} does not work; the right one is {wanted}"]


def artifact_name(exporter: Exporter) -> str:
    return exporter.name or exporter.format


def _names(exporters: Sequence[Exporter]) -> list[str]:
    names = [artifact_name(item) for item in exporters]
    taken = {name for name in names if names.count(name) > 1}
    bad = {name for name in names if name in RESERVED or not re.fullmatch(r"\w[\w .+-]*", name)}
    return [f"export.{name}: two exports have this name; give one of them another 'name'" for name in sorted(taken)] + [
        f"export.{name}: 'name' must be a plain folder name other than {', '.join(RESERVED)}" for name in sorted(bad)
    ]


def _files(sheet: Sheet, folder: Path) -> list[str]:
    """Files the recipe names that are not there."""
    return [f"{key}: {name} does not exist" for key, name in files_named(sheet).items() if not (folder / name).exists()]


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))  # noqa: T201  (this module's command)
