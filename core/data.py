"""Where samples come from: ``.npz`` files, image folders, pairs of image folders, and the user's own callables.

Everything is read lazily enough to stay within a batch of memory for images; arrays of a ``.npz`` stay as they are
stored and become floats batch by batch. Nothing is ever unpickled.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepack import usercode
from edgepack.errors import InputError, nearest

if TYPE_CHECKING:
    from edgepack.task import Input

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """Samples of one size.

    Attributes:
        inputs: what the network takes, by input name, preprocessed, in the input's layout and dtype.
        raw: as read, samples on axis 0; images are (N, H, W, C), 8-bit where the file is.
        targets: one row per sample, None where the data have none.
    """

    inputs: Mapping[str, Array]
    raw: Mapping[str, Array]
    targets: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.raw.values())))


class Data(Protocol):
    """Samples that can be read again and again, always in the same order."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names as the data know them, empty if they do not."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in batches of at most ``size``. Raises InputError for a sample that cannot be read."""

    def take(self, rows: Sequence[int]) -> Iterator[Batch]:
        """These samples in this order; neighbours of one size come as one batch."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a recipe says about data; paths are relative to the recipe.

    Attributes:
        data: a ``.npz``, a folder of images, or ``file.py:callable``.
        inputs, targets: instead of ``data``, two folders of images matched by file name.
        samples: use only this many: the first of a ``.npz`` or callable, class by class in turn of a folder.
        seed: orders the images within each class.
        prefix: of the arrays in a ``.npz``: ``test_`` reads ``test_x`` and ``test_y``.
        layout: ``NCHW`` or ``NHWC`` of the images in a ``.npz``, where their shape leaves it open.
        masks: targets are class indices per pixel (palette or gray images) instead of pictures.
        options: keyword arguments of the callable.
    """

    data: str = ""
    inputs: str = ""
    targets: str = ""
    samples: int | None = None
    seed: int = 0
    prefix: str = ""
    layout: str | None = None
    masks: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.inputs) or bool(self.inputs) != bool(self.targets):
            raise ValueError("give either data, or both inputs and targets")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")
        if self.layout not in (None, "NCHW", "NHWC"):
            raise ValueError(f"layout is 'NCHW' or 'NHWC', not {self.layout!r}")


def open_data(spec: DataSpec | Mapping[str, Any] | str, inputs: tuple[Input, ...], folder: Path) -> Data:
    """Open the data that a recipe names and check what can be checked without reading every image.

    ``.npz``: arrays ``x`` (one input) or named as the inputs, and ``y``. Images as (N, C, H, W), (N, H, W, C), or
    (N, H, W) for one channel. Folder: one sub-folder per class, or ``labels.csv`` with ``file`` and one of
    ``class_index``, ``label``, ``class``; ``labels.txt`` may give the classes' order, one per line. Callable: returns
    ``(x, y)`` arrays or samples ``(input, target)``, where an input is an array or a table by input name, already
    preprocessed; an iterator is read once and kept.

    Raises:
        InputError: a file is missing, damaged, empty, or does not fit the inputs.
    """
    source = _spec(spec)
    if source.inputs:
        from edgepack.images import open_pairs

        return open_pairs(source, _only(inputs, source.inputs), folder)
    if usercode.is_source(source.data):
        return _open_callable(source, inputs, folder)
    path = folder / source.data
    if path.is_dir():
        from edgepack.images import open_folder

        return open_folder(source, _only(inputs, source.data), path)
    if path.suffix == ".npz":
        return _open_npz(source, inputs, path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    raise InputError(f"{path}: data are a .npz, a folder of images, or file.py:callable")


def _spec(spec: DataSpec | Mapping[str, Any] | str) -> DataSpec:
    if isinstance(spec, DataSpec):
        return spec
    given = {"data": spec} if isinstance(spec, str) else spec
    table: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    known = [item.name for item in fields(DataSpec)]
    for key in table:
        if key not in known:
            raise InputError(f"data {table}: unknown key {key!r}", nearest(key, known))
    try:
        return DataSpec(**table)
    except ValueError as error:
        raise InputError(f"data {table}: {error}") from error


def _only(inputs: tuple[Input, ...], where: str) -> Input:
    if len(inputs) != 1 or not {"C", "H", "W"} <= set(inputs[0].layout or ""):
        raise InputError(
            f"{where}: image files feed one image input with a layout such as NCHW, the task has "
            f"{[f'{item.name} {list(item.shape)}' for item in inputs]}",
            "use a .npz with one array per input, or file.py:callable",
        )
    return inputs[0]


# --- arrays -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """Samples that lie in memory.

    Attributes:
        inputs: the task's.
        raw: by input name, samples on axis 0, images as (N, H, W, C).
        targets: one row per sample.
        ready: already preprocessed and in the input's axis order.
    """

    inputs: tuple[Input, ...]
    raw: Mapping[str, Array]
    targets: Array | None
    ready: bool = False
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.raw.values())))

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self._batch(slice(start, start + size))

    def take(self, rows: Sequence[int]) -> Iterator[Batch]:
        yield self._batch(np.asarray(rows))

    def _batch(self, rows: slice | Array) -> Batch:
        raw = {name: array[rows] for name, array in self.raw.items()}
        inputs = {item.name: prepare(item, raw[item.name], self.ready) for item in self.inputs}
        return Batch(inputs, raw, None if self.targets is None else self.targets[rows])


def prepare(item: Input, raw: Array, ready: bool = False) -> Array:
    """Raw samples (images as (N, H, W, C)) → one batch of a network input."""
    if ready:
        return item.stack(list(raw.astype(item.dtype, copy=False)))
    order = _order(item)
    values = raw if order is None else raw.transpose(0, *(1 + "HWC".index(letter) for letter in order))
    if item.batch_axis == 0 and not item.whole:
        return item.apply(values)
    return item.apply(item.stack(list(values)))


def _order(item: Input) -> str | None:
    """The axes of one image in the input's order, such as ``CHW``; None if the input is not an image."""
    order = (item.layout or "").replace("N", "")
    return order if sorted(order) == ["C", "H", "W"] and item.axis("N") == 0 else None


def _open_npz(source: DataSpec, inputs: tuple[Input, ...], path: Path) -> Arrays:
    arrays = _read_npz(path, source.prefix)
    raw = {item.name: _images_last(item, *_array_of(item, inputs, arrays, source, path), source) for item in inputs}
    return _checked(Arrays(inputs, raw, arrays.get(f"{source.prefix}y")), path, source.samples)


def _read_npz(path: Path, prefix: str) -> dict[str, Array]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as stream:  # given a path, NumPy leaves it open when the archive is damaged
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: a single array, not a .npz", "write numpy.savez_compressed(path, x=…, y=…)")
            return {key: file[key] for key in file.files if key.startswith(prefix)}
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a .npz, or damaged: {error}") from error
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise InputError(f"{path}: holds pickled objects, which are never loaded", "store plain arrays") from error
        raise InputError(f"{path}: not a .npz, or damaged: {error}") from error


def _array_of(
    item: Input, inputs: tuple[Input, ...], arrays: Mapping[str, Array], source: DataSpec, path: Path
) -> tuple[Array, str]:
    """The input's array and a word for messages."""
    names = [source.prefix + item.name] + ([f"{source.prefix}x"] if len(inputs) == 1 else [])
    for name in names:
        if name in arrays:
            return arrays[name], f"{path}: {name}"
    prefixes = [key[:-1] for key in arrays if key.endswith("_x")]
    hint = f"choose prefix = {prefixes[0]!r}" if prefixes else f"it holds: {', '.join(arrays) or 'nothing'}"
    raise InputError(f"{path}: there is no array {' or '.join(map(repr, reversed(names)))}", hint)


def _images_last(item: Input, array: Array, where: str, source: DataSpec) -> Array:
    """Check one array's shape; move the channels of images to the end."""
    order = _order(item)
    if order is None:
        _check_shape(item, array, where)
        return array
    given = {"NCHW": ("CHW",), "NHWC": ("HWC", "HW"), None: ("CHW", "HWC", "HW")}[source.layout]
    sizes = dict(zip(order, _pattern(item), strict=True))
    fits = [letters for letters in given if _fits(array.shape[1:], [sizes[letter] for letter in letters])]
    fits = [letters for letters in fits if letters != "HW" or item.channels == 1]
    if not fits:
        names = ["(" + ", ".join(["N", *(str(sizes[c] or c) for c in letters)]) + ")" for letters in given[:2]]
        raise InputError(f"{where} has shape {array.shape}, expected {' or '.join(names)} for input {item.name!r}")
    if len(fits) > 1:
        raise InputError(
            f"{where} has shape {array.shape}: channels may be first or last", "say layout = 'NCHW' or 'NHWC'"
        )
    if fits == ["HW"]:
        return array[..., None]
    return array.transpose(0, *(1 + fits[0].index(letter) for letter in "HWC"))


def _pattern(item: Input) -> list[int | None]:
    """Shape of one sample, None where any size is allowed."""
    free = item.dynamic_axes
    axes = [axis for axis in range(len(item.shape)) if item.whole or axis != item.batch_axis]
    return [None if axis in free else item.shape[axis] for axis in axes]


def _fits(shape: Sequence[int], pattern: Sequence[int | None]) -> bool:
    pairs = zip(shape, pattern, strict=False)
    return len(shape) == len(pattern) and all(want in (None, size) for size, want in pairs)


def _check_shape(item: Input, array: Array, where: str, one: bool = False) -> None:
    shape, pattern = array.shape if one else array.shape[1:], _pattern(item)
    if (array.ndim == 0 and not one) or not _fits(shape, pattern):
        wanted = ", ".join(([] if one else ["N"]) + ["any" if size is None else str(size) for size in pattern])
        raise InputError(f"{where} has shape {array.shape}, expected ({wanted}) for input {item.name!r}")


def _checked(data: Arrays, where: object, limit: int | None) -> Arrays:
    """Check dtypes, lengths and values, and keep the first ``limit`` samples."""
    lengths = {name: len(array) for name, array in data.raw.items()}
    if data.targets is not None:
        lengths["y"] = len(data.targets) if data.targets.ndim else 0
    if len(set(lengths.values())) > 1:
        raise InputError(f"{where}: lengths differ: {', '.join(f'{name} {n}' for name, n in lengths.items())}")
    if not len(data):
        raise InputError(f"{where}: holds no samples")
    raw = {name: array[:limit] for name, array in data.raw.items()}
    targets = None if data.targets is None else data.targets[:limit]
    for item in data.inputs:
        _check_values(raw[item.name], f"{where}: {item.name}", item.dtype)
    if targets is not None:
        _check_values(targets, f"{where}: y")
    return Arrays(data.inputs, raw, targets, data.ready)


def _check_values(array: Array, where: str, dtype: str | None = None) -> None:
    if array.dtype.kind not in "buif":
        raise InputError(f"{where} is {array.dtype}, expected numbers")
    if dtype is not None and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InputError(f"{where} is {array.dtype}, which does not fit {dtype}")
    if array.dtype.kind == "f":
        finite = np.isfinite(array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)).all(axis=1)
        if not finite.all():
            raise InputError(f"{where} holds NaN or infinity, first in sample {int(np.argmin(finite))}")


# --- callables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Samples that the user's code gives one at a time, already preprocessed."""

    inputs: tuple[Input, ...]
    items: Sequence[Any]
    where: str
    length: int
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def batches(self, size: int) -> Iterator[Batch]:
        return self._batches(range(self.length), size)

    def take(self, rows: Sequence[int]) -> Iterator[Batch]:
        return self._batches(rows, len(rows))

    def _batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        for group in grouped((self._read(int(index)) for index in rows), size):
            raw = {item.name: np.stack([one[0][item.name] for one in group]) for item in self.inputs}
            inputs = {item.name: prepare(item, raw[item.name], ready=True) for item in self.inputs}
            targets = None if group[0][1] is None else np.stack([one[1] for one in group if one[1] is not None])
            yield Batch(inputs, raw, targets)

    def _read(self, index: int) -> tuple[dict[str, Array], Array | None]:
        where = f"{self.where}: sample {index}"
        with usercode.blaming(where):
            sample = self.items[index]
            given, target = sample if isinstance(sample, (tuple, list)) and len(sample) == 2 else (sample, None)
            tables = given if isinstance(given, Mapping) else {self.inputs[0].name: given}
            arrays = {str(name): np.asarray(value) for name, value in tables.items()}
            wanted = None if target is None else np.asarray(target)
        if set(arrays) != {item.name for item in self.inputs}:
            raise InputError(f"{where} gives inputs {sorted(arrays)}, expected {[item.name for item in self.inputs]}")
        for item in self.inputs:
            _check_shape(item, arrays[item.name], where, one=True)
            _check_values(arrays[item.name][None], where, item.dtype)
        if wanted is not None:
            _check_values(wanted[None], f"{where}: target")
        return arrays, wanted


def grouped(
    samples: Iterable[tuple[dict[str, Array], Array | None]], size: int
) -> Iterator[list[tuple[dict[str, Array], Array | None]]]:
    """Neighbours of equal shapes, at most ``size`` together."""

    def shapes(sample: tuple[dict[str, Array], Array | None]) -> tuple[Any, ...]:
        return (*(array.shape for array in sample[0].values()), None if sample[1] is None else sample[1].shape)

    for _, same in itertools.groupby(samples, shapes):
        while group := list(itertools.islice(same, size)):
            yield group


def _open_callable(source: DataSpec, inputs: tuple[Input, ...], folder: Path) -> Data:
    given = usercode.call(source.data, folder, source.options)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], (np.ndarray, Mapping)):
        return _from_arrays(given[0], given[1], source, inputs)
    with usercode.blaming(source.data):
        if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
            given = list(itertools.islice(iter(given), source.samples))
        length = len(given)
    if not length:
        raise InputError(f"{source.data}: gives no samples")
    data = Samples(inputs, given, source.data, min(length, source.samples or length))
    next(data.batches(1))  # the first sample shows most mistakes before any work is done
    return data


def _from_arrays(x: Any, y: Any, source: DataSpec, inputs: tuple[Input, ...]) -> Arrays:
    tables = x if isinstance(x, Mapping) else {inputs[0].name: x}
    if set(tables) != {item.name for item in inputs}:
        raise InputError(f"{source.data} gives inputs {sorted(tables)}, expected {[item.name for item in inputs]}")
    raw = {name: np.asarray(array) for name, array in tables.items()}
    for item in inputs:
        _check_shape(item, raw[item.name], source.data)
    return _checked(Arrays(inputs, raw, None if y is None else np.asarray(y), True), source.data, source.samples)
