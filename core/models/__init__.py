"""Models in: load what the user names, safely, as an nn.Module of standard layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputError, require

if TYPE_CHECKING:
    from torch import nn

FORMS = "file.py:callable, package.module:callable, timm:NAME, torchvision:NAME, transformers:NAME, a .pt2 or an .onnx"


def load(
    source: str,
    folder: Path,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model a recipe names, in inference mode and float32.

    Args:
        source: ``file.py:callable``, ``package.module:callable``, ``timm:NAME``, ``torchvision:NAME``,
            ``transformers:CLASS`` or ``transformers:FOLDER``, or a ``.pt2`` or ``.onnx`` file.
        folder: what relative paths are relative to.
        weights: safetensors or tensor-only ``.pt`` / ``.pth``; None leaves the weights as built.
        options: arguments of the callable (for ``transformers:CLASS``: of its configuration).

    Raises:
        InputError: the source or the weights are missing, damaged, unsafe or do not fit.
        Unsupported: an operator of an ``.onnx`` file is not known.
        MissingExtra: timm, torchvision, transformers, onnx … is not installed.
    """
    module = _build(source, folder, dict(options or {}), weights)
    if weights is not None:
        from edgepack.models.weights import load_weights

        load_weights(module, folder / weights, source)
    return _float32(module).eval()


def prepare_torchvision() -> None:
    """Let torchvision (and timm, which needs it) import beside a torch its compiled operators do not match.

    Does nothing where they match, where torchvision is not installed, or the second time.
    """
    from edgepack.models.torchvision_schemas import define

    define()


def _build(source: str, folder: Path, options: dict[str, Any], weights: str | Path | None) -> nn.Module:
    suffix = Path(source).suffix.lower()
    if suffix in (".pt2", ".onnx"):
        if weights is not None:
            raise InputError(f"{source} holds its own weights, so weights {str(weights)!r} cannot be loaded into it")
        if options:
            raise InputError(f"{source} takes no options, got {', '.join(options)}")
        return _lift(folder / source, suffix)
    from edgepack.models import sources

    head, colon, name = source.rpartition(":")
    if not colon or not head or not name:
        raise InputError(f"cannot tell what model {source!r} is", f"valid: {FORMS}")
    if head in sources.ZOOS:
        return sources.ZOOS[head](name, folder, options)
    return sources.from_code(source, folder, options)


def _lift(path: Path, suffix: str) -> nn.Module:
    if suffix == ".pt2":
        from edgepack.models.lift import lift_program
        from edgepack.models.pt2 import load_program

        return lift_program(load_program(path))
    require("onnx", "onnx")
    from edgepack.models.onnx import lift_onnx

    return lift_onnx(path)


def _float32(module: nn.Module) -> nn.Module:
    import torch

    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
        return module.float()
    return module
