"""The page on factored layers says what is stored."""

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
    return importlib.import_module("_factorize_page")


def test_a_row_takes_the_place_of_its_like(page: Any, tmp_path: Path) -> None:
    results = replace(page.RESULTS, stored=tmp_path / "a.json", page=tmp_path / "a.md")
    facts = {"processor": "one", "versions": {"torch": "2"}}
    layer = {"layer": "0", "form": "tucker", "ranks": [8, 8], "error": 0.1, "ms": {"onnx": [1.0, 0.5]}, "why": ""}
    choice = {"network": "a", "title": "A", "layers": [layer], "targets": {"onnx": {"predicted": float("nan")}},
              "by_energy": {"layers": {"0": "tucker 5×5"}}}  # fmt: skip
    results.store("choice", {**choice, "title": "B"}, facts)
    results.store("choice", choice, facts)
    stored = json.loads((tmp_path / "a.json").read_text())
    assert [row["title"] for row in stored["choice"]] == ["A"]
    assert stored["choice"][0]["targets"]["onnx"]["predicted"] is None
    assert "| 0 | tucker 8×8 | 0.1000 | 1000 → 500 | tucker 5×5 |" in (tmp_path / "a.md").read_text()


def test_the_page_of_waves_is_what_its_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    wave = importlib.import_module("wave")
    stored = json.loads(wave.STORED.read_text(encoding="utf-8"))
    assert wave.DOCUMENT.read_text(encoding="utf-8") == wave.document(stored)


def test_chains_are_rebuilt_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    from edgepack.compress._apriori import AprioriConv2d

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    wave = importlib.import_module("wave")
    torch.manual_seed(0)
    network = wave.Predictor().eval()
    network.change[2] = AprioriConv2d(wave.CHANNELS, wave.CHANNELS, wave.KERNEL, rank=2, padding=2).factored()
    frames = torch.randn(2, wave.PAST, 12, 12)
    with torch.no_grad():
        assert torch.allclose(wave.plain(network)(frames), network(frames), atol=1e-5)
