"""Define the operator schemas torchvision's Python code registers against, where its library does not load.

torchvision's usual wheel is built for CUDA. Beside a CPU-only torch its compiled library cannot be loaded, and
``import torchvision`` then stops at the first operator it wants to describe. Models need none of those operators,
only that their names exist.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A torch.library.Library takes its definitions with it when it is collected.
_kept: list[Any] = []


def define() -> None:
    """Define the missing schemas, once, only where the compiled library does not load."""
    if _kept or "torchvision" in sys.modules:
        return
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    import torch

    if _library_loads(Path(spec.origin).parent) or _defined("torchvision::nms"):
        return
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)
    _kept.append(library)


def _library_loads(folder: Path) -> bool:
    for file in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            ctypes.CDLL(str(file))
        except OSError:
            continue
        return True
    return False


def _defined(operator: str) -> bool:
    import torch

    try:
        torch._C._dispatch_find_schema_or_throw(operator, "")
    except RuntimeError:
        return False
    return True
