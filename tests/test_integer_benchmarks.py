"""The page on eight bits says what is stored, and the scripts judge as they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_page_is_what_the_results_say(script: Any) -> None:
    page = script("_integer_page")
    stored = [json.loads(path.read_text()) if path.exists() else None for path in (page.ACCURACY, page.LATENCY)]
    assert page.DOCUMENT.read_text(encoding="utf-8") == page.document(*stored)


def test_every_row_of_a_table_has_as_many_cells_as_its_head(script: Any) -> None:
    page = script("_integer_page")
    facts = {"versions": {"torch": "2"}, "network": "imdn", "format": "openvino", "tool": "edgepack static"}
    figures = {"score": 37.5, "float_score": 37.9, "lost": 0.4, "agreement": None, "sqnr_db": 30.0, "samples": 5,
               "size_ratio": 0.4, "weights_ratio": 0.25}  # fmt: skip
    accuracy = {"rows": [{**facts, **figures}, {**facts, "exit": 7, "why": "no | form"}]}
    ratio = {"value": 0.5, "low": 0.4, "high": 0.6, "verdict": "faster"}
    entries = [{"label": "edgepack static", "sqnr_db": 30.0, "p50_ms": 1.0, "over_float": ratio, "over_best": ratio},
               {"label": "NNCF", "sqnr_db": 10.0, "p50_ms": 1.0, "kept": False,
                "over_float": {"value": 2.0, "low": None}},
               {"label": "float", "sqnr_db": None, "p50_ms": 2.0}, {"label": "other", "why": "failed"}]  # fmt: skip
    latency = {"rows": [{**facts, "entries": entries, "best": "NNCF"}], "machine": "m", "processor": "p",
               "guards": {"convolutions": 30.0, "transformers": 19.0}}  # fmt: skip
    for table in page.document(accuracy, latency).split("\n\n"):
        cells = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, table
    assert "NNCF †" in page.document(None, latency)


def test_what_a_tool_gets_right_beyond_us_is_told_from_luck(script: Any) -> None:
    page = script("_integer_page")
    row = {"versions": {}, "network": "vit", "format": "onnx", "samples": 1000, "lost": 0.0, "float_score": 75.0,
           "sqnr_db": 30.0, "size_ratio": 0.3}  # fmt: skip
    ours = {**row, "tool": "edgepack static", "score": 70.0, "agreement": 99.0}
    rivals = [{**row, "tool": "near", "score": 71.0, "agreement": 98.4},
              {**row, "tool": "far", "score": 72.0, "agreement": 98.4},
              {**row, "tool": "below", "score": 69.0, "agreement": 90.0}]  # fmt: skip
    found = [line for line in page.document({"rows": [ours, *rivals]}, None).splitlines() if "chance" in line]
    assert found == ["| ViT, CIFAR-10 | ONNX Runtime | near | 10 of 1000 | 26 | 10 | within chance |",
                     "| ViT, CIFAR-10 | ONNX Runtime | far | 20 of 1000 | 26 | 10 | more than chance |"]  # fmt: skip


def test_a_comparison_seen_from_the_other_side(script: Any) -> None:
    latency = script("integer_latency")
    from edgepack.contracts import Settings
    from edgepack.measurement import Ratio

    found = latency.inverse(Ratio(2.0, 1.6, 2.5, "a", "slower", 2.0), Settings())
    assert found == {"value": 0.5, "low": 0.4, "high": 0.625, "verdict": "faster"}


def test_calibration_samples_are_read_whole_and_in_order(script: Any) -> None:
    reader = script("_peers").Reader(np.arange(150.0).reshape(150, 1))
    assert 150 % len(reader) == 0
    reader.set_range(0, len(reader))
    seen = []
    while (batch := reader.get_next()) is not None:
        seen += batch["input"].ravel().tolist()
    assert seen == list(range(150))


def test_the_tally_against_figures_by_hand(script: Any) -> None:
    cases, judge = script("_cases"), script("_judge")
    import torch

    from edgepack import metrics
    from edgepack.task import Input

    images = np.zeros((4, 3, 2, 2), np.float32)
    fold = cases.Fold(images, ((images, np.array([0, 1, 0, 1])),))
    case = cases.Case("x", torch.nn.Identity(), Input("x", (1, 3, 2, 2)), (fold,), metrics.find("top1", Path()))
    answers = np.array([[2, 0], [0, 2], [2, 0], [2, 0]], np.float32)  # 3 of 4 right
    case.__dict__["answers"] = ((answers,),)
    tally = judge.Tally(case)
    found = answers + np.array([[0, 0], [0, 0], [-1.0, 2], [0, 0]], np.float32)  # one changes its mind
    tally.add(0, lambda images: found[: len(images)])
    result = tally.result()
    assert (result["score"], result["float_score"], result["lost"], result["agreement"]) == (50.0, 75.0, 25.0, 75.0)
    assert result["sqnr_db"] == pytest.approx(10 * np.log10(16 / 5), abs=0.005)
    limited = judge.Tally(case)
    limited.add(0, lambda images: found[: len(images)], 2)
    assert (limited.result()["samples"], limited.result()["sqnr_db"]) == (2, None)
