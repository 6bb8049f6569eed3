"""The page on four bits says what is stored."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("four_bits")


def test_the_page_is_what_the_results_say(script: Any) -> None:
    stored = json.loads(script.STORED.read_text())
    assert script.DOCUMENT.read_text(encoding="utf-8") == script.document(stored)


def test_every_row_has_as_many_cells_as_its_head(script: Any) -> None:
    facts = {"network": "resnet20", "format": "openvino", "kind": "W4"}
    figures = {"samples": 5, "float_score": 91.0, "score": 90.5, "lost": 0.5, "size_ratio": 0.2, "weights_ratio": 0.13,
               "int4_bytes": 100, "compress_seconds": 3.0}  # fmt: skip
    ratio = {"value": 1.0, "low": 0.9, "high": 1.1, "verdict": "same"}
    races = [{"format": "onnx", "kind": "W4A8", "weights": "packed", "over_w8a8": ratio}]
    stored = {"rows": [{**facts, **figures}, {**facts, "exit": 7, "why": "no | form"}], "races": races,
              "versions": {"torch": "2"}}  # fmt: skip
    for table in script.document(stored).split("\n\n"):
        cells = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, table
