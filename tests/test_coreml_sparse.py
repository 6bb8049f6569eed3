"""Weights full of zeros in Core ML packages: stored sparse, read as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgepack.artifact import Artifact, Manifest, describe_files
from edgepack.export.coreml import Coreml
from edgepack.graph import capture, run_graph
from edgepack.parity import max_relative
from edgepack.plan import Plan
from edgepack.runtimes.coreml import Coreml as Engine
from edgepack.task import Input, Task

pytest.importorskip("coremltools", reason="pip install edgepack[coreml]")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_zeros_are_not_stored(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 40)).eval()
    sizes = []
    arrays = {"x": np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype("float32")}
    for name, share in (("dense", 0.3), ("sparse", 0.8)):
        with torch.no_grad():
            for layer in (module[0], module[3]):
                layer.weight.masked_fill_(torch.rand_like(layer.weight) < share, 0.0)  # type: ignore[operator]
        graph = capture(module, Task((Input("x", (1, 4, 6, 6)),)))
        folder = tmp_path / name
        folder.mkdir()
        exporter = Coreml(precision=precision)
        simulation = exporter.lower(graph, Plan())
        census = exporter.write(simulation, folder)
        assert census.operators.get("constexpr_sparse_to_dense", 0) == (2 if share == 0.8 else 0)
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        manifest = Manifest("coreml", name, precision, simulation.inputs, simulation.outputs, describe_files(folder))
        (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
        found = Engine().load(Artifact.open(folder)).run(arrays)
        wanted = run_graph(simulation, arrays)
        assert max(max_relative(found[key], wanted[key]) for key in wanted) < 1e-5
    assert sizes[1] < 0.5 * sizes[0]
