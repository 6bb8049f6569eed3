"""A folder for Linux programs: the model with a C++ and a Python sample that build, run and test themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgepack.artifact import Artifact
from edgepack.contracts import Packager
from edgepack.errors import Unsupported
from edgepack.operators import BINARY_CONV


@dataclass(frozen=True, kw_only=True)
class Linux(Packager):
    """A folder with the model, a C++ library and sample (CMake), a Python sample, and a self-test.

    The samples use the engine's own interface and nothing of edgepack: ONNX Runtime's C API or OpenVINO's C++ API.

    Attributes:
        samples: at most this many golden samples go into the package.
    """

    formats: ClassVar[tuple[str, ...]] = ("onnx", "openvino")

    samples: int = 8

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")

    def write(self, artifact: Artifact, folder: Path) -> list[Path]:
        """Write the package into an empty folder and return its files.

        Raises:
            Unsupported: the artifact has another format, values without a NumPy type, or an operator of our own.
            IntegrityError: its golden samples are not vouched for by a hash.
        """
        from edgepack.deploy._contract import build, save
        from edgepack.deploy._sources import write_sources

        if artifact.manifest.format not in self.formats:
            raise Unsupported(
                f"packager linux does not take {artifact.manifest.format}", f"it takes {', '.join(self.formats)}"
            )
        if BINARY_CONV in (artifact.manifest.census or {}).get("operators", {}):
            raise Unsupported(
                f"packager linux: the file has edgepack's own operator {BINARY_CONV}, which its samples do not load",
                "export with binary = 'float', or to c",
            )
        contract = build(artifact, folder, self.samples)
        write_sources(contract, folder)
        save(contract, folder)
        return sorted(path for path in folder.rglob("*") if path.is_file())
