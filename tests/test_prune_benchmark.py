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
    for role, rate in (("pruned-0.1-3", 0.1), ("removed-0.1-3", 0.1), ("plain-0.2-3", 0.2)):
        settings = {"lr": rate, "epochs": 3, "batch": 64, "mixup": role == "removed-0.1-3", "feature_weight": 4.0,
                    "temperature": 2.0, "features": [] if role == "plain-0.2-3" else ["auto"]}  # fmt: skip
        results.store("training", {"role": role, "images": 2000, "settings": settings}, facts)
    for role, top1 in (("original", 0.9), ("removed", 0.05), ("pruned", 0.1), ("pruned-0.1-3-trained", 0.88)):
        results.store("accuracy", {"role": role, "top1": top1, "samples": 10}, facts)
    text = results.page.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(("| `prune`", "| Torch-Pruning"))]
    wide, how = "0.500 | 0.250", "batches of 64"
    assert lines == [
        f"| `prune`, with its teacher | {wide} | 10.00 % | 3 | 0.1 | 88.00 % | 2.00 points "
        f"| 2,000 images, {how}, temperature 2, inner results × 4 |",
        f"| `prune` without solving, with its teacher | {wide} | 5.00 % | 3 | 0.1 | not run | not run "
        f"| 2,000 images mixed by twos, {how}, temperature 2, inner results × 4 |",
        "| Torch-Pruning, plain fine-tuning | 0.600 | 0.500 | not run | 3 | 0.2 | not run | not run "
        f"| 2,000 images, {how} |",
    ]
    assert "| a.b | 16 | 8 | – | 12 | 1 … 2.5 | – |" in text
    assert "differs by 1e-07 of the largest output" in text
