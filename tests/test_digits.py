"""The embedded example: its files, its recipe and what its network scores."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from _compiler import needs_compiler
from edgepack import recipe, usercode
from edgepack.data import open_data
from edgepack.metrics import find
from edgepack.sheet import Sheet
from edgepack.task import Input

PACKAGE = Path(str(importlib.resources.files("edgepack")))
FOLDER = PACKAGE / "examples" / "digits"
TEMPLATE = PACKAGE / "templates" / "edgepack.toml"


def task_section() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "edgepack.toml").read_text(encoding="utf-8"))["task"]


def score(folder: Path) -> float:
    torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    from safetensors.torch import load_file

    section = task_section()
    data = open_data(section["evaluation"], (Input("input", **section["input"]),), folder)
    network = usercode.load("models.py:digits_net", folder)().eval()
    network.load_state_dict(load_file(folder / "digits.safetensors"))
    metric = find(section["metric"], folder)
    with torch.no_grad():
        rows = [
            metric.statistics(network(torch.from_numpy(batch.inputs["input"])).numpy(), batch.targets)
            for batch in data.batches(100)
        ]
    return metric.reduce(np.concatenate(rows))


def test_weights_score_what_the_readme_says() -> None:
    assert score(FOLDER) == pytest.approx(0.998, abs=0.0021)  # one image may sit on the edge on another processor


def test_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert sizes["digits.safetensors"] < 150_000
    assert sum(sizes.values()) < 300_000


def test_split_does_not_overlap() -> None:
    item = Input("input", **task_section()["input"])
    train, test = (next(open_data(name, (item,), FOLDER).batches(2000)) for name in ("train.npz", "test.npz"))
    rows = [{image.tobytes() for image in batch.raw["input"]} for batch in (train, test)]
    assert (len(train), len(test)) == (1297, 500)
    assert not rows[0] & rows[1]
    assert test.targets is not None
    assert np.bincount(test.targets).min() >= 48


def test_recipe_is_valid() -> None:
    found = recipe.load(FOLDER)
    assert found.sheet.budget.score_drop == 0.005
    assert len(found.passes) == 1
    assert len(found.exporters) == 2


def test_template_is_valid_and_its_options_exist() -> None:
    lines = TEMPLATE.read_text(encoding="utf-8")
    Sheet.model_validate(tomllib.loads(lines))
    on = [line.removeprefix("# ") for line in lines.splitlines() if line.startswith(("# [budget", "# score", "# size"))]
    Sheet.model_validate(tomllib.loads(lines + "\n".join(on)))
    assert max(map(len, lines.splitlines())) <= 120


EIGHT_BITS = """
[model]
module  = "models.py:digits_net"
weights = "digits.safetensors"
[task]
calibration = {data = "train.npz", samples = 128}
evaluation  = {data = "test.npz"}
input  = {shape = [1, 1, 8, 8], scale = 16, mean = [0.5], std = [0.5]}
metric = "top1"
[[compress]]
use = "quantize"
explain = false
[budget]
score_drop = 0.01
"""


@pytest.mark.slow
def test_eight_bits_in_every_format(tmp_path: Path) -> None:
    """Its average pool has four integers to a mean: every fourth falls between two steps."""
    needs_compiler()
    engines = ("onnxruntime", "openvino", "ai_edge_litert", "litert_torch", "coremltools")
    if any(importlib.util.find_spec(name) is None for name in engines):
        pytest.skip("pip install 'edgepack[all]'")
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    formats = ("onnx", "openvino", "tflite", "coreml", "c")
    exports = "".join(f'[[export]]\nuse = "{name}"\n' for name in formats)
    (tmp_path / "edgepack.toml").write_text(EIGHT_BITS + exports, encoding="utf-8")
    command = [sys.executable, "-m", "edgepack", "run", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in formats:
        manifest = json.loads((tmp_path / "edgepack-out" / name / "artifact.json").read_text(encoding="utf-8"))
        assert manifest["parity"]["status"] == "checked"
        assert manifest["dialect"][1] == "8"


@pytest.mark.slow
def test_training_can_be_repeated(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="pip install scikit-learn")
    for name in ("train.py", "models.py"):
        shutil.copy(FOLDER / name, tmp_path)
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, timeout=300)
    for name in ("train.npz", "test.npz"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    assert score(tmp_path) >= 0.98
