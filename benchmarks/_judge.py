"""Calls an artifact on images, and compares what it answers with the float network and the targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from _cases import Array, Call, Case

from edgepack import parts
from edgepack.artifact import Artifact
from edgepack.contracts import Runtime
from edgepack.samples import has_dynamic_batch

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "tflite": "tflite", "coreml": "coreml", "c": "c"}


def encoded(artifact: Artifact, images: Array) -> Array:
    """Images (N, C, H, W) as the artifact takes them: its layout, and its integers where it takes these."""
    spec = artifact.manifest.inputs[0]
    values = np.moveaxis(images, 1, -1) if spec.layout == "NHWC" else images
    if not spec.dtype.startswith("float"):
        scale, zero = _grid(artifact, "input")
        values = np.clip(np.rint(values / scale) + zero, *_limits(spec.dtype))
    return np.ascontiguousarray(values, dtype=spec.dtype)


def decoded(artifact: Artifact, values: Array) -> Array:
    if values.dtype.kind == "f":
        return values
    scale, zero = _grid(artifact, "output")
    return np.asarray((values.astype(np.float32) - zero) * np.float32(scale))


def _limits(dtype: str) -> tuple[int, int]:
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def _grid(artifact: Artifact, side: str) -> tuple[float, int]:
    """Scale and zero of a TFLite file's only input or output."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(artifact.file(".tflite")))
    (port,) = getattr(interpreter, f"get_{side}_details")()
    scale, zero = port["quantization"]
    return float(scale), int(zero)


def caller(artifact: Artifact, stack: ExitStack, runtime: Runtime | None = None) -> Call:
    """Images in, scores out, as many at once as the file allows; one thread."""
    runtime = runtime or parts.find(Runtime, ENGINES[artifact.manifest.format])()
    session = runtime.load(artifact, None if artifact.manifest.format == "coreml" else 1)
    stack.callback(session.close)
    name = artifact.manifest.inputs[0].name
    many = has_dynamic_batch(artifact.manifest.inputs)

    def call(images: Array) -> Array:
        values = encoded(artifact, images)
        groups = [values] if many else [values[row : row + 1] for row in range(len(values))]
        found = [next(iter(session.run({name: group}).values())) for group in groups]
        return decoded(artifact, np.concatenate(found))

    return call


@dataclass
class Tally:
    """Sums over all images."""

    case: Case
    this: list[Array] = field(default_factory=list)
    original: list[Array] = field(default_factory=list)
    same: int = 0
    samples: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, number: int, call: Call, limit: int | None = None) -> None:
        """Everything of one fold, or its first ``limit`` images."""
        left = math.inf if limit is None else limit
        for (images, targets), answers in zip(
            self.case.folds[number].batches(), self.case.answers[number], strict=True
        ):
            count = int(min(left, len(images)))
            if count > 0:
                self._add(call(images[:count]), answers[:count], None if targets is None else targets[:count])
            left -= count

    def _add(self, found: Array, answers: Array, targets: Array | None) -> None:
        found = found.reshape(answers.shape)
        if self.case.metric is not None and targets is not None:
            self.this.append(self.case.metric.statistics(found, targets))
            self.original.append(self.case.metric.statistics(answers, targets))
        if self.case.classifies:
            self.same += int((found.argmax(1) == answers.argmax(1)).sum())
        self.samples += len(answers)
        self.signal += float((answers.astype(np.float64) ** 2).sum())
        self.noise += float(((found.astype(np.float64) - answers) ** 2).sum())

    def result(self) -> Mapping[str, Any]:
        """Score and what was lost of it in the metric's unit (points, dB), agreement in %, SQNR in dB."""
        metric = self.case.metric
        factor = 100.0 if metric is None or metric.unit == "%" else 1.0
        score = [None if metric is None else factor * metric.reduce(np.concatenate(rows)) if rows else None
                 for rows in (self.this, self.original)]  # fmt: skip
        return {
            "score": _rounded(score[0]),
            "float_score": _rounded(score[1]),
            "lost": None if score[0] is None or score[1] is None else _rounded(score[1] - score[0]),
            "agreement": _rounded(100 * self.same / self.samples) if self.case.classifies else None,
            "sqnr_db": None if self.noise == 0 else round(10 * math.log10(self.signal / self.noise), 2),
            "samples": self.samples,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
