"""The page on quantization-aware training says what is stored."""

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
    return importlib.import_module("qat")


def test_the_page_is_what_the_results_say(script: Any) -> None:
    stored = json.loads(script.STORED.read_text())
    assert script.DOCUMENT.read_text(encoding="utf-8") == script.document(stored)


def test_every_row_has_as_many_cells_as_its_head(script: Any) -> None:
    facts = {"kind": "W4A4", "method": "qat", "format": "c"}
    figures = {"samples": 5, "float_score": 91.0, "score": 90.5, "lost": 0.5, "agreement": 97.0, "size_ratio": 0.2}
    epochs = [{"epoch": 0, "loss": None}, {"epoch": 1, "loss": 0.25}]
    training = {"images": 10, "seconds": 4.0, "samples": 20, "kept": 1, "settings": {"epochs": 1}, "epochs": epochs}
    rows = [{**facts, **figures, "training": training}, {**facts, "kind": "W8A8", "exit": 7, "why": "no | form"}]
    page = script.document({"rows": rows, "versions": {"torch": "2"}})
    for table in page.split("\n\n"):
        cells = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, table
    assert "| W4A4 | 10 | 1 | 4 | 5 | 0.2500 | 1 |" in page
