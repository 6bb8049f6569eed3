"""The page on binary networks says what is stored."""

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
    return importlib.import_module("_binary_page")


def test_the_page_is_what_the_results_say(page: Any) -> None:
    stored = json.loads(page.STORED.read_text(encoding="utf-8"))
    assert page.DOCUMENT.read_text(encoding="utf-8") == page.document(stored)


def test_every_row_has_as_many_cells_as_its_head(page: Any) -> None:
    for part in page.DOCUMENT.read_text(encoding="utf-8").split("\n\n"):
        assert len({line.count("|") for line in part.splitlines() if line.startswith("|")}) <= 1, part


def test_the_cost_model_took_the_faster_kernel_within_a_tenth(page: Any) -> None:
    for row in json.loads(page.STORED.read_text(encoding="utf-8"))["kernels"]:
        for level, name in page.MODELS.items():
            _, plain, tree, same = row["ns"][str(level)]
            costs = row["model_ns"][name]
            assert same == 1
            assert (tree if costs[1] < costs[0] else plain) <= 1.1 * min(plain, tree), row["shape"]
