"""The task: what a network is for — its named inputs, how raw data becomes them, its data and its metric.

Preprocessing is given once, with the input, and recorded from here in every artifact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack import samples
from edgepack.augment import words_of
from edgepack.contracts import Preprocessing, TensorSpec
from edgepack.errors import InputError, nearest

if TYPE_CHECKING:
    from edgepack.data import Data
    from edgepack.losses import Loss
    from edgepack.metrics import Metric

Array = np.ndarray[Any, Any]

DTYPES = ("float32", "float16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
AXES = {"batch": "N", "height": "H", "width": "W"}


@dataclass(frozen=True)
class Input:
    """One named input of the network, and how raw data becomes it: ``(raw / scale - mean) / std``.

    Attributes:
        name: as the network's argument is to be called in every artifact.
        shape: sizes including the batch axis, such as (1, 3, 32, 32); the example the network is captured on.
        dtype: NumPy name.
        layout: one letter per axis; default ``NCHW`` for 4-D float inputs with 1, 3 or 4 channels.
        mean: per channel (or one for all), in units of raw / scale; empty for zero.
        std: per channel (or one for all); empty for one.
        scale: divisor of raw values, 255 for 8-bit images.
        resize: short side in pixels before the centre crop of image files; None: just cover height and width.
        dynamic: axes of any size, among ``batch``, ``height``, ``width``; or a table name → axis; () for none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1.0
    resize: int | None = None
    dynamic: tuple[str, ...] | Mapping[str, int] = ("batch",)

    def __post_init__(self) -> None:
        for field in ("shape", "mean", "std"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not isinstance(self.dynamic, Mapping):
            object.__setattr__(self, "dynamic", tuple(self.dynamic))
        if self.layout is None and self._looks_like_image():
            object.__setattr__(self, "layout", "NCHW")
        self._check_form()
        self._check_preprocessing()
        self._check_dynamic()

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis → name, for the axes that may have any size."""
        if isinstance(self.dynamic, Mapping):
            return {axis % len(self.shape): name for name, axis in self.dynamic.items()}
        letters = self.layout or "N"
        return {letters.index(AXES[name]): name for name in self.dynamic}

    @property
    def batch_axis(self) -> int:
        """The axis called ``batch``, else the first."""
        return next((axis for axis, name in self.dynamic_axes.items() if name == "batch"), 0)

    @property
    def rows(self) -> int:
        """Size of the batch axis in one call: 1 where it is dynamic."""
        return 1 if self.batch_axis in self.dynamic_axes else self.shape[self.batch_axis]

    @property
    def whole(self) -> bool:
        """Whether there is no batch axis: fixed rows and no layout, so that a sample has the full shape."""
        return self.layout is None and self.rows > 1

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample in data files."""
        return self.shape if self.whole else self.shape[: self.batch_axis] + self.shape[self.batch_axis + 1 :]

    def stack(self, values: Sequence[Array]) -> Array:
        """Samples joined on the batch axis."""
        return np.concatenate(values, axis=0) if self.whole else np.stack(values, axis=self.batch_axis)

    @property
    def spec(self) -> TensorSpec:
        names = self.dynamic_axes
        shape = tuple(names.get(axis, size) for axis, size in enumerate(self.shape))
        return TensorSpec(self.name, self.dtype, shape, self.layout)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.scale, self.mean, self.std, self.resize, crop=self.crop_size is not None)

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width that image files are cropped to, None where the network takes any."""
        height, width = self.axis("H"), self.axis("W")
        if height is None or width is None or {height, width} & set(self.dynamic_axes):
            return None
        return self.shape[height], self.shape[width]

    @property
    def channels(self) -> int | None:
        axis = self.axis("C")
        return None if axis is None else self.shape[axis]

    def axis(self, letter: str) -> int | None:
        """Index of a layout letter; the batch is axis 0 where no layout is given."""
        if self.layout is None:
            return 0 if letter == "N" else None
        return self.layout.index(letter) if letter in self.layout else None

    def apply(self, raw: Array) -> Array:
        """Preprocess a batch whose axes are already in the input's order."""
        if self.preprocessing.identity:
            return np.ascontiguousarray(raw, dtype=self.dtype)
        values = raw.astype(np.float32) / np.float32(self.scale)
        values -= self._per_channel(self.mean or (0.0,))
        values /= self._per_channel(self.std or (1.0,))
        return np.ascontiguousarray(values, dtype=self.dtype)

    def _per_channel(self, values: tuple[float, ...]) -> Array:
        shape = [1] * len(self.shape)
        if len(values) > 1:
            shape[self.axis("C") or 0] = len(values)
        return np.asarray(values, dtype=np.float32).reshape(shape)

    def _looks_like_image(self) -> bool:
        return len(self.shape) == 4 and self.dtype.startswith("float") and self.shape[1] in (1, 3, 4)

    def _check_form(self) -> None:
        if not self.name:
            raise ValueError("an input needs a name")
        if not self.shape or any(not isinstance(size, int) or size < 1 for size in self.shape):
            raise ValueError(f"input {self.name!r}: shape is a list of sizes from 1, not {list(self.shape)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"input {self.name!r}: dtype {self.dtype!r} is not known, {nearest(self.dtype, DTYPES)}")
        if self.layout is not None and (sorted(set(self.layout)) != sorted(self.layout) or self.layout.find("N") > 0):
            raise ValueError(f"input {self.name!r}: layout {self.layout!r} repeats a letter or has N not first")
        if self.layout is not None and len(self.layout) != len(self.shape):
            raise ValueError(
                f"input {self.name!r}: layout {self.layout!r} names {len(self.layout)} axes, "
                f"shape {list(self.shape)} has {len(self.shape)}"
            )

    def _check_preprocessing(self) -> None:
        for word, values in (("mean", self.mean), ("std", self.std)):
            if len(values) > 1 and len(values) != self.channels:
                raise ValueError(
                    f"input {self.name!r}: {word} has {len(values)} values, expected 1 or one per channel "
                    f"({self.channels or 'none here: give a layout with C'})"
                )
        numbers = (self.scale, *self.std)
        if not all(math.isfinite(value) for value in (*numbers, *self.mean)) or min(numbers) <= 0:
            raise ValueError(f"input {self.name!r}: scale and std must be finite and above 0, mean finite")
        if not self.dtype.startswith("float") and not self.preprocessing.identity:
            raise ValueError(f"input {self.name!r} is {self.dtype}: scale, mean and std are for float inputs")
        if self.resize is not None and self.resize < max(self.crop_size or (1, 1)):
            raise ValueError(f"input {self.name!r}: resize {self.resize} is smaller than the input {self.crop_size}")

    def _check_dynamic(self) -> None:
        if isinstance(self.dynamic, Mapping):
            bad = [name for name, axis in self.dynamic.items() if not -len(self.shape) <= axis < len(self.shape)]
            if bad or len(self.dynamic_axes) != len(self.dynamic):
                raise ValueError(
                    f"input {self.name!r}: dynamic {dict(self.dynamic)} must name distinct axes of {list(self.shape)}"
                )
            return
        for name in self.dynamic:
            if name not in AXES:
                raise ValueError(f"input {self.name!r}: dynamic axis {name!r} is not known, {nearest(name, AXES)}")
            if self.axis(AXES[name]) is None:
                raise ValueError(f"input {self.name!r}: dynamic axis {name!r} needs a layout with {AXES[name]!r}")


@dataclass(frozen=True)
class Task:
    """What the network is for.

    Attributes:
        inputs: in the order of the network's arguments.
        calibration: samples that represent what the network will see.
        evaluation: samples with targets, scored by ``metric``.
        training: samples for passes that train; with targets, or without.
        augment: how training images are varied: ``crop`` or ``pad``, ``flip``, ``crop-flip`` …; empty for not at all.
        metric: how outputs are scored.
        loss: what training makes small; None: what the metric implies.
        labels: class names, empty if unknown.
        output_names: names of the network's outputs in artifacts, empty for default names.
    """

    inputs: tuple[Input, ...]
    calibration: Data | None = None
    evaluation: Data | None = None
    training: Data | None = None
    metric: Metric | None = None
    labels: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    augment: str = ""
    loss: Loss | None = None

    def __post_init__(self) -> None:
        words_of(self.augment)
        names = [item.name for item in self.inputs]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a task needs at least one input and distinct names, not {names}")

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The inputs with dynamic axes replaced by their names."""
        return tuple(item.spec for item in self.inputs)

    @property
    def preprocessing(self) -> dict[str, Preprocessing]:
        return {item.name: item.preprocessing for item in self.inputs}

    @property
    def has_data(self) -> bool:
        return self.calibration is not None or self.evaluation is not None

    def samples(self, count: int, seed: int = 0) -> dict[str, Array]:
        """Preprocessed inputs of ``count`` samples, stacked as ``edgepack.samples`` says, all of one size.

        The first calibration samples, else the first evaluation samples, else noise: random pixels through the
        preprocessing of inputs that have a scale, normal numbers for others. Fewer where the data hold fewer of the
        first sample's size. For a fixed batch of k images, a sample is k of them.

        Raises:
            InputError: the data hold less than one sample.
        """
        data = self.calibration if self.calibration is not None else self.evaluation
        if data is None:
            return self._noise(count, seed)
        per_sample = max(1 if item.whole else item.rows for item in self.inputs)
        stack = samples.join(self.specs, self._first(data, count * per_sample))
        found = min(count, *(samples.count([spec], stack) for spec in self.specs))
        if found == 0:
            raise InputError(f"the data hold less than one batch of {per_sample} samples, which the input's shape asks")
        return samples.take(self.specs, stack, 0, found)

    def _noise(self, count: int, seed: int) -> dict[str, Array]:
        random = np.random.default_rng(seed)
        noise = {}
        for item in self.inputs:
            shape = list(item.shape)
            shape[item.batch_axis] = count * item.rows
            pixels = item.scale != 1.0 and item.dtype.startswith("float")
            noise[item.name] = (
                item.apply(random.integers(0, 256, shape)) if pixels else _random(random, shape, item.dtype)
            )
        return noise

    def _first(self, data: Data, count: int) -> list[Mapping[str, Array]]:
        """Batches of the first one's sizes, until there are ``count`` rows."""
        parts: list[Mapping[str, Array]] = []
        missing = count
        for batch in data.batches(count):
            if parts and self._sizes(batch.inputs) != self._sizes(parts[0]):
                continue
            parts.append(batch.inputs)
            missing -= len(batch)
            if missing <= 0:
                break
        return parts

    def _sizes(self, arrays: Mapping[str, Array]) -> list[list[int]]:
        shapes = [(arrays[item.name].shape, item.batch_axis) for item in self.inputs]
        return [[size for axis, size in enumerate(shape) if axis != batch] for shape, batch in shapes]


def _random(random: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    """Normal values; 0 or 1 for integers, which are valid as indices of nearly any table."""
    if dtype.startswith("float"):
        return random.standard_normal(shape, dtype=np.float32).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)
