"""Checkpoints of a training: one folder of plain tensors and JSON, replaced as a whole after each epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgepack.artifact import recover, replacing

WORDS, TENSORS = "state.json", "state.safetensors"


@dataclass
class State:
    """Where a training stands after a whole number of epochs.

    Attributes:
        identity: of everything that its result depends on.
        epochs: that were finished.
        seconds: that they took, over all runs.
        best: epoch whose weights are the best so far (0: before training), None where nothing is chosen.
        best_score: of that epoch, the higher the better.
        ended: why training has ended, None while it goes on.
        rows: of the report, one per epoch.
        tensors: by ``module/``, ``best/``, ``beside/`` or ``optimizer/`` and their name there.
    """

    identity: str
    epochs: int = 0
    seconds: float = 0.0
    best: int | None = None
    best_score: float | None = None
    ended: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under one of the names, without it."""
        return {key.removeprefix(f"{name}/"): value for key, value in self.tensors.items()
                if key.startswith(f"{name}/")}  # fmt: skip

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors under one of the names by copies of these."""
        self.tensors = {key: value for key, value in self.tensors.items() if not key.startswith(f"{name}/")}
        self.tensors |= {f"{name}/{key}": value.detach().clone() for key, value in tensors.items()}

    def save(self, folder: Path) -> None:
        """Write it in place of an earlier one. Raises StorageError; then the earlier one stays."""
        words = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "tensors"}
        with replacing(folder) as new:
            save_file({key: value.contiguous() for key, value in self.tensors.items()}, new / TENSORS)
            (new / WORDS).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")


def load(folder: Path, identity: str) -> State | None:
    """What an interrupted run of the same training left, None if there is nothing, or nothing that fits."""
    recover(folder)
    try:
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        if words.get("identity") != identity:
            return None
        return State(**words, tensors=load_file(folder / TENSORS))
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
        return None


def digest(facts: Mapping[str, Any], *modules: nn.Module | None) -> str:
    """Hash of plain values and of the weights of networks."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for module in modules:
        for name, value in (module.state_dict() if module is not None else {}).items():
            if isinstance(value, Tensor):
                found.update(
                    name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
    return found.hexdigest()
