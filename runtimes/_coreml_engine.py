"""Core ML itself, through coremltools, on a Mac."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgepack.artifact import Artifact
from edgepack.contracts import Arrays, TensorSpec
from edgepack.errors import InputError, require
from edgepack.runtimes._coreml_names import check_names, narrowed
from edgepack.runtimes._inputs import Gate


class Engine:
    """A loaded package."""

    def __init__(self, artifact: Artifact, package: Path, compute_units: str) -> None:
        ct = require("coremltools", "coreml-run")
        try:
            self._model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit[compute_units])
        except (RuntimeError, ValueError, OSError) as error:
            artifact.check_hashes()
            raise InputError(f"Core ML cannot load {package}: {error}", "export again") from error
        description = self._model.get_spec().description
        self._inputs = [feature.name for feature in description.input]
        self._outputs = [feature.name for feature in description.output]
        check_names(artifact, self._inputs, self._outputs)
        self._specs = artifact.manifest
        self._gate = Gate(artifact.manifest.inputs)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._gate.check(inputs)
        pairs = zip(self._inputs, self._specs.inputs, strict=True)
        found = self._model.predict({name: _feature(spec, inputs[spec.name]) for name, spec in pairs})
        return {
            spec.name: np.asarray(found[name]).astype(spec.dtype)
            for name, spec in zip(self._outputs, self._specs.outputs, strict=True)
        }

    def close(self) -> None:
        del self._model


def _feature(spec: TensorSpec, array: np.ndarray[Any, Any]) -> Any:
    if spec.dtype != "uint8":
        return narrowed(spec, array)
    image = require("PIL.Image", "coreml-run")
    return image.fromarray(array[0, :, :, 0] if array.shape[-1] == 1 else array[0])
