"""The page on binary networks says what is stored."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_binary_page")


def test_the_cost_model_took_the_faster_kernel_within_a_tenth(page: Any) -> None:
    for row in page.RESULTS.read()["kernels"]:
        for level, name in page.MODELS.items():
            _, plain, tree, same = row["ns"][str(level)]
            costs = row["model_ns"][name]
            assert same == 1
            assert (tree if costs[1] < costs[0] else plain) <= 1.1 * min(plain, tree), row["shape"]
