"""The recipe, ``edgepack.toml``: read, checked whole, turned into parts.

All problems are found before any work and reported together, each with file and key. ``python -m edgepack.recipe``
prints the JSON Schema that editors use.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from edgepack import parts
from edgepack.contracts import Device, Exporter, Part, Pass, Runtime, Settings
from edgepack.errors import EdgepackError, InputError, RecipeError, StorageError, nearest
from edgepack.task import Input

FILE = "edgepack.toml"
RESERVED = ("compressed", "baseline", "profiles", "packages", "work")
P = TypeVar("P", bound=Part)
Positive = Annotated[float, Field(gt=0)]
Table = dict[str, Any]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """Where the network comes from."""

    module: str = Field(description="file.py:callable, package.module:callable, timm:NAME, torchvision:NAME, "
                        "transformers:NAME, a .pt2 or an .onnx")  # fmt: skip
    weights: str | None = Field(default=None, description="safetensors, or a .pt/.pth that holds tensors only")
    options: Table = Field(default_factory=dict, description="keyword arguments of the callable")


class DataSection(Section):
    """Where samples come from: an .npz, an image folder, a pair of folders or a callable."""

    data: str | None = Field(default=None, description=".npz with x and y, image folder, or file.py:callable")
    inputs: str | None = Field(default=None, description="folder of input images (with targets)")
    targets: str | None = Field(default=None, description="folder of target images, matched by file name")
    samples: Annotated[int, Field(ge=1)] | None = Field(default=None, description="how many to use, default all")
    seed: int = Field(default=0, description="orders the images within each class")
    prefix: str = Field(default="", description="of the arrays in an .npz: test_ reads test_x and test_y")
    layout: str | None = Field(
        None, description="NCHW or NHWC of the images in an .npz, where the shape leaves it open"
    )
    masks: bool = Field(default=False, description="targets are class indices per pixel")
    options: Table = Field(default_factory=dict, description="keyword arguments of the callable")


class InputSection(Section):
    """One input of the network and how raw data becomes it: (raw / scale - mean) / std."""

    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    dtype: str = "float32"
    layout: str | None = None
    mean: list[float] = Field(default_factory=list)
    std: list[float] = Field(default_factory=list)
    scale: float = 1.0
    resize: int | None = Field(default=None, description="short side in pixels before the centre crop")
    dynamic: list[str] | dict[str, int] = Field(default_factory=lambda: ["batch"])


class TaskSection(Section):
    """What the network is for."""

    input: InputSection | None = Field(default=None, description="the only input, named 'input'")
    inputs: dict[str, InputSection] = Field(default_factory=dict, description="several inputs, by name")
    outputs: list[str] = Field(default_factory=list, description="names of the outputs")
    calibration: DataSection | None = None
    evaluation: DataSection | None = None
    training: DataSection | None = None
    metric: str | Table | None = None
    labels: list[str] | str = Field(default_factory=list, description="class names, or a text file with one a line")

    @property
    def interfaces(self) -> dict[str, InputSection]:
        """Inputs by name, however they were written."""
        return self.inputs or ({"input": self.input} if self.input else {})


class ProfileSection(Section):
    """One measurement of every exported artifact that the runtime reads."""

    device: Table = Field(default_factory=lambda: {"use": "host"}, description="use, its options, and threads")
    runtime: str | Table | None = Field(default=None, description="default: the first engine that reads the format")
    seconds: Positive = Field(default=60.0, description="stop after this long")
    instances: Annotated[int, Field(ge=2)] = 5


class Budget(Section):
    """What must hold; otherwise exit status 4."""

    score_drop: Annotated[float, Field(ge=0)] | None = Field(default=None, description="absolute, as a fraction")
    size_ratio: Positive | None = Field(default=None, description="model files / float size")
    latency_ratio: Positive | None = Field(default=None, description="latency / baseline's on the same engine")


class Sheet(Section):
    """The whole recipe, as written."""

    model: Model
    task: TaskSection
    compress: list[Table] = Field(default_factory=list)
    export: list[Table] = Field(default_factory=list)
    profile: list[ProfileSection] = Field(default_factory=list)
    budget: Budget = Field(default_factory=lambda: Budget())


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
        return set(_named(self.sheet).values())

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
        _override(table, override)
    problems: list[str] = []
    sheet = _sheet(table, problems)
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
    known = list(getattr(cls, "__dataclass_fields__", {}))
    unknown = [key for key in options if key not in known]
    if unknown:
        raise InputError("\n".join(f"{name} has no option {key!r}, {nearest(key, known) if known else 'it has none'}"
                                   for key in unknown))  # fmt: skip
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        raise InputError("\n".join(_line(item) for item in error.errors())) from error


def build_with(kind: type[P], name: str, section: str, overrides: Sequence[str]) -> P:
    """Make a part by name, its options from overrides such as ``deploy.linux.samples=4``."""
    parts.find(kind, name)
    table: Table = {section: [{"use": name}]}
    for override in overrides:
        _override(table, override)
    return build(kind, table[section][0])


def schema() -> dict[str, Any]:
    """JSON Schema of the recipe, with every part edgepack ships and its options."""
    whole = Sheet.model_json_schema()
    for section, kind in (("compress", Pass), ("export", Exporter)):
        choices = [_part_schema(kind, name) for name in parts.names(kind)]
        open_choice = {"properties": {"use": {"type": "string", "pattern": ":"}}, "required": ["use"]}
        whole["properties"][section]["items"] = {"anyOf": [*choices, open_choice]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "edgepack recipe", **whole}


def _part_schema(kind: type[Part], name: str) -> dict[str, Any]:
    found = TypeAdapter(parts.find(kind, name)).json_schema()
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


def _override(table: Table, override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise InputError(f"--set {override!r} is not key=value", "for example --set compress.fold.leave='[\"head\"]'")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    place: Any = table
    for word in path:
        place = _step(place, word, override)
    if not isinstance(place, dict):
        raise InputError(f"--set {override!r}: {'.'.join(path)!r} is not a table")
    place[last] = value


def _step(place: Any, word: str, override: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(word, {})
    if isinstance(place, list):
        named = [e for i, e in enumerate(place) if word in (str(i), e.get("name") or e.get("use"))]
        entries = named if len(named) == 1 else [e for e in place if e.get("use") == word]
        if len(entries) == 1:
            return entries[0]
        words = sorted({str(e.get("name") or e.get("use")) for e in place} | {str(i) for i in range(len(place))})
        if not entries:
            raise InputError(f"--set {override!r}: no entry {word!r}", nearest(word, words))
        raise InputError(f"--set {override!r}: {len(entries)} entries {word!r}", f"say which: {', '.join(words)}")
    raise InputError(f"--set {override!r}: {word!r} is not a table")


def _sheet(table: Table, problems: list[str]) -> Sheet | None:
    try:
        sheet = Sheet.model_validate(table)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
        return None
    if bool(sheet.task.input) == bool(sheet.task.inputs):
        problems.append("task: give either 'input' (one input) or 'inputs' (several, by name)")
    for name, item in sheet.task.interfaces.items():
        try:
            Input(name, **item.model_dump())
        except ValueError as wrong:
            problems.append(f"task: {wrong}")
    for key in ("calibration", "evaluation", "training"):
        section = getattr(sheet.task, key)
        if section is not None and bool(section.data) == bool(section.inputs and section.targets):
            problems.append(f"task.{key}: give either 'data', or both 'inputs' and 'targets'")
    if sheet.task.evaluation and sheet.task.metric is None:
        problems.append('task.metric: missing; evaluation data need a metric such as "top1"')
    return sheet


def _problem(item: Mapping[str, Any]) -> str:
    where = ".".join(str(word) for word in item["loc"])
    if item["type"] == "extra_forbidden":
        *path, key = item["loc"]
        return f"{where}: unknown key, {nearest(str(key), _keys(path))}"
    if item["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {_message(item)}"


def _keys(path: Sequence[str | int]) -> list[str]:
    """The valid keys at a place of the recipe."""
    model: Any = Sheet
    for word in path:
        if isinstance(model, type) and issubclass(model, Section) and word in model.model_fields:
            model = _section(model.model_fields[str(word)].annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, Section) else []


def _section(annotation: Any) -> Any:
    """The Section inside ``X | None``, ``list[X]`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for item in get_args(annotation) if (found := _section(item))), None)


def _message(item: Mapping[str, Any]) -> str:
    text = str(item["msg"]).removeprefix("Value error, ")
    value = item.get("input")
    shown = isinstance(value, str | int | float | bool) and item["type"] != "value_error"
    return f"{text[0].lower()}{text[1:]}" + (f", not {value!r}" if shown else "")


def _line(item: Mapping[str, Any]) -> str:
    where = ".".join(str(word) for word in item["loc"])
    return f"{where}: {_message(item)}" if where else _message(item)


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
    return [f"{key}: {name} does not exist" for key, name in _named(sheet).items() if not (folder / name).exists()]


def _named(sheet: Sheet) -> dict[str, str]:
    """Every file and folder the recipe names, by key."""
    task = sheet.task
    named = {"model.module": _path_in(sheet.model.module), "model.weights": sheet.model.weights}
    for key in ("calibration", "evaluation", "training"):
        section: DataSection | None = getattr(task, key)
        if section is not None:
            named[f"task.{key}.data"] = _path_in(section.data) if section.data else None
            named[f"task.{key}.inputs"], named[f"task.{key}.targets"] = section.inputs, section.targets
    named["task.labels"] = task.labels if isinstance(task.labels, str) else None
    named["task.metric"] = _path_in(task.metric) if isinstance(task.metric, str) and ":" in task.metric else None
    return {key: name for key, name in named.items() if name}


def _path_in(source: str) -> str | None:
    """The file part of ``file.py:callable`` or a plain path; None for ``package.module:callable`` and zoo names."""
    path, colon, _ = source.rpartition(":")
    if colon:
        return path if path.endswith(".py") else None
    return source


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))  # noqa: T201  (this module's command)
