"""The page on fewer channels says what is stored."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_prune_page")


def test_a_row_takes_the_place_of_its_like(page: Any, tmp_path: Path) -> None:
    results = replace(page.RESULTS, stored=tmp_path / "a.json", page=tmp_path / "a.md")
    facts = {"processor": "one", "versions": {"torch": "2"}}
    layer = {"layer": "a.b", "before": 16, "after": 8, "criterion": {"kept": {"least": 1.0, "most": 2.5}}}
    pruned = {"role": "pruned", "macs": [10, 5], "parameters": [8, 2], "criterion": "taylor", "difference": 1.4e-7,
              "layers": [layer], "left": {"c": "it is wide"}}  # fmt: skip
    plain = {"role": "plain", "macs": [10, 6], "parameters": [8, 4], "widths": {"a.b": 12}}
    results.stored.write_text(json.dumps({"choice": [plain, {**pruned, "macs": [1, 1]}]}))
    results.store("choice", pruned, facts)
    for role, rate in (("pruned-0.1", 0.1), ("plain-0.2", 0.2)):
        settings = {"lr": rate, "epochs": 3, "batch": 64}
        results.store("training", {"role": role, "images": 2000, "settings": settings}, facts)
    for role, top1 in (("original", 0.9), ("removed", 0.05), ("pruned", 0.1), ("pruned-0.1-trained", 0.88)):
        results.store("accuracy", {"role": role, "top1": top1, "samples": 10}, facts)
    text = results.page.read_text(encoding="utf-8")
    how = "3 epochs of 2,000 images, batches of 64"
    assert f"| `prune`, with its teacher | 0.500 | 0.250 | 10.00 % | 0.1 | 88.00 % | 2.00 points | {how} |" in text
    assert f"| Torch-Pruning, plain fine-tuning | 0.600 | 0.500 | not run | 0.2 | not run | not run | {how} |" in text
    assert "Before layers are solved anew, `prune`'s network has 5.00 %." in text
    assert "| a.b | 16 | 8 | 12 | 1 … 2.5 | – |" in text
    assert "differs by 1e-07 of the largest output" in text
