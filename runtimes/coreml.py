"""Core ML, and off a Mac an interpreter of its packages."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgepack.contracts import Arrays, Runtime, Session, Step
from edgepack.errors import DeviceError, require
from edgepack.versions import installed

if TYPE_CHECKING:
    from edgepack.artifact import Artifact

HALF_LIMIT = 2e-2  # not measured on a Mac; rounding every result here gives up to 5e-3
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")


@dataclass(frozen=True, kw_only=True)
class Coreml(Runtime):
    """Run Core ML packages with Core ML on a Mac; elsewhere interpret the saved file with PyTorch.

    The interpreter checks what the file says: operators, constants, order, layout. It is no engine: its time says
    nothing about a device, and Apple's engines round float16 results in their own way.

    Attributes:
        engine: ``auto`` (Core ML on a Mac, else the interpreter), ``coreml`` or ``interpreter``.
        compute_units: of Core ML: ``CPU_ONLY``, ``CPU_AND_GPU``, ``CPU_AND_NE`` or ``ALL``.
        arithmetic: of the interpreter: ``float32``, or ``float16`` to round the results of every operator that the
            file calls float16 to 16 bits.
    """

    formats: ClassVar[tuple[str, ...]] = ("coreml",)

    engine: str = "auto"
    compute_units: str = "CPU_ONLY"
    arithmetic: str = "float32"

    def __post_init__(self) -> None:
        for name, valid in (
            ("engine", ("auto", "coreml", "interpreter")),
            ("compute_units", UNITS),
            ("arithmetic", ("float32", "float16")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is one of {', '.join(valid)}, not {getattr(self, name)!r}")

    @property
    def interpreted(self) -> bool:
        """Whether artifacts are interpreted here."""
        return self.engine == "interpreter" or (self.engine == "auto" and sys.platform != "darwin")

    def untimed(self) -> str | None:
        """Why latencies would mean nothing; None on a Mac."""
        return "Core ML runs on a Mac; here it is interpreted, so there is no latency" if self.interpreted else None

    def version(self) -> str:
        if installed("coremltools") is None:
            require("coremltools", "coreml-run")
        where = "interpreted" if self.interpreted else f"macOS {platform.mac_ver()[0]}"
        return f"{installed('coremltools')}, {where}"

    def limit(self, artifact: Artifact) -> float:
        """Apple's engines round each float16 result; the interpreter computes in float32."""
        half = artifact.manifest.dialect in ("float16", "w8")
        rounds = half and (not self.interpreted or self.arithmetic == "float16")
        return HALF_LIMIT if rounds else super().limit(artifact)

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        require("torch", "coreml-run")
        if not self.interpreted:
            if sys.platform != "darwin":
                raise DeviceError("Core ML runs on a Mac only", "engine = 'interpreter' checks the file here")
            from edgepack.runtimes._coreml_engine import Engine

            return Engine(artifact, _package(artifact), self.compute_units)
        from edgepack.runtimes._coreml_interpreter import Interpreter

        return Interpreter(artifact, _package(artifact), self.arithmetic == "float16", threads)

    def trace(self, artifact: Artifact, inputs: Arrays) -> list[Step]:
        """Results of every operator, from the interpreter, on a Mac too."""
        require("torch", "coreml-run")
        from edgepack.runtimes._coreml_interpreter import Interpreter

        return Interpreter(artifact, _package(artifact), self.arithmetic == "float16", None).trace(inputs)


def _package(artifact: Artifact) -> Path:
    """The folder that Core ML calls a package: model.mlpackage/Data/com.apple.CoreML/model.mlmodel lies in it."""
    return artifact.file(".mlmodel").parents[2]
