"""PyTorch, running ``torch.export`` programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgepack.contracts import Arrays, Runtime, Session
from edgepack.errors import require
from edgepack.runtimes._inputs import Gate
from edgepack.versions import installed

if TYPE_CHECKING:
    import numpy as np

    from edgepack.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class Pt2(Runtime):
    """Run torch.export programs with PyTorch on the CPU."""

    formats: ClassVar[tuple[str, ...]] = ("pt2",)

    def version(self) -> str:
        module = require("torch", "compress")
        return installed("torch") or str(module.__version__)

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        require("torch", "compress")
        from edgepack.models.pt2 import load_program

        return _Session(load_program(artifact.file(".pt2")), artifact, threads)


class _Session:
    def __init__(self, program: Any, artifact: Artifact, threads: int | None) -> None:
        import torch

        self._torch = torch
        self._module = program.module(check_guards=False)
        self._gate = Gate(artifact.manifest.inputs)
        self._inputs = [spec.name for spec in artifact.manifest.inputs]
        self._outputs = [spec.name for spec in artifact.manifest.outputs]
        self._threads = threads or torch.get_num_threads()

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._gate.check(inputs)
        torch = self._torch
        # The number of threads is one per process, and other sessions may want another.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            results = self._module(*[_tensor(torch, inputs[name]) for name in self._inputs])
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

    def close(self) -> None:
        del self._module


def _tensor(torch: Any, array: np.ndarray[Any, Any]) -> Any:
    contiguous = array if array.flags.c_contiguous and array.flags.writeable else array.copy()
    return torch.from_numpy(contiguous)
