"""The page on fewer tokens says what is stored; its formula gives the published operations."""

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
    return importlib.import_module("_tokens_page")


@pytest.fixture
def script(page: Any) -> Any:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    return importlib.import_module("tokens")


def test_the_page_is_what_the_results_say(page: Any) -> None:
    stored = json.loads(page.RESULTS.read_text())
    assert page.DOCUMENT.read_text(encoding="utf-8") == "\n".join(page.document(stored)) + "\n"


def test_every_row_has_as_many_cells_as_its_head(page: Any) -> None:
    counted = {"network": "DeiT-S", "tokens": [197, 140], "macs": 4_000_000_000, "formula": 4_000_000_000}
    ratio = {"value": 0.5, "low": 0.4, "high": 0.6}
    trained = {"epochs": 2, "top1": 0.7, "samples": 10, "seconds": 3.0, "shrink": 0.3, "images": 5,
               "settings": {"optimizer": "adamw", "lr": 0.1, "batch": 8, "share": 0.9}}  # fmt: skip
    engine = {"top1": 0.7, "same_tokens": 1.0, "max_rel": 1e-6}
    stored = {
        "counts": [{**counted, "keep_rate": 1.0}, {**counted, "keep_rate": 0.7, "macs": 3_000_000_000}],
        "explain": [{"network": "DeiT-S", "engine": "onnx", "keep_rate": 0.7, "runs": 3,
                     "operators": {"MatMul": [10.0, 7.0], "TopK": [0.0, 0.5], "Tiny": [0.01, 0.001]}}],
        "accuracy": [{"keep_rate": 0.7, "samples": 5, "macs": 10**6, "top1": 0.7, "engines": {"onnx": engine}}],
        "tuned": [{**trained, "keep_rate": 1.0}, {**trained, "keep_rate": 0.7, "top1": 0.6, "macs": 39 * 10**6}],
        "integer": [{"keep_rate": 0.7, "epochs": 2, "engine": "onnx", "top1": 0.59}],
        "race_vit": [{"engine": "onnx", "keep_rate": 0.7, "ratio": ratio, "state": "settled"}],
        "equal": [{"side": 256, "keep_rate": 0.6, "tokens": [257, 155], "small": 10, "uncut": 14, "macs": 9}],
    }  # fmt: skip
    text = "\n".join(page.document(stored))
    for table in text.split("\n\n"):
        cells = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, table
    assert "| 2 | 0.7 | 1, 3, 4 | 39.0 | 70.00 % | 60.00 % | 10.00 | 59.00 % | – | – | 2.00 [1.67, 2.50] |" in text
    assert "10.0 → 7.5 ms, 1.33 times as fast where the MACs allow 1.33" in text
    assert "take 0.50 ms, 6.7 % of the time (TopK 0.50)." in text
    assert "| MatMul | 10.00 | 7.00 | 0.700 | -0.50 |" in text
    assert "| 256 × 256 | 0.6 | 257 → 155 | 0.000 | 0.000 | 0.900 |" in text


@pytest.mark.parametrize(
    ("width", "published"),
    [(192, {1.0: 1.254, 0.7: 0.821, 0.5: 0.629}), (768, {1.0: 17.56, 0.7: 11.61, 0.5: 8.82}), (384, {0.7: 3.029})],
)
def test_the_formula_gives_the_published_operations(script: Any, width: int, published: dict[float, float]) -> None:
    for rate, wanted in published.items():
        lengths = [197]
        for _ in range(3):
            lengths.append(script.tokens_behind(lengths[-1], 1, rate, True))
        digits = len(str(wanted).partition(".")[2])
        assert round(script.formula(width, lengths) / 1e9, digits) == wanted


def test_networks_were_counted_as_the_formula_says(page: Any) -> None:
    stored = json.loads(page.RESULTS.read_text())["counts"]
    assert {row["network"] for row in stored} == {"DeiT-T", "DeiT-S", "DeiT-B"}
    assert all(abs(row["macs"] / row["formula"] - 1) < 1e-3 for row in stored)


def test_times_are_medians_added_up_by_kind(script: Any) -> None:
    explain = importlib.import_module("_tokens_explain")
    times = {("a", "MatMul"): [1.0, 9.0, 2.0], ("b", "MatMul"): [3.0, 3.0, 4.0], ("c", "TopK"): [0.5]}
    assert explain.by_kind(times) == {"MatMul": 5.0, "TopK": 0.5}
