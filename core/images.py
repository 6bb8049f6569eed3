"""Image files as samples: folders of classes, and pairs of folders (picture → picture, picture → class mask).

Files are decoded one batch at a time. Geometry follows the usual evaluation protocol: bilinear resize of the short
side (with anti-aliasing), then a centre crop. Orientation tags are not applied, as in training pipelines.
"""

from __future__ import annotations

import csv
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgepack.data import Batch, DataSpec, grouped, prepare
from edgepack.errors import InputError, nearest
from edgepack.task import Input

Array = np.ndarray[Any, Any]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CLASS_COLUMNS = ("class_index", "label", "class")


@dataclass(frozen=True)
class ImageFiles(ABC):
    """Image files, read one by one when a batch asks for them."""

    item: Input
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Batch]:
        return self._batches(range(len(self)), size)

    def take(self, rows: Sequence[int]) -> Iterator[Batch]:
        return self._batches(rows, len(rows))

    def _batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        for group in grouped((self._read(int(index)) for index in rows), size):
            yield _batch(self.item, group)

    @abstractmethod
    def _read(self, index: int) -> tuple[dict[str, Array], Array | None]:
        """Raw pixels by input name, and the target."""


@dataclass(frozen=True)
class Folder(ImageFiles):
    """Image files with a class each, or none."""

    classes: tuple[int, ...] | None
    labels: tuple[str, ...] = ()

    def _read(self, index: int) -> tuple[dict[str, Array], Array | None]:
        target = None if self.classes is None else np.asarray(self.classes[index], dtype=np.int64)
        picture = _fit(_decode(self.files[index], MODES[self.item.channels or 3]), self.item)
        return {self.item.name: _pixels(picture)}, target


@dataclass(frozen=True)
class Pairs(ImageFiles):
    """Image files with an image file each: a picture (float32, 0…1, NCHW) or a mask (int64, NHW)."""

    targets: tuple[Path, ...]
    masks: bool
    labels: tuple[str, ...] = ()

    def _read(self, index: int) -> tuple[dict[str, Array], Array | None]:
        mode = MODES[self.item.channels or 3]
        pixels = _pixels(_decode(self.files[index], mode))
        wanted = self.item.crop_size
        if wanted is not None and pixels.shape[:2] != wanted:
            raise InputError(
                f"{self.files[index]} is {pixels.shape[0]}x{pixels.shape[1]}, input {self.item.name!r} is "
                f"{wanted[0]}x{wanted[1]}; pairs are not resized",
                "make height and width dynamic, or resize the files",
            )
        return {self.item.name: pixels}, self._target(self.targets[index], mode)

    def _target(self, path: Path, mode: str) -> Array:
        if self.masks:
            return np.asarray(_decode(path, None)).astype(np.int64)
        return _pixels(_decode(path, mode)).transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def open_folder(source: DataSpec, item: Input, folder: Path) -> Folder:
    """A folder of images with class sub-folders, a ``labels.csv``, or no classes at all.

    Classes take turns, each in an order drawn by ``seed``, so that the first N samples are balanced.
    """
    _check_channels(item, folder)
    labels = _read_labels(folder)
    table = folder / "labels.csv"
    files, names = _from_csv(table) if table.is_file() else _from_subfolders(folder)
    if not files:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    classes: list[int] | None = None
    if table.is_file() and all(name.isdecimal() for name in names):
        classes = [int(name) for name in names]
    elif names:
        classes, labels = _number(names, labels, folder)
    turns = _in_turns(classes or [0] * len(files), source.seed)[: source.samples]
    chosen = None if classes is None else tuple(classes[index] for index in turns)
    return Folder(item, tuple(files[index] for index in turns), chosen, labels)


def open_pairs(source: DataSpec, item: Input, folder: Path) -> Pairs:
    """Two folders whose files are matched by name, whatever their suffixes; in the order of the names."""
    _check_channels(item, folder / source.inputs)
    left, right = (_by_stem(folder / name) for name in (source.inputs, source.targets))
    alone = sorted(left.keys() ^ right.keys())
    if alone:
        side = source.targets if alone[0] in left else source.inputs
        raise InputError(f"{folder / side}: no partner for {alone[0]!r} ({len(alone)} files stand alone)")
    stems = sorted(left)[: source.samples]
    return Pairs(item, tuple(left[stem] for stem in stems), tuple(right[stem] for stem in stems), source.masks)


def _batch(item: Input, group: Sequence[tuple[dict[str, Array], Array | None]]) -> Batch:
    raw = np.stack([sample[0][item.name] for sample in group])
    targets = [sample[1] for sample in group if sample[1] is not None]
    return Batch({item.name: prepare(item, raw)}, {item.name: raw}, np.stack(targets) if targets else None)


def _check_channels(item: Input, where: Path) -> None:
    if item.channels not in MODES:
        raise InputError(f"{where}: images have 1, 3 or 4 channels, input {item.name!r} has {item.channels}")


def _decode(path: Path, mode: str | None) -> Image.Image:
    """Read one file; ``mode`` None keeps palette indices and gray values."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: {image.mode} pixels, only 8-bit images are read", "convert it or use .npz")
            if mode is None and image.mode not in ("P", "L", "1"):
                raise InputError(f"{path}: a mask must be a palette or gray image, this is {image.mode}")
            image.load()
            return image.copy() if mode is None else image.convert(mode)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image: {error}") from error


def _pixels(image: Image.Image) -> Array:
    """(H, W, C) uint8."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _fit(image: Image.Image, item: Input) -> Image.Image:
    """Resize the short side and crop the centre, as the input asks."""
    crop, (width, height) = item.crop_size, image.size
    if item.resize is not None:
        short = min(width, height)
        size = (item.resize * width // short, item.resize * height // short)
    elif crop is not None:
        factor = max(crop[0] / height, crop[1] / width)
        size = (max(crop[1], round(width * factor)), max(crop[0], round(height * factor)))
    else:
        return image
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    if crop is None:
        return image
    left, top = round((size[0] - crop[1]) / 2), round((size[1] - crop[0]) / 2)
    return image.crop((left, top, left + crop[1], top + crop[0]))


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    files = _images_in(folder)
    found = {path.stem: path for path in files}
    if not files:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    if len(found) != len(files):
        raise InputError(f"{folder}: two files share a name and differ only in the suffix")
    return found


def _from_subfolders(folder: Path) -> tuple[list[Path], list[str]]:
    below = [(path, child.name) for child in sorted(folder.iterdir()) if child.is_dir() for path in _images_in(child)]
    if below:
        return [path for path, _ in below], [name for _, name in below]
    return _images_in(folder), []


def _from_csv(path: Path) -> tuple[list[Path], list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path}: holds no rows")
    column = next((name for name in CLASS_COLUMNS if name in rows[0]), None)
    if column is None or "file" not in rows[0]:
        raise InputError(f"{path}: needs the columns 'file' and one of {', '.join(CLASS_COLUMNS)}; has {list(rows[0])}")
    for number, row in enumerate(rows, start=2):
        if not row["file"] or not row[column]:
            raise InputError(f"{path}: line {number}: 'file' or {column!r} is empty")
        if not (path.parent / row["file"]).is_file():
            raise InputError(f"{path}: line {number}: {row['file']} does not exist")
    return [path.parent / row["file"] for row in rows], [row[column].strip() for row in rows]


def _read_labels(folder: Path) -> tuple[str, ...]:
    path = folder / "labels.txt"
    return read_labels(path) if path.is_file() else ()


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names of a text file, one per line. Raises InputError."""
    try:
        labels = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not labels or not all(label.strip() for label in labels):
        raise InputError(f"{path}: must hold one class name per line, none empty")
    return tuple(label.strip() for label in labels)


def _number(names: list[str], order: tuple[str, ...], folder: Path) -> tuple[list[int], tuple[str, ...]]:
    """Class numbers and labels of class names: by labels.txt, else sorted."""
    unknown = sorted(set(names) - set(order))
    if order and not unknown:
        return [order.index(name) for name in names], order
    if order:
        raise InputError(f"{folder}: class {unknown[0]!r} is not in labels.txt", nearest(unknown[0], order))
    labels = tuple(sorted(set(names), key=lambda name: (int(name) if name.isdecimal() else -1, name)))
    return [labels.index(name) for name in names], labels


def _in_turns(classes: Sequence[int], seed: int) -> list[int]:
    """Indices, one of each class in turn."""
    random = np.random.default_rng(seed)
    numbers = np.asarray(classes)
    per_class = [random.permutation(np.flatnonzero(numbers == number)).tolist() for number in sorted(set(classes))]
    return [index for turn in itertools.zip_longest(*per_class) for index in turn if index is not None]
