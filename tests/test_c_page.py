"""The page on C files says what is stored."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_page_is_what_the_results_say(script: Any) -> None:
    page = script("_c_page")
    stored = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    assert page.DOCUMENT.read_text(encoding="utf-8") == page.document(stored)


def test_every_row_has_as_many_cells_as_its_head(script: Any, tmp_path: Path) -> None:
    page = script("_c_page")
    path = tmp_path / "c.json"
    race = {"rows": [{"engine": "C", "p50_ms": 1.0, "min_ms": 0.9},
                     {"engine": "OpenVINO", "p50_ms": 2.0, "c_over_engine": 0.5, "low": 0.4, "high": 0.6},
                     {"engine": "TFLite", "why": "exit 6: a | b"}], "state": "settled"}  # fmt: skip
    simulation = {"max_rel": 1e-6, "rounded": 3, "otherwise": 0.0, "samples": 4}
    facts = {"arena_bytes": 100, "tflite_arena_bytes": 200, "size_bytes": {"c": 50, "onnx": 70}, "text_bytes": 500,
             "constants_bytes": 30, "float_bytes": 100, "simulation": simulation}  # fmt: skip
    emulated = {"emulated": [
        {"processor": "arm64, plain C", "passed": True, "max_rel": 0.0, "instructions": 1000, "size_bytes": 90},
        {"processor": "arm64, NEON", "passed": True, "max_rel": 0.0, "instructions": 250, "size_bytes": 90},
        {"processor": "Cortex-M3", "why": "needs qemu-system-arm"},
    ]}  # fmt: skip
    score = {"score": 37.1, "float_score": 37.1, "samples": 1}
    set5 = {"score": score, "simulation": {**simulation, "otherwise": None},
            "files": [{"shape": [8, 9], "arena_bytes": 5, "size_bytes": 6}], "float_bytes": 4}  # fmt: skip
    for found in (race, facts, emulated):
        page.store(path, {"network": "digits", "form": "static"}, found, {"processor": "one"})
    page.store(path, {"network": "imdn", "form": "float"}, set5, {"processor": "one"})
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert [row["network"] for row in stored["rows"]] == ["digits", "imdn"]
    text = page.document(stored)
    for table in text.split("\n\n"):
        cells = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, table
    for said in ("**0.500** [0.400, 0.600]", "| 0.250 |", "| 0.50 |", "| 0.500 |", "IMDN ×2, 8×9", "3, 0.00% differ"):
        assert said in text


def test_the_arena_of_tflite_is_where_its_interpreter_placed_values(script: Any) -> None:
    facts = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'") and script("_c_facts")
    assert facts._joined(iter([(40, 50), (0, 10), (8, 20), (20, 24)])) == [[0, 24], [40, 50]]


def test_the_arena_of_a_tflite_file_holds_its_largest_values(script: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    pytest.importorskip("litert_torch", reason="pip install 'edgepack[tflite]'")
    facts = script("_c_facts")
    from edgepack import parts
    from edgepack.contracts import Exporter
    from edgepack.graph import capture
    from edgepack.plan import Plan
    from edgepack.task import Input, Task

    exporter = parts.find(Exporter, "tflite")()  # type: ignore[type-abstract]
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 2, 1)).eval()
    simulation = exporter.lower(capture(module, Task((Input("x", (1, 3, 8, 8)),))), Plan())
    exporter.write(simulation, tmp_path)
    found = facts.tflite_arena(next(tmp_path.glob("*.tflite")))
    least = 4 * 64 * (3 + 16)  # input and result of the first convolution are needed at once
    assert least <= found <= 2 * least
