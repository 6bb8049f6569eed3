"""ONNX Runtime's library of our own operators: compiled from this package's sources, never from a file's."""

from __future__ import annotations

import functools
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.operators import BINARY_CONV
from edgepack.runtimes._c_build import library

if TYPE_CHECKING:
    from edgepack.artifact import Artifact

KERNELS = ("nn.h", "planes.h", "choose.h", "bits.h", "bits.c")


def needed(artifact: Artifact) -> bool:
    """Whether a file has operators that ONNX Runtime does not know."""
    return BINARY_CONV in (artifact.manifest.census or {}).get("operators", {})


@functools.cache
def operators() -> Path:
    """The library, compiled once per version of the sources.

    Raises:
        MissingExtra: there is no C compiler.
    """
    sources = {item.name: item.read_bytes() for item in (files("edgepack.runtimes") / "onnx_kernels").iterdir()}
    for item in (files("edgepack.export") / "c_kernels").iterdir():
        if item.name in KERNELS or item.name.startswith("bits_"):
            sources[item.name] = item.read_bytes()
    with tempfile.TemporaryDirectory() as place:
        for name, text in sources.items():
            (Path(place) / name).write_bytes(text)
        return library(Path(place), sorted(sources))
