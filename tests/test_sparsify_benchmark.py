"""The page on zeros says what is stored."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_sparsify_page")


def test_a_row_takes_the_place_of_its_like(page: Any, tmp_path: Path) -> None:
    results = replace(page.RESULTS, stored=tmp_path / "a.json", page=tmp_path / "a.md")
    facts = {"processor": "one", "versions": {"torch": "2"}}
    row = {"row": "50 %", "zeros": 5, "weights": 10, "samples": 100, "original": 0.9, "before": 0.8}
    results.store("rows", row, facts)
    results.store("rows", {**row, "before": 0.85}, facts)
    text = results.page.read_text(encoding="utf-8")
    assert text.count("| 50 % |") == 1
    assert "| 85.00 % | none | 5.00 points | none |" in text
