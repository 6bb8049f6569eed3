"""Data from the user's own functions: the forms that are taken, and what goes wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from _reading import all_of, refuse
from edgepack.data import Arrays, open_data
from edgepack.task import Input

CODE = """
import numpy as np
X = np.arange(12, dtype=np.float32).reshape(4, 3)
def arrays(scale=1): return X * scale, np.arange(4)
def tables(): return {"a": X, "b": X[:, :2]}, None
def samples(): return [(row, index) for index, row in enumerate(X)]
def generator():
    for row in X: yield {"input": row}
class Lazy:
    def __len__(self): return 4
    def __getitem__(self, index): return X[index], X[index] * 2
def nan(): return [(row * np.nan, 0) for row in X]
def late(): return [(X[0], 0), (X[0][:2], 0)]
def crash(): return 1 / 0
def crash_late():
    yield X[0]
    raise RuntimeError("disk gone")
def empty(): return []
def number(): return 5
def named(): return [({"inptu": X[0]}, 0)]
value = 3
"""
VECTOR = Input("input", (1, 3), scale=9)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "data.py").write_text(CODE)
    return tmp_path


@pytest.mark.parametrize("name", ["arrays", "samples", "generator", "Lazy"])
def test_callable_forms(code: Path, name: str) -> None:
    """Already preprocessed: the input's scale is not applied."""
    data = open_data({"data": f"data.py:{name}", "samples": 3}, (VECTOR,), code)
    got = all_of(data, 2)
    assert got.inputs["input"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    wanted = {"generator": None, "Lazy": [[0, 2, 4], [6, 8, 10], [12, 14, 16]]}.get(name, [0, 1, 2])
    assert (None if got.targets is None else got.targets.tolist()) == wanted
    assert len(all_of(data)) == 3  # can be read again


def test_callable_options_and_tables(code: Path) -> None:
    scaled = open_data({"data": "data.py:arrays", "options": {"scale": 2}}, (VECTOR,), code)
    assert all_of(scaled).inputs["input"][1].tolist() == [6, 8, 10]
    both = open_data("data.py:tables", (Input("a", (1, 3)), Input("b", (1, 2))), code)
    assert isinstance(both, Arrays)
    assert all_of(both).inputs["b"].shape == (4, 2)


@pytest.mark.parametrize(
    "name, texts",
    [
        ("array", ["data.py has no 'array'", "did you mean 'arrays'"]),
        ("value", ["is not callable"]),
        ("crash", ["data.py:crash failed: ZeroDivisionError"]),
        ("crash_late", ["RuntimeError: disk gone"]),
        ("empty", ["gives no samples"]),
        ("number", ["data.py:number failed: TypeError"]),
        ("nan", ["sample 0 holds NaN"]),
        ("late", ["sample 1 has shape (2,), expected (3) for input 'input'"]),
        ("named", ["gives inputs ['inptu'], expected ['input']"]),
        ("tables", ["gives inputs ['a', 'b'], expected ['input']"]),
    ],
)
def test_callable_refused(code: Path, name: str, texts: list[str]) -> None:
    refuse(f"data.py:{name}", VECTOR, code, *texts, read=True)


def test_code_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(0)\n")
    refuse("bad.py:f", VECTOR, tmp_path, "bad.py failed: SystemExit")
    (tmp_path / "bad.py").write_text("def f(:\n")
    refuse("bad.py:f", VECTOR, tmp_path, "failed: SyntaxError")
    refuse("gone.py:f", VECTOR, tmp_path, "gone.py does not exist")
    refuse("no_such_package.sub:f", VECTOR, tmp_path, "there is no module 'no_such_package.sub'")


def test_neighbours_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "beside_this.py").write_text("import numpy as np\nX = np.ones((2, 3), np.float32)\n")
    (tmp_path / "data.py").write_text("from beside_this import X\ndef f(): return X, None\n")
    assert len(open_data("data.py:f", (VECTOR,), tmp_path)) == 2
