"""TensorRT files of networks with 2:4: counted in what was written, and said to the builder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgepack.compress.quantize import Quantize
from edgepack.compress.sparsify import Sparsify
from edgepack.compressing import PassRun
from edgepack.contracts import Graph
from edgepack.data import Arrays
from edgepack.export.tensorrt import Tensorrt
from edgepack.graph import capture
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task

onnx = pytest.importorskip("onnx", reason="pip install edgepack[onnx]")
ITEM = Input("x", (1, 3, 8, 8))


@pytest.fixture(scope="module")
def task() -> Task:
    images = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype("float32")
    return Task((ITEM,), calibration=Arrays((ITEM,), {"x": images}, None, True))


def network(task: Task, folder: Path, *passes: Sparsify | Quantize) -> tuple[Graph, Plan]:
    torch.manual_seed(0)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8), nn.ReLU(),
        nn.Linear(8, 6),
    ).eval()  # fmt: skip
    run = PassRun(folder, 0, Plan(), Silent(), module, task)
    for step in passes:
        module = step.apply(module, task, run)
    return capture(module, task), run.plan


def settings(graph: Graph, plan: Plan, folder: Path) -> tuple[bool, tuple[str, ...]]:
    exporter = Tensorrt()
    folder.mkdir(exist_ok=True)
    census = exporter.write(exporter.lower(graph, plan), folder)
    return json.loads((folder / "tensorrt.json").read_text())["sparse_weights"], census.notes


@pytest.mark.parametrize("passes", [(), (Quantize(explain=False),)], ids=["float", "integer"])
def test_two_of_four_in_the_written_file(task: Task, tmp_path: Path, passes: tuple[Quantize, ...]) -> None:
    graph, plan = network(task, tmp_path, Sparsify(pattern="2:4"), *passes)
    flag, notes = settings(graph, plan, tmp_path / "a")
    assert flag
    assert "2 of 4 weights hold 2:4; TensorRT may use sparse tensor cores for them" in notes
    stored = onnx.load(tmp_path / "a" / "model.onnx").graph.initializer
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in stored]
    (filters,) = (array for array in arrays if array.shape == (8, 8, 3, 3))
    (matrix,) = (array for array in arrays if array.shape in ((8, 128), (128, 8)))
    rows = matrix if matrix.shape[1] == 128 else matrix.T
    for weight in (np.moveaxis(filters, 1, -1), rows):
        assert (np.count_nonzero(weight.reshape(-1, 4), axis=1) <= 2).all()


def test_other_zeros_are_no_two_of_four(task: Task, tmp_path: Path) -> None:
    graph, plan = network(task, tmp_path, Sparsify(sparsity=0.5))
    flag, notes = settings(graph, plan, tmp_path / "a")
    assert not flag
    assert not any("2:4" in note for note in notes)
