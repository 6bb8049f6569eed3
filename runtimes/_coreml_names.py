"""Artifact inputs and outputs against those of a Core ML package: same order, names as far as Core ML allows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepack.artifact import Artifact
from edgepack.contracts import TensorSpec
from edgepack.errors import InputError


def check_names(artifact: Artifact, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raises InputError: the package belongs to another manifest."""
    specs = (*artifact.manifest.inputs, *artifact.manifest.outputs)
    wanted, found = [spec.name for spec in specs], [*inputs, *outputs]
    if [_plain(name) for name in wanted] != [_plain(name) for name in found]:
        raise InputError(f"{artifact.folder}: the manifest names {wanted}, the model {found}", "export again")


def narrowed(spec: TensorSpec, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As Core ML takes it: whole numbers have 32 bits. Raises InputError when a number does not fit."""
    if array.dtype != np.int64:
        return array
    narrow = array.astype(np.int32)
    if not np.array_equal(narrow, array):
        raise InputError(f"input {spec.name!r} has a number beyond 32 bits, which Core ML does not take")
    return narrow


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name, flags=re.ASCII)
