"""``doctor --probe``: models of single operators, what is stored of them, and the dialect that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgepack import _tables, probing
from edgepack._probe_models import OPERATORS, Case, evaluate, forms
from edgepack.errors import MissingExtra, Unsupported
from edgepack.measurement import Ratio
from edgepack.progress import Silent
from edgepack.runtimes.onnxruntime import Onnxruntime

FASTER = Ratio(0.5, 0.49, 0.51, "float", "faster", 0.5)
SLOWER = replace(FASTER, value=2.0, low=1.9, high=2.1, verdict="slower")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "conv_transpose"])
def test_every_form_of_an_operator_computes_what_its_float_form_does(name: str) -> None:
    """By the format's own reference implementation: integers, taken apart by hand, lie around the float result."""
    case = Case(OPERATORS[name])
    exact = case.result
    assert exact is not None
    top = float(np.abs(exact).max())
    for form_name, form in forms(OPERATORS[name]).items():
        model, inputs = case.model(form), case.inputs(form)
        answers = evaluate(model, inputs)["y"].astype(np.float64)
        assert answers.shape == exact.shape
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        if form.signed is not None and not form.dynamic:
            from onnx import numpy_helper

            step, zero = (float(numpy_helper.to_array(constants[key])) for key in ("y_step", "y_zero"))
            answers = (answers - zero) * step
        limit = 0.2 if form.bits == 4 else 0.03
        assert np.abs(answers - exact).max() <= limit * top, form_name


def test_forms_are_those_that_make_sense() -> None:
    assert set(forms(OPERATORS["add"])) == {"u8", "s8"}
    assert "w4" in forms(OPERATORS["matmul"])
    assert "w4" not in forms(OPERATORS["conv"])
    assert "d8" not in forms(OPERATORS["conv_transpose"])


def probe_of(operators: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[probing.Probe]:
    monkeypatch.setattr(probing, "OPERATORS", {name: OPERATORS[name] for name in operators})
    monkeypatch.setattr(probing, "TIMING", replace(probing.TIMING, instances=2, max_seconds=0.2))
    return probing.probe(Silent(), ("onnxruntime",), **how)


def test_onnx_runtime_is_probed_once_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe_of(("add", "matmul"), monkeypatch)
    assert [(one.operator, one.form) for one in found[:2]] == [("add", "u8"), ("add", "s8")]
    added, product = found[0], found[2]
    assert added.matches
    assert added.kernels == ("QLinearAdd",)
    assert added.ratio is not None
    assert added.ratio.low <= added.ratio.value <= added.ratio.high
    assert added.beside_left is not None
    assert product.form == "u8s8"
    assert product.kernels == ("QLinearMatMul",)
    assert product.beside_left is None
    stored = list(cache.rglob("*.json"))
    assert len(stored) == 1
    assert stored[0].name.startswith("onnxruntime-")

    def never(engine: str, name: str) -> list[probing.Probe]:
        assert name == "relu", f"{name} was tried again"
        return [probing.Probe(engine, name, "u8", matches=True)]

    monkeypatch.setattr(probing, "_tried", never)
    again = probe_of(("add", "matmul", "relu"), monkeypatch)
    assert again[:-1] == found
    assert again[-1].operator == "relu"
    with pytest.raises(AssertionError, match="add was tried again"):
        probe_of(("add",), monkeypatch, force=True)
    assert probing.known("onnxruntime", "add", "u8") == added
    assert probing.known("onnxruntime", "add", "u4") is None


def test_what_does_not_load_or_match_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Onnxruntime.load

    class Wrong:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, inputs: Any) -> dict[str, np.ndarray]:
            return {"y": self.session.run(inputs)["y"] // 2}

        def close(self) -> None:
            self.session.close()

    def load(self: Onnxruntime, artifact: Any, threads: int | None = None) -> Any:
        if artifact.folder.name == "u8":
            raise Unsupported("no kernel for this")
        return Wrong(right(self, artifact, threads)) if artifact.folder.name == "s8" else right(self, artifact, threads)

    monkeypatch.setattr(Onnxruntime, "load", load)
    first, second = probe_of(("add",), monkeypatch)
    assert first.reason == "no kernel for this"
    assert first.matches is None
    assert second.matches is False
    assert second.error is not None
    assert second.error > 10
    assert second.ratio is None
    assert not second.slower
    console = Console(width=160, record=True, file=StringIO())
    console.print(_tables.probed([first, second]))
    text = console.export_text()
    assert "no kernel for this" in text
    assert "otherwise, by" in text


def test_without_an_engine_or_with_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probing.digest("onnxruntime") is None
    path = probing.path_of("onnxruntime")
    assert path is not None
    path.parent.mkdir(parents=True)
    for text in ("", "[]", '{"schema": 0}', '{"schema": 1, "operators": {"add": [{"engine": 1}]}}', "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert probing.known("onnxruntime", "add", "u8") is None
    monkeypatch.setattr(probing, "_version", lambda engine: None)
    assert probing.known("onnxruntime", "add", "u8") is None
    with pytest.raises(MissingExtra, match="no engine to probe is installed"):
        probing.probe(Silent())


def store(**slower: bool) -> None:
    found = {
        name: [probing.Probe("onnxruntime", name, "u8", ratio=FASTER, beside_left=SLOWER if is_slower else FASTER)]
        for name, is_slower in slower.items()
    }
    probing._store("onnxruntime", found)


def test_the_dialect_leaves_what_is_slower_and_says_by_which_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepack.export._onnx_integer import ONNX_RUNTIME, here

    assert here() == (ONNX_RUNTIME, [])
    store(add=False, cat=False)
    first = probing.digest("onnxruntime")
    assert here()[0] == ONNX_RUNTIME
    assert here()[1] == [f"operators without weights were chosen by probe {first} of this machine"]
    store(add=True, cat=False)
    dialect, notes = here()
    assert ONNX_RUNTIME.integer - dialect.integer == {"add", "add_"}
    assert notes[0].endswith("slower in integers are add")
    assert probing.digest("onnxruntime") != first


def test_an_export_follows_the_probe_and_is_made_again_when_it_changes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch import Tensor, nn

    from edgepack.compress.quantize import Quantize
    from edgepack.compressing import compress
    from edgepack.data import Batch
    from edgepack.export.onnx import Onnx
    from edgepack.exporting import export
    from edgepack.task import Input, Task

    class Samples:
        labels: tuple[str, ...] = ()

        def __len__(self) -> int:
            return 8

        def batches(self, size: int) -> Iterator[Batch]:
            part = {"x": np.random.default_rng(0).standard_normal((8, 8, 8, 8)).astype(np.float32)}
            yield Batch(part, part, None)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.c((self.b(x) + x).mean((2, 3)))

    task = Task((Input("x", (1, 8, 8, 8)),), calibration=Samples())  # type: ignore[arg-type]
    compress(Residual().eval(), task, [Quantize(explain=False)], tmp_path, Silent())

    def notes() -> tuple[str, bool]:
        result = export(tmp_path, [Onnx()], Silent())[0]
        assert result.artifact.manifest.parity.status == "checked"
        assert result.artifact.manifest.census is not None
        return " ".join(result.artifact.manifest.census["notes"]), result.up_to_date

    assert "QLinearAdd" in notes()[0]
    assert notes()[1]
    store(add=True)
    text, up_to_date = notes()
    assert not up_to_date
    assert "QLinearAdd" not in text
    assert f"probe {probing.digest('onnxruntime')}" in text
    store(add=True, mul=False)
    assert not notes()[1]
    assert notes()[1]
