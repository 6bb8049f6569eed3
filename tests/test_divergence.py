from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
pytest.importorskip("openvino", reason="pip install 'edgepack[openvino]'")

import torch
from torch import nn

from edgepack import contents
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, describe_files
from edgepack.compressing import compress
from edgepack.contracts import Census, Step
from edgepack.divergence import Divergence, equal, first_divergence, views
from edgepack.errors import InputError, ParityError, Unsupported
from edgepack.export.onnx import Onnx
from edgepack.export.openvino import Openvino
from edgepack.exporting import export, simulation_of
from edgepack.graph import capture, run_graph
from edgepack.pipeline import verify
from edgepack.progress import Silent
from edgepack.proof import hold_storage, prove
from edgepack.runtimes.onnxruntime import Onnxruntime
from edgepack.runtimes.openvino import Openvino as OpenvinoEngine
from edgepack.task import Input, Task

ROOT = Path(__file__).resolve().parent.parent
TASK = Task(inputs=(Input("image", (1, 3, 32, 32)),))


def _faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


faults = _faults()


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    network = faults.Mixed().train()
    with torch.no_grad():
        network(torch.randn(32, 3, 32, 32))
    return capture(network.eval(), TASK)


def _artifact(folder, exporter, simulation, written):
    folder.mkdir()
    census = exporter.write(written, folder)
    x = {"image": np.random.default_rng(3).standard_normal((3, 3, 32, 32)).astype(np.float32)}
    answers = run_graph(simulation, x)
    Golden(x, answers, answers).save(folder / GOLDEN)
    manifest = Manifest(exporter.format, "n", "", simulation.inputs, simulation.outputs, describe_files(folder))
    return Artifact(folder, manifest), census


def _with(simulation, fault, node):
    module = simulation.program.module(check_guards=False)
    faults.FAULTS[fault][0](module, next(item for item in module.graph.nodes if item.name == node))
    module.recompile()
    return faults.recapture(simulation, module)


CASES = [
    ("weight transposed", "conv2d_3"),
    ("weight transposed", "linear_4"),
    ("padding off by one", "conv2d_1"),
    ("wrong axis", "softmax"),
    ("wrong axis", "cat"),
    ("dropped bias", "linear_2"),
    ("swapped scale", "layer_norm"),
    ("BN epsilon", "batch_norm_1"),
    ("ReLU6 clip lost", "hardtanh"),
    ("layout swapped", "flatten_1"),
]


@pytest.mark.parametrize("fault, node", CASES)
def test_names_the_operator_in_onnx(tmp_path, mixed, fault, node):
    artifact, _ = _artifact(tmp_path / "a", Onnx(), mixed, _with(mixed, fault, node))
    with pytest.raises(ParityError, match="first operator that diverges") as caught:
        prove(artifact, Onnxruntime(), mixed)
    assert caught.value.details["node"] == node
    assert caught.value.exit_status == 6


@pytest.mark.parametrize("fault, node", [CASES[0], CASES[7]])
def test_names_the_operator_in_openvino(tmp_path, mixed, fault, node):
    artifact, _ = _artifact(tmp_path / "a", Openvino(), mixed, _with(mixed, fault, node))
    with pytest.raises(ParityError) as caught:
        prove(artifact, OpenvinoEngine(), mixed)
    assert caught.value.details["node"] == node
    assert caught.value.details["step"]


@pytest.mark.parametrize("exporter, engine", [(Onnx(), Onnxruntime()), (Openvino(), OpenvinoEngine())])
def test_a_right_artifact_has_no_divergence(tmp_path, mixed, exporter, engine):
    artifact, census = _artifact(tmp_path / "a", exporter, mixed, mixed)
    assert prove(artifact, engine, mixed).max_rel < 1e-5
    hold_storage(mixed, census, "n")
    x = {"image": artifact.golden().inputs["image"][:2]}
    found = first_divergence(mixed, x, engine.trace(artifact, x))
    assert found == Divergence(None)
    assert "rewriting" in str(found)


def test_an_operator_that_outputs_hide_is_found(tmp_path):
    """A channel of tiny variance goes wrong, and the outputs stay within the limit."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    network[1].running_var.copy_(torch.tensor([1e-4, 10.0, 10.0, 10.0]))
    with torch.no_grad():
        network[2].weight[:, 0] *= 2e-7
    graph = capture(network, TASK)
    artifact, _ = _artifact(tmp_path / "a", Onnx(), graph, _with(graph, "BN epsilon", "batch_norm"))
    with pytest.raises(ParityError, match="the outputs agree, an operator does not") as caught:
        prove(artifact, Onnxruntime(), graph)
    assert caught.value.details["node"] == "batch_norm"
    assert caught.value.details["error"] > 0.1


def test_a_weight_stored_twice_is_refused(mixed):
    weight = mixed.program.state_dict["shared.weight"].detach().numpy()
    once = Census({}, {}, (), (contents.key(weight),))
    hold_storage(mixed, once, "onnx 'n'")
    turned = Census({}, {}, (), (contents.key(weight), contents.key(weight.T)))
    hold_storage(mixed, turned, "onnx 'n'")  # one operator may need it transposed
    twice = Census({}, {}, (), (contents.key(weight.T), contents.key(weight.T)))
    with pytest.raises(ParityError, match=r"'shared.weight' of linear, linear_1 is stored 2 times \(2304 bytes each\)"):
        hold_storage(mixed, twice, "onnx 'n'")


def test_engines_without_a_trace_say_so(tmp_path, mixed):
    class Blind(Onnxruntime):
        def trace(self, artifact, inputs):
            raise Unsupported("this engine shows nothing")

    artifact, _ = _artifact(tmp_path / "a", Onnx(), mixed, _with(mixed, "dropped bias", "linear_5"))
    with pytest.raises(ParityError, match="which operator cannot be told: this engine shows nothing"):
        prove(artifact, Blind(), mixed)


def test_content_keys_ignore_the_order_of_axes():
    weight = np.random.default_rng(0).standard_normal((8, 3, 5, 5)).astype(np.float32)
    turned = weight.transpose(0, 2, 3, 1)
    assert contents.values(contents.key(weight)) == contents.values(contents.key(turned))
    assert contents.copies([contents.key(weight), contents.key(turned), contents.key(turned)]) == {
        contents.values(contents.key(weight)): 2
    }
    assert contents.key(weight) != contents.key(weight * np.float32(1.0000001))
    half = weight.astype(np.float16)
    assert contents.key(half) == contents.key(half.astype(np.float32))
    assert contents.key(np.ones(1000, np.float32)) is None
    assert contents.key(weight[:1, :1]) is None


def test_channels_last_counts_as_the_same_value():
    value = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    assert any(equal(view, value) for view in views(np.moveaxis(value, 1, -1)))
    assert not any(equal(view, value) for view in views(value.transpose(0, 1, 3, 2)))
    assert equal(value[:, :, :1], value[:, :, 0])
    assert not equal(value + 1e-4, value)


def test_a_reshape_the_file_lacks_is_not_blamed():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 32 * 32, 4)

        def forward(self, image):
            return self.linear(image.flatten(1))

    graph = capture(Head().eval(), TASK)
    x = {"image": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    wrong = Step("Gemm", "head", ("image",), {"y": run_graph(graph, x)["output"] + 1})
    found = first_divergence(graph, x, [wrong])
    assert (found.node, found.layer, found.step) == ("linear", "linear", "Gemm #0 'head'")


def _rewrite(folder, change):
    """Change the model file and its hash, as a defect of a tool between export and here would."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    manifest = Manifest.from_json((folder / MANIFEST).read_text(), folder)
    (folder / MANIFEST).write_text(replace(manifest, files=describe_files(folder)).to_json())


def test_verify_finds_the_operator_from_the_folders_alone(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    compress(network, TASK, [], tmp_path, Silent())
    (result,) = export(tmp_path, [Onnx()], Silent())
    assert run_graph(simulation_of(result.artifact), {"image": np.zeros((1, 3, 32, 32), np.float32)})

    def negate(model):
        weight = next(item for item in model.graph.initializer if list(item.dims) == [4, 4, 3, 3])
        weight.raw_data = (-np.frombuffer(weight.raw_data, np.float32)).tobytes()

    for folder in ("onnx", "baseline/onnx"):
        _rewrite(tmp_path / folder, negate)
        with pytest.raises(ParityError, match=r"first operator that diverges: conv2d of '2' \(conv2d_1") as caught:
            verify(tmp_path / folder)
        json.dumps(dict(caught.value.details))
    compress(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), TASK, [], tmp_path, Silent())
    with pytest.raises(ParityError, match=r"which operator cannot be told: .*is not what .* was made from"):
        verify(tmp_path / "onnx")
    with pytest.raises(InputError, match="is not what"):
        simulation_of(result.artifact)
