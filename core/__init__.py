"""edgepack: make a trained vision model small and fast, and prove on every target that it still works.

The verbs are functions: ``edgepack.compress(module, task, [Fold()], out="edgepack-out")``, then
``edgepack.export("edgepack-out", [Onnx()])``, ``profile``, ``verify``, ``compare``, ``deploy``, ``report``. Nothing
heavy is imported until a verb runs. ``compress``, ``export`` and ``deploy`` are also the packages of their parts.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "compress": "edgepack.compress",
    "export": "edgepack.export",
    "deploy": "edgepack.deploy",
    "profile": "edgepack.api",
    "verify": "edgepack.api",
    "compare": "edgepack.api",
    "report": "edgepack.api",
    "Task": "edgepack.task",
    "Input": "edgepack.task",
    "Artifact": "edgepack.artifact",
    "Settings": "edgepack.contracts",
    "EdgepackError": "edgepack.errors",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("edgepack")
    if name not in _HOME:
        raise AttributeError(f"module 'edgepack' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if name in ("compress", "export", "deploy") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
