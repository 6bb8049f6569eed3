"""What lies in a TFLite file: operators, 16-bit weights, names, alignment, metadata; each byte once."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'edgepack[tflite-run]'")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from _networks import Network  # noqa: E402
from _tflite_files import IMAGE, graph_of, maker, worst, write  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.export._tflite_census import partitions  # noqa: E402
from edgepack.graph import capture  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("tflite"))


def test_transposes_are_no_more_than_the_interface_needs(made):
    for options, count in (({}, 1), ({"layout": "NHWC"}, 0), ({"normalize": True}, 0)):
        census = made("normed", **options)[2]
        assert census.operators.get("TRANSPOSE", 0) == count
        assert not [note for note in census.notes if "TRANSPOSE" in note]


@pytest.mark.slow
def test_permutations_of_the_network_are_noted(made):
    assert made("shuffle")[2].operators["TRANSPOSE"] == 2
    notes = made("attention")[2].notes
    assert any("TRANSPOSE operators, up to 2 of them for inputs and outputs" in note for note in notes)


def test_census_counts_what_is_in_the_file(made):
    artifact, simulation, census = made("normed")
    assert census.operators["CONV_2D"] == 2
    assert census.operators["DEPTHWISE_CONV_2D"] == 1
    floats = sum(tensor.numel() for tensor in simulation.program.state_dict.values() if tensor.ndim > 1)
    assert 4 * floats <= census.weight_bytes["float32"] <= 4 * floats + 600
    assert len(census.contents) == len(set(census.contents))
    assert census.notes[-1].startswith("XNNPACK takes")
    found = partitions((artifact.folder / "model.tflite").read_bytes())
    assert found.taken + sum(found.left.values()) == sum(census.operators.values())
    assert found.count == 1
    assert not found.left


def test_operators_that_fall_off_are_named(made):
    assert "left: ARG_MAX 1, CAST 1, EMBEDDING_LOOKUP 1" in made("pair")[2].notes[-1]


def test_float16_is_stored_in_16_bits(made):
    artifact, simulation, census = made("normed", precision="float16")
    whole = made("normed")[0]
    assert census.operators["DEQUANTIZE"] == 4
    assert census.weight_bytes["float16"] > 5 * census.weight_bytes["float32"]
    assert artifact.size_bytes < whole.size_bytes
    stored = {data.tobytes() for data in half_tensors(artifact)}
    for tensor in simulation.program.state_dict.values():
        if tensor.ndim == 4 and tensor.shape[1] > 1:
            assert tensor.permute(0, 2, 3, 1).numpy().astype(np.float16).tobytes() in stored


@pytest.mark.slow
def test_no_constant_is_multiplied_into_16_bit_weights(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.wide, self.back = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
            self.gamma = nn.Parameter(torch.rand(16))
            nn.init.uniform_(self.norm.weight, 0.5, 2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = functional.dropout(self.back(functional.gelu(self.wide(self.norm(x.permute(0, 2, 3, 1))))), 0.1, False)
            return x + y.permute(0, 3, 1, 2) * self.gamma.reshape(1, -1, 1, 1)

    graph = capture(Block().eval(), Task(inputs=(Input("x", (1, 16, 6, 6), layout="NCHW"),)))
    artifact, simulation, census = write(graph, tmp_path / "a", precision="float16")
    assert census.weight_bytes["float16"] == 2 * 16 * 64 * 2
    assert census.weight_bytes["float32"] < 700
    assert census.notes[0] == f"{census.weight_bytes['float32']} bytes of biases and constants stay float32"
    assert worst(artifact, simulation) <= 2e-6


def half_tensors(artifact: Artifact) -> list[np.ndarray]:
    model = read(artifact)
    return [
        np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        for tensor in model.subgraphs[0].tensors
        if tensor.type == schema.TensorType.FLOAT16
    ]


def read(artifact: Artifact):
    return schema.ModelT.InitFromPackedBuf((artifact.folder / "model.tflite").read_bytes(), 0)


def test_the_file_has_the_names_of_the_interface_and_no_others(made):
    artifact, _, _ = made("pair")
    model = read(artifact)
    (signature,) = model.signatureDefs
    assert [entry.name for entry in signature.inputs] == [b"ids", b"x"]
    assert [entry.name for entry in signature.outputs] == [b"scores", b"best"]
    names = [tensor.name for tensor in model.subgraphs[0].tensors if tensor.name]
    assert sorted(names) == [b"best", b"ids", b"scores", b"x"]
    assert model.description is None
    data = (artifact.folder / "model.tflite").read_bytes()
    for word in (b"MLIR", b"edgepack", b"torch", b".py", str(Path.home()).encode()):
        assert word not in data


def test_buffers_are_aligned_and_stored_once(made):
    artifact, _, _ = made("normed")
    data = (artifact.folder / "model.tflite").read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    contents = Counter(model.Buffers(index).DataAsNumpy().tobytes() for index in range(1, model.BuffersLength()))
    assert max(contents.values()) == 1
    for content in contents:
        if len(content) > 64:
            assert data.index(content) % 16 == 0


def test_labels_and_preprocessing_travel_when_baked_in(made):
    artifact, simulation, _ = made("normed", normalize=True)
    model = read(artifact)
    (entry,) = [entry for entry in model.metadata if entry.name == b"edgepack"]
    facts = json.loads(bytes(model.buffers[entry.buffer].data))
    left = {name: json.loads(json.dumps(dataclasses.asdict(how))) for name, how in simulation.preprocessing.items()}
    assert facts == {"labels": ["cat", "köter"], "preprocessing": left}
    assert all(how.identity for how in simulation.preprocessing.values())


@pytest.mark.slow
def test_a_shared_weight_is_stored_once(tmp_path):
    layer = nn.Conv2d(8, 8, 3, padding=1)
    graph = capture(Network(lambda c, x: c(torch.relu(c(x))), layer).eval(), Task(inputs=IMAGE))
    artifact, simulation, census = write(graph, tmp_path / "a", precision="float16")
    assert census.weight_bytes["float16"] == 8 * 8 * 9 * 2
    assert len(census.contents) == 1
    assert worst(artifact, simulation) <= 2e-6


def test_writing_twice_gives_the_same_bytes(made, tmp_path):
    one = made("normed")[0]
    two, _, _ = write(graph_of("normed"), tmp_path / "a")
    assert one.manifest.files == two.manifest.files
