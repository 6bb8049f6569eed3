"""The code in the documents runs as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack import recipe

ROOT = Path(__file__).parent.parent


def block(file: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None, f"{file} has no {language} block"
    return found.group(1)


def test_the_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    (tmp_path / "edgepack.toml").write_text(block("README.md", "toml"))
    (tmp_path / "my_network.py").write_text("def build(): ...\n")
    (tmp_path / "my_network.safetensors").write_bytes(b"")
    for folder in ("photos", "more_photos"):
        (tmp_path / folder).mkdir()
    loaded = recipe.load(tmp_path)
    assert [type(part).__name__ for part in (*loaded.passes, *loaded.exporters)] == ["Quantize", "Onnx", "Tflite"]


def test_the_commands_of_the_readme_are_all_there_are() -> None:
    named = set(re.findall(r"`edgepack (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    shown = subprocess.run([sys.executable, "-m", "edgepack", "--help"], capture_output=True, text=True, check=True)
    assert named == set(re.findall(r"^│ (\w+) ", shown.stdout, flags=re.MULTILINE))


def test_the_pass_of_the_contributing_guide_works(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    (tmp_path / "clip.py").write_text(block("CONTRIBUTING.md", "python"))
    program = """
import torch, edgepack
from edgepack import recipe
from edgepack.contracts import Pass
layer = torch.nn.Linear(3, 2)
clip = recipe.build(Pass, {"use": "clip:Clip", "limit": 0.25})
task = edgepack.Task(inputs=(edgepack.Input("x", (1, 3)),))
result = edgepack.compress(layer, task, [clip], out="out")
assert result.notes[0].startswith("clip:Clip: limited "), result.notes
assert result.manifest.history[0]["options"] == {"limit": 0.25}
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    for package in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'edgepack[all]'")
    found = subprocess.run(
        [sys.executable, "-c", block("README.md", "python")], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "status='checked'" in found.stdout
