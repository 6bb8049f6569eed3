"""Pages that are written from stored results say what is stored."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(params=["factorize", "prune", "sparsify", "binary", "memory"])
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(f"_{request.param}_page").RESULTS


def test_the_page_is_what_the_results_say(results: Any) -> None:
    assert results.page.read_text(encoding="utf-8") == results.text(results.read())


def test_every_row_has_as_many_cells_as_its_head(results: Any) -> None:
    for part in results.page.read_text(encoding="utf-8").split("\n\n"):
        cells = {line.count("|") for line in part.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, part


def test_the_page_of_eight_bits_is_what_its_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    page = importlib.import_module("_integer_page")
    stored = (json.loads(path.read_text(encoding="utf-8")) for path in (page.ACCURACY, page.LATENCY))
    assert page.DOCUMENT.read_text(encoding="utf-8") == page.document(*stored)
