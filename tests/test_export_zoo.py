from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
pytest.importorskip("openvino", reason="pip install 'edgepack[openvino]'")

from edgepack import models, parts
from edgepack.artifact import Artifact, Manifest, describe_files
from edgepack.contracts import FLOAT_LIMIT, Exporter, Runtime
from edgepack.graph import capture, run_graph
from edgepack.parity import max_relative
from edgepack.plan import Plan
from edgepack.task import Input, Task

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
NETWORKS = {
    "torchvision:mobilenet_v2": 224,
    "torchvision:resnet50": 224,
    "torchvision:densenet121": 224,
    "timm:deit_small_patch16_224": 224,
    "timm:convnext_atto": 224,
    "timm:efficientnet_b0": 224,
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("source, size", NETWORKS.items())
def test_zoo_network_computes_its_simulation(tmp_path, source, size, precision):
    models.prepare_torchvision()
    pytest.importorskip(source.partition(":")[0], reason="pip install 'edgepack[zoo]'")
    module = models.load(source, Path())
    graph = capture(module, Task(inputs=(Input("x", (1, 3, size, size)),)))
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)}
    for format_name, engine in ENGINES.items():
        exporter = parts.find(Exporter, format_name)(precision=precision)
        simulation, folder = exporter.lower(graph, Plan()), tmp_path / format_name
        folder.mkdir()
        census = exporter.write(simulation, folder)
        floats = sum(tensor.numel() * 4 for tensor in module.parameters())
        assert sum(census.weight_bytes.values()) < (1.02 if precision == "float32" else 0.53) * floats
        manifest = Manifest(format_name, "", "", simulation.inputs, simulation.outputs, describe_files(folder))
        session = parts.find(Runtime, engine)().load(Artifact(folder, manifest), threads=1)
        found, wanted = session.run(x)["output"], run_graph(simulation, x)["output"]
        session.close()
        assert max_relative(found, wanted) <= FLOAT_LIMIT
