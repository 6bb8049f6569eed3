"""The page on mixed widths says what is stored."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("mixed")


def test_the_page_is_what_the_results_say(script: Any) -> None:
    stored = json.loads(script.STORED.read_text())
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert text == script.document(stored)
    cells = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(cells) == 1


def test_kinds_are_named_by_their_widths(script: Any) -> None:
    assert script.kind_of(6, None) == "W6"
    assert script.kind_of((8, 4), 5) == "8, 4 at the size of W5"
    assert len({script.kind_of(*kind) for kind in script.KINDS}) == len(script.KINDS)
