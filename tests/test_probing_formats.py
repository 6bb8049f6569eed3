"""``doctor --probe`` for TFLite and Core ML: the same operators, written in those formats."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")

from edgepack import _probe_coreml, _probe_models, _probe_tflite, _tables, probing
from edgepack._probe_models import OPERATORS, Case, Form
from edgepack.measurement import Ratio
from edgepack.progress import Silent

SLOWER = Ratio(2.0, 1.9, 2.1, "left in float", "slower", 2.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def probe_of(engine: str, operators: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> dict[str, probing.Probe]:
    monkeypatch.setattr(probing, "OPERATORS", {name: OPERATORS[name] for name in operators})
    monkeypatch.setattr(probing, "TIMING", replace(probing.TIMING, instances=2, max_seconds=0.1))
    return {f"{one.operator}/{one.form}": one for one in probing.probe(Silent(), (engine,))}


def test_answers_lie_on_the_grid_around_the_float_result() -> None:
    """Held against the float operator on numbers that were not rounded."""
    for name, operator in OPERATORS.items():
        case = Case(operator)
        exact = case.result
        assert exact is not None
        for form_name, form in _probe_tflite.forms(operator).items():
            if form.zero:
                continue  # other inputs
            made = _written(case, form)
            wanted = _probe_tflite.last(exact)
            step, zero = _probe_tflite.grid_of(operator, wanted, form)
            found = made.astype(np.float64)
            if made.dtype == np.int8:
                found = (found - zero) * step
            limit = 0.2 if form.bits == 4 else 0.03
            assert np.abs(found - wanted).max() <= limit * np.abs(wanted).max(), (name, form_name)


def _written(case: Case, form: Form) -> np.ndarray[Any, Any]:
    pytest.importorskip("ai_edge_litert", reason="pip install 'edgepack[tflite-run]'")
    pytest.importorskip("flatbuffers", reason="pip install 'edgepack[tflite-run]'")
    return _probe_tflite.written(case, form).answers["y"]


def test_every_operator_of_tflite_computes_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ai_edge_litert", reason="pip install 'edgepack[tflite-run]'")
    monkeypatch.setattr(probing, "_ratios", lambda runtime, first, others: iter([None] * len(others)))
    monkeypatch.setattr(probing, "_beside", lambda left, integers: SLOWER)
    found = probe_of("tflite", tuple(OPERATORS), monkeypatch)
    wrong = {key: one.reason or one.error for key, one in found.items() if not one.matches}
    assert set(wrong) == {"leaky_relu/s8", "leaky_relu/s8 off centre"}  # XNNPACK's slopes are whole 1/256
    assert set(wrong.values()) == {1.0}
    assert {one.split("/")[1] for one in found} == {*_probe_tflite.WEIGHTED, *_probe_tflite.BARE}
    assert found["conv/s8s8"].kernels == ("XNNPACK",)
    assert found["mean/s8"].kernels == ("XNNPACK",)
    assert found["avg_pool/s8"].kernels == ("AVERAGE_POOL_2D",)  # XNNPACK has none
    assert found["add/s8"].beside_left == SLOWER
    assert found["conv/s8s8"].beside_left is None


def test_tflite_is_timed_and_its_dialect_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ai_edge_litert", reason="pip install 'edgepack[tflite-run]'")
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    from edgepack.export._tflite_integer import TFLITE, here

    assert here() == (TFLITE, [])
    one = probe_of("tflite", ("add",), monkeypatch)["add/s8"]
    assert one.ratio is not None
    assert one.beside_left is not None
    assert one.untimed is None
    assert probing.known("tflite", "add", "s8") == one
    probing._store("tflite", {"add": [replace(one, beside_left=SLOWER)]})
    dialect, notes = here()
    assert TFLITE.integer - dialect.integer == {"add", "add_"}
    assert notes[0].endswith("slower in integers are add")
    assert probing.ENGINES["tflite"] == "tflite"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_core_ml_is_interpreted_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coremltools", reason="pip install 'edgepack[coreml]'")
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    from edgepack.runtimes.coreml import Coreml

    if not Coreml().interpreted:
        pytest.skip("here Core ML itself runs")
    found = probe_of("coreml", ("linear", "add"), monkeypatch)
    assert not {key: one.reason or one.error for key, one in found.items() if not one.matches}
    assert {key.split("/")[1] for key in found} == {*_probe_coreml.WEIGHTED, *_probe_coreml.BARE}
    assert all(one.ratio is None and one.untimed is not None for one in found.values())
    assert found["linear/w8"].kernels.count("constexpr_affine_dequantize") == 1
    assert found["add/s8"].kernels.count("quantize") == 3
    console = Console(width=200, record=True, file=StringIO())
    console.print(_tables.probed(list(found.values())))
    assert console.export_text().count("not run") == len(found)


def test_forms_differ_by_format() -> None:
    conv = OPERATORS["conv"]
    assert "u8s8" in _probe_models.forms(conv)
    assert "u8s8" not in {**_probe_tflite.forms(conv), **_probe_coreml.forms(conv)}
    assert "w4" not in _probe_tflite.forms(conv)
    assert "d8" not in _probe_tflite.forms(OPERATORS["conv_transpose"])
