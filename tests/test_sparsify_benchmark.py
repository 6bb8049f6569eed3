"""The page on zeros says what is stored."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_sparsify_page")


def test_the_page_is_what_the_results_say(page: Any) -> None:
    stored = json.loads(page.STORED.read_text(encoding="utf-8"))
    assert page.DOCUMENT.read_text(encoding="utf-8") == page.document(stored)


def test_every_row_has_as_many_cells_as_its_head(page: Any) -> None:
    for part in page.DOCUMENT.read_text(encoding="utf-8").split("\n\n"):
        cells = {line.count("|") for line in part.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, part


def test_a_row_takes_the_place_of_its_like(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "STORED", tmp_path / "a.json")
    monkeypatch.setattr(page, "DOCUMENT", tmp_path / "a.md")
    facts = {"processor": "one", "versions": {"torch": "2"}}
    row = {"row": "50 %", "zeros": 5, "weights": 10, "samples": 100, "original": 0.9, "before": 0.8}
    page.store("rows", row, facts)
    page.store("rows", {**row, "before": 0.85}, facts)
    text = page.DOCUMENT.read_text(encoding="utf-8")
    assert text.count("| 50 % |") == 1
    assert "| 85.00 % | none | 5.00 points | none |" in text
