"""A Core ML package, interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepack.artifact import Artifact
from edgepack.contracts import Arrays, Step
from edgepack.errors import InputError, require
from edgepack.runtimes._coreml_names import check_names, narrowed
from edgepack.runtimes._inputs import Gate
from edgepack.runtimes._mil import Operator, Program

DAMAGES = (ValueError, TypeError, AssertionError, LookupError, AttributeError, RuntimeError, OSError)


class Interpreter:
    """A loaded package."""

    def __init__(self, artifact: Artifact, package: Path, rounds: bool, threads: int | None) -> None:
        decode_error = require("google.protobuf.message", "coreml-run").DecodeError
        try:
            self._program = Program.load(package, rounds)
        except (decode_error, *DAMAGES) as error:
            artifact.check_hashes()
            sentence = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(f"coremltools cannot read {package}: {sentence}", "export again") from error
        check_names(artifact, self._program.inputs, self._program.outputs)
        self._specs = artifact.manifest
        self._gate = Gate(artifact.manifest.inputs)
        self._threads = threads or torch.get_num_threads()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        # The number of threads is one per process, and other sessions may want another.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        found = self._program.run(self._tensors(inputs))
        return {
            spec.name: found[name].numpy().astype(spec.dtype)
            for name, spec in zip(self._program.outputs, self._specs.outputs, strict=True)
        }

    def trace(self, inputs: Arrays) -> list[Step]:
        names = dict(zip(self._program.inputs, (spec.name for spec in self._specs.inputs), strict=True))
        steps: list[Step] = []

        def watch(operator: Operator, results: Mapping[str, torch.Tensor]) -> None:
            sources = [names.get(name, name) for name in operator.sources if name not in self._program.constants]
            values = {name: np.array(result.numpy()) for name, result in results.items()}
            steps.append(Step(operator.kind, operator.name, tuple(sources), values))

        self._program.run(self._tensors(inputs), watch)
        return steps

    def close(self) -> None:
        del self._program

    def _tensors(self, inputs: Arrays) -> dict[str, torch.Tensor]:
        self._gate.check(inputs)
        tensors = {}
        for name, spec in zip(self._program.inputs, self._specs.inputs, strict=True):
            array = narrowed(spec, inputs[spec.name])
            if spec.dtype == "uint8":
                array = np.moveaxis(array, -1, 1).astype(np.float32)
            tensors[name] = torch.from_numpy(np.array(array))
        return tensors
