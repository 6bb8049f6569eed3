"""How outputs are scored: per-sample statistics, a number reduced from them, and its 95 % interval.

Statistics are per sample so that intervals, subsets and comparisons need no second run. An interval is Wilson's for
shares of samples (0 or 1 each), else the percentile bootstrap with a fixed seed; its unit is the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepack import usercode
from edgepack.errors import InputError, nearest
from edgepack.statistics import bootstrap, wilson

Array = np.ndarray[Any, Any]

IGNORED = 255


def mean(statistics: Array) -> float:
    return float(statistics[:, 0].mean())


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One score.

    Attributes:
        name: as the recipe calls it.
        score: (outputs, targets) → one row of statistics per sample; use ``statistics``, which checks.
        combine: rows of statistics → the score; accuracies are 0…1.
        unit: ``%`` for shares, ``dB``, or empty.
        needs_original: the targets are the original network's outputs, no labels needed.
        output: the output that is scored, the first by default.
    """

    name: str
    score: Callable[[Array, Array], Array]
    combine: Callable[[Array], float] = mean
    unit: str = ""
    higher_is_better: bool = True
    needs_original: bool = False
    output: str | None = None

    def pick(self, outputs: Mapping[str, Array]) -> Array:
        """The array to score. Raises InputError when the network has no such output."""
        if self.output is None:
            return next(iter(outputs.values()))
        if self.output not in outputs:
            raise InputError(f"metric {self.name}: no output {self.output!r}", nearest(self.output, outputs))
        return outputs[self.output]

    def statistics(self, outputs: Array, targets: Array | None) -> Array:
        """Float64 rows, one per sample. Raises InputError when outputs and targets do not fit the metric."""
        if targets is None:
            raise InputError(f"metric {self.name} needs targets, the data have none", "give y, or metric = 'agreement'")
        if len(outputs) != len(targets):
            raise InputError(f"metric {self.name}: {len(outputs)} outputs and {len(targets)} targets")
        rows = np.asarray(self.score(outputs, targets), dtype=np.float64)
        if rows.ndim not in (1, 2) or len(rows) != len(outputs):
            raise InputError(f"metric {self.name}: gives shape {rows.shape}, expected one row per sample")
        return rows.reshape(len(rows), -1)

    def reduce(self, statistics: Array) -> float:
        return self.combine(statistics)

    def interval(self, statistics: Array, seed: int = 0) -> tuple[float, float]:
        """95 % interval of the score for other samples of the same kind."""
        if self.combine is mean and np.isin(statistics[:, 0], (0.0, 1.0)).all():
            found = wilson(int(statistics[:, 0].sum()), len(statistics))
        else:
            found = bootstrap(statistics, self.combine, seed=seed)
        return found.low, found.high

    def format(self, value: float) -> str:
        """``91.69 %``, ``37.91 dB``, ``0.1234``."""
        if self.unit == "%":
            return f"{100 * value:.2f} %"
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.4g}"


def find(spec: str | Mapping[str, Any], folder: Path) -> Metric:
    """The metric a recipe names: a word, ``file.py:callable``, or a table with ``use`` and options.

    A callable takes (outputs, targets) and returns one value per sample, which are averaged; its table may say
    ``unit`` and ``higher_is_better``. Every table may say ``output``.

    Raises:
        InputError: no such metric or option, with the nearest.
    """
    options = {"use": spec} if isinstance(spec, str) else dict(spec)
    use = str(options.pop("use", ""))
    output = options.pop("output", None)
    if usercode.is_source(use):
        return _from_code(use, folder, options, output)
    if use not in METRICS:
        raise InputError(f"there is no metric {use!r}", nearest(use, METRICS))
    metric, known = METRICS[use]
    for key, value in options.items():
        if key not in known:
            raise InputError(f"metric {use}: unknown option {key!r}", nearest(key, (*known, "output")))
        if not isinstance(value, (int, float)) or value < 0:
            raise InputError(f"metric {use}: {key} is a number from 0, not {value!r}")
    return Metric(**{**metric, "name": use, "score": partial(metric["score"], **options), "output": output})


def _from_code(use: str, folder: Path, options: dict[str, Any], output: str | None) -> Metric:
    function = usercode.load(use, folder)
    known = ("unit", "higher_is_better")
    for key in options:
        if key not in known:
            raise InputError(f"metric {use}: unknown option {key!r}", nearest(key, (*known, "output")))

    def score(outputs: Array, targets: Array) -> Array:
        with usercode.blaming(use):
            return np.asarray(function(outputs, targets))

    return Metric(name=use, score=score, output=output, **options)


def top(outputs: Array, targets: Array, k: int) -> Array:
    """1 where the target is among the k highest scores; ties count by class number, NaN as wrong."""
    labels = targets.reshape(len(targets), -1)
    if outputs.ndim != 2 or labels.shape[1] != 1 or targets.dtype.kind not in "iu":
        raise InputError(
            f"top-{k} takes outputs (N, classes) and integer targets (N,), not {outputs.shape} and "
            f"{targets.dtype} {targets.shape}"
        )
    classes = outputs.shape[1]
    if k > classes:
        raise InputError(f"top-{k} of {classes} classes is always right")
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"labels reach from {labels.min()} to {labels.max()}, the output has {classes} classes")
    own = np.take_along_axis(outputs, labels, axis=1)
    before = (outputs > own) | ((outputs == own) & (np.arange(classes) < labels))
    return np.asarray((before.sum(axis=1) < k) & ~np.isnan(outputs).any(axis=1))


def psnr(outputs: Array, targets: Array, peak: float = 1.0, border: int = 0) -> Array:
    """Peak signal-to-noise ratio of each image, dB; identical images count as 100 dB."""
    _same_shape("psnr", outputs, targets)
    return _decibel(_crop(outputs, border).astype(np.float64), _crop(targets, border).astype(np.float64), peak)


def psnr_y(outputs: Array, targets: Array, border: int = 2) -> Array:
    """PSNR of the luma as super-resolution papers report it: (N, 3, H, W) in 0…1, rounded to 8 bits, border cut."""
    _same_shape("psnr_y", outputs, targets)
    if outputs.ndim != 4 or outputs.shape[1] != 3:
        raise InputError(f"psnr_y takes RGB images (N, 3, H, W), not {outputs.shape}")
    return _decibel(_luma(_crop(outputs, border)), _luma(_crop(targets, border)), 255.0)


def squares(outputs: Array, targets: Array) -> Array:
    """Sum of squared errors and number of elements."""
    _same_shape("rmse", outputs, targets)
    errors = (outputs.astype(np.float64) - targets).reshape(len(outputs), -1)
    return np.stack([(errors**2).sum(axis=1), np.full(len(errors), errors.shape[1])], axis=1)


def root_mean(statistics: Array) -> float:
    return math.sqrt(statistics[:, 0].sum() / statistics[:, 1].sum())


def overlaps(outputs: Array, targets: Array) -> Array:
    """Intersection of every class, then union of every class; pixels labelled 255 or below 0 are left out."""
    if outputs.ndim != targets.ndim + 1 or outputs.shape[2:] != targets.shape[1:] or targets.dtype.kind not in "iu":
        raise InputError(
            f"mean_iou takes scores (N, classes, …) and integer classes (N, …), not {outputs.shape} and "
            f"{targets.dtype} {targets.shape}"
        )
    classes = outputs.shape[1]
    wanted = targets.reshape(len(targets), -1).astype(np.int64)
    counted = (wanted >= 0) & (wanted != IGNORED)
    if (wanted[counted] >= classes).any():
        raise InputError(f"labels reach {wanted[counted].max()}, the output has {classes} classes")
    found = outputs.argmax(axis=1).reshape(len(outputs), -1)
    is_found = [((found == number) & counted) for number in range(classes)]
    is_wanted = [((wanted == number) & counted) for number in range(classes)]
    both = [(one & other).sum(axis=1) for one, other in zip(is_found, is_wanted, strict=True)]
    either = [(one | other).sum(axis=1) for one, other in zip(is_found, is_wanted, strict=True)]
    return np.stack([*both, *either], axis=1)


def mean_overlap(statistics: Array) -> float:
    """Mean over the classes that occur at all."""
    both, either = np.split(statistics.sum(axis=0), 2)
    present = either > 0
    return float((both[present] / either[present]).mean()) if present.any() else 0.0


def agree(outputs: Array, targets: Array) -> Array:
    """Share of each sample's positions where both have the same highest class (axis 1); NaN never agrees."""
    _same_shape("agreement", outputs, targets)
    if outputs.ndim < 2:
        raise InputError(f"agreement takes scores (N, classes, …), not {outputs.shape}")
    same = (outputs.argmax(axis=1) == targets.argmax(axis=1)) & ~np.isnan(outputs).any(axis=1)
    return np.asarray(same.reshape(len(same), -1).mean(axis=1))


def _same_shape(name: str, outputs: Array, targets: Array) -> None:
    if outputs.shape != targets.shape:
        raise InputError(f"{name}: outputs {outputs.shape} and targets {targets.shape} differ in shape")


def _crop(images: Array, border: int) -> Array:
    if not border:
        return images
    if min(images.shape[-2:]) <= 2 * border:
        raise InputError(f"a border of {border} leaves nothing of images {images.shape}")
    return images[..., border:-border, border:-border]


def _luma(images: Array) -> Array:
    """ITU-R BT.601 luma 16…235 of RGB in 0…1, from and to whole 8-bit values."""
    pixels = np.clip(images.astype(np.float64) * 255, 0, 255).round()
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return np.asarray((np.einsum("nchw,c->nhw", pixels, weights) + 16).round())


def _decibel(one: Array, other: Array, peak: float) -> Array:
    error = ((one - other) ** 2).reshape(len(one), -1).mean(axis=1)
    return np.asarray(10 * np.log10(peak**2 / np.maximum(error, peak**2 * 1e-10)))


METRICS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "top1": ({"score": partial(top, k=1), "unit": "%"}, ()),
    "top5": ({"score": partial(top, k=5), "unit": "%"}, ()),
    "psnr": ({"score": psnr, "unit": "dB"}, ("peak", "border")),
    "psnr_y": ({"score": psnr_y, "unit": "dB"}, ("border",)),
    "rmse": ({"score": squares, "combine": root_mean, "higher_is_better": False}, ()),
    "mean_iou": ({"score": overlaps, "combine": mean_overlap, "unit": "%"}, ()),
    "agreement": ({"score": agree, "unit": "%", "needs_original": True}, ()),
}
