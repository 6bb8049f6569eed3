"""The results of ``prune.py``: stored as JSON, shown as ``docs/prune.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgepack.artifact import write_text

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "prune.json"
DOCUMENT = ROOT / "docs" / "prune.md"
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "tflite": "LiteRT"}
Row = Mapping[str, Any]


def store(stage: str, row: Row, facts: Row) -> None:
    """Put a row in place of that of the same role and target, and write the page."""
    stored: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    same = [name for name in ("role", "target") if name in row]
    old = [item for item in stored.get(stage, []) if any(item[name] != row[name] for name in same)]
    stored[stage] = sorted([*old, row], key=lambda item: [item[name] for name in same])
    stored["facts"] = facts
    write_text(STORED, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    rewrite()


def rewrite() -> None:
    write_text(DOCUMENT, document(json.loads(STORED.read_text(encoding="utf-8"))))


def document(stored: Row) -> str:
    return "\n".join(_lines(stored)) + "\n"


def _lines(stored: Row) -> Iterator[str]:
    yield "# Fewer channels: `prune`"
    yield "TODO"
