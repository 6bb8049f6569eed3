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


def test_zeros_that_grow_in_training_have_no_score_before_it(page: Any) -> None:
    row = {"row": "90 %", "zeros": 9, "weights": 10, "samples": 100, "original": 0.9, "after": 0.88,
           "settings": {"epochs": 3, "features": ["auto"]}, "images": 2000, "seconds": 5.4}  # fmt: skip
    text = page.document({"rows": [row], "facts": {"processor": "one", "versions": {"torch": "2"}}})
    assert (
        "| zeros grow in training | 88.00 % | 2.00 points | 3 epochs of 2,000 images (inner results too), 5 s |" in text
    )


def test_what_is_not_of_weights_follows_from_two_shares(page: Any) -> None:
    def row(share: float, pattern: str, sparse: float) -> dict[str, Any]:
        return {"processor": "arm64", "share": share, "pattern": pattern, "bytes": {"dense": 10, "sparse": 4},
                "instructions": {"dense": 200e6, "sparse": sparse}}  # fmt: skip

    calls = [row(0.8, "unstructured", 100e6), row(0.9, "unstructured", 60e6), row(0.8, "1x2", 75e6)]
    text = page.document({"calls": calls, "facts": {"processor": "one", "versions": {"torch": "2"}}})
    assert "arm64: about 20 M of the sparse file's are not those of non-zero weights" in text
    assert "| arm64 | 80 %, 1x2 | 200.0 M | 75.0 M | 2.67 | 0.400 |" in text
