"""The results of ``factorize.py``: stored as JSON, shown as ``docs/factorize.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgepack.artifact import write_text

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "factorize.json"
DOCUMENT = ROOT / "docs" / "factorize.md"
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
Row = Mapping[str, Any]


def store(stage: str, row: Row, facts: Row) -> None:
    """Put a row in place of that of the same network, target and form, and write the page."""
    stored: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    same = [name for name in ("network", "target", "form") if name in row]
    old = [item for item in stored.get(stage, []) if any(item[name] != row[name] for name in same)]
    stored[stage] = sorted([*old, row], key=lambda item: [item[name] for name in same])
    stored["facts"] = facts
    write_text(STORED, json.dumps(_plain(stored), indent=1, allow_nan=False) + "\n")
    rewrite()


def rewrite() -> None:
    write_text(DOCUMENT, document(json.loads(STORED.read_text(encoding="utf-8"))))


def _plain(value: Any) -> Any:
    """Without what was not measured."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def document(stored: Row) -> str:
    return "\n".join(_lines(stored)) + "\n"


def _lines(stored: Row) -> Iterator[str]:
    yield "# Factored layers: `factorize`"
