"""The plan: what the float graph cannot say, keyed by graph node.

Passes fill it through ``run.plan``; exporters read it. ``plan.json`` holds the words, ``plan.safetensors`` the
tensors. Empty for float-only recipes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import InputError

WORDS = "plan.json"
TENSORS = "plan.safetensors"


@dataclass
class Plan:
    """Decisions about graph nodes.

    Attributes:
        nodes: node name → plain values (bits, what stays float …).
        tensors: ``node/what`` → array (scales, ranges, masks …).
    """

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save

        (folder / WORDS).write_text(json.dumps({"nodes": self.nodes}, indent=2) + "\n", encoding="utf-8")
        (folder / TENSORS).write_bytes(save(dict(self.tensors)))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Raises InputError when the files are damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            words: Mapping[str, Any] = json.loads((folder / WORDS).read_text(encoding="utf-8"))
            tensors = load((folder / TENSORS).read_bytes())
            # the library gives them in another order each time
            return cls(dict(words["nodes"]), {name: tensors[name] for name in sorted(tensors)})
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{folder}: the plan cannot be read: {error}") from error
