"""What a recipe says: its sections and their keys, and what is wrong with them in the user's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgepack.augment import words_of
from edgepack.errors import nearest
from edgepack.task import Input

Positive = Annotated[float, Field(gt=0)]
Table = dict[str, Any]
TEACHERS = ("original", "none")  # those of ``tune`` that are no files


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """Where the network comes from."""

    module: str = Field(description="file.py:callable, package.module:callable, timm:NAME, torchvision:NAME, "
                        "transformers:NAME, a .pt2 or an .onnx")  # fmt: skip
    weights: str | None = Field(default=None, description="safetensors, or a .pt/.pth that holds tensors only")
    options: Table = Field(default_factory=dict, description="keyword arguments of the callable")
    interpolate: bool = Field(default=False, description="fit the position embeddings of a vision transformer to the "
                              "task's image size")  # fmt: skip


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


class TrainingSection(DataSection):
    """Samples for passes that train, and how they are varied."""

    augment: str = Field(
        default="",
        description="crop-flip, pad-flip, crop, pad or flip: random, the same for image targets; crop mirrors borders, "
        "pad makes them black, as torchvision's RandomCrop(padding=…) does",
    )


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
    training: TrainingSection | None = None
    metric: str | Table | None = None
    loss: str | Table | None = Field(default=None, description="of passes that train; default: what the metric implies")
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


def read_sheet(table: Table, problems: list[str]) -> Sheet | None:
    """The sheet, or None; adds what is wrong to ``problems``."""
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
    if sheet.task.training is not None:
        try:
            words_of(sheet.task.training.augment)
        except ValueError as wrong:
            problems.append(f"task.training.augment: {wrong}")
    if sheet.task.evaluation and sheet.task.metric is None:
        problems.append('task.metric: missing; evaluation data need a metric such as "top1"')
    return sheet


def message(item: Mapping[str, Any], key: str = "key") -> str:
    """One of pydantic's errors as a clause; ``key`` is one that a section may have there."""
    kind, value = item["type"], item.get("input")
    if kind in ("list_type", "tuple_type"):
        text = "expected a list in square brackets"
    elif kind in ("dict_type", "model_type"):
        text = f"expected a table {{{key if kind == 'model_type' else 'key'} = …}}"
    else:
        text = str(item["msg"]).removeprefix("Value error, ")
        text = text[0].lower() + text[1:]
    if isinstance(value, str | int | float | bool) and kind != "value_error":
        return f"{text}, not {value!r}"
    if isinstance(value, list | tuple | dict) and kind.endswith("_type"):
        return f"{text}, not {'a table' if isinstance(value, dict) else 'a list'}"
    return text


def _problem(item: Mapping[str, Any]) -> str:
    where = ".".join(str(word) for word in item["loc"])
    if item["type"] == "extra_forbidden":
        *path, key = item["loc"]
        return f"{where}: unknown key, {nearest(str(key), _keys(path))}"
    if item["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {message(item, *_keys(item['loc'])[:1])}"


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


def files_named(sheet: Sheet) -> dict[str, str]:
    """Every file and folder the recipe names, by key."""
    task = sheet.task
    named = {"model.module": _path_in(sheet.model.module), "model.weights": sheet.model.weights}
    for key in ("calibration", "evaluation", "training"):
        section: DataSection | None = getattr(task, key)
        if section is not None:
            named[f"task.{key}.data"] = _path_in(section.data) if section.data else None
            named[f"task.{key}.inputs"], named[f"task.{key}.targets"] = section.inputs, section.targets
    named["task.labels"] = task.labels if isinstance(task.labels, str) else None
    for key, source in (("metric", task.metric), ("loss", task.loss)):
        named[f"task.{key}"] = _path_in(source) if isinstance(source, str) and ":" in source else None
    for index, entry in enumerate(sheet.compress):
        named |= _teachers(f"compress.{entry.get('use', index)}.tune", entry.get("tune"))
    return {key: name for key, name in named.items() if name}


def _teachers(where: str, tune: Any) -> dict[str, str | None]:
    """The files of another network that one is trained to follow."""
    table = tune if isinstance(tune, dict) else {}
    teacher, weights = table.get("teacher"), table.get("teacher_weights")
    return {
        f"{where}.teacher": _path_in(teacher) if isinstance(teacher, str) and teacher not in TEACHERS else None,
        f"{where}.teacher_weights": weights if isinstance(weights, str) else None,
    }


def _path_in(source: str) -> str | None:
    """The file part of ``file.py:callable`` or a plain path; None for ``package.module:callable`` and zoo names."""
    path, colon, _ = source.rpartition(":")
    if colon:
        return path if path.endswith(".py") else None
    return source
