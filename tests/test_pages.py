"""Pages that are written from stored results say what is stored."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(params=["factorize", "prune", "sparsify", "binary"])
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(f"_{request.param}_page").RESULTS


def test_the_page_is_what_the_results_say(results: Any) -> None:
    assert results.page.read_text(encoding="utf-8") == results.text(results.read())


def test_every_row_has_as_many_cells_as_its_head(results: Any) -> None:
    for part in results.page.read_text(encoding="utf-8").split("\n\n"):
        cells = {line.count("|") for line in part.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, part
