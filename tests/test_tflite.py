from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'edgepack[tflite-run]'")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from _networks import Pair  # noqa: E402
from edgepack import parts  # noqa: E402
from edgepack.artifact import Artifact, Manifest, describe_files  # noqa: E402
from edgepack.contracts import Census, Exporter, Graph, Runtime  # noqa: E402
from edgepack.errors import InputError, IntegrityError, MissingExtra, Unsupported  # noqa: E402
from edgepack.export._tflite_census import partitions  # noqa: E402
from edgepack.front import with_front  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.parity import max_relative  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
IMAGE = (Input("x", (1, 8, 12, 10), layout="NCHW"),)


class Network(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, function: Callable, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(*self.layers, x)


class Normed(nn.Module):
    """A small image classifier with everything that batch normalization and shortcuts bring."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.down = nn.Conv2d(24, 24, 3, 2, 1, groups=24)
        self.back, self.gamma = nn.Conv2d(24, 24, 1), nn.Parameter(torch.rand(24))
        self.head = nn.Linear(24, 10)
        for value in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
            nn.init.uniform_(value, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = functional.relu6(self.down(functional.max_pool2d(x, 3, 1, 1)))
        x = x + self.back(x) * self.gamma.reshape(1, -1, 1, 1)
        return self.head(x.mean((2, 3)))


def conv(outputs: int = 6, **options: int) -> nn.Module:
    return nn.Conv2d(8, outputs, 3, **options)


def resized(**options: object) -> Callable:
    return lambda layer, x: functional.interpolate(layer(x), **options)


def apply(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def row(*shape: int) -> tuple[Input, ...]:
    return (Input("x", shape),)


CASES = {
    "grouped": (apply, (conv(12, groups=4, padding=1),), IMAGE),
    "transposed": (apply, (nn.ConvTranspose2d(8, 6, 3, 2, 1, 1),), IMAGE),
    "transposed_1d": (apply, (nn.ConvTranspose1d(8, 6, 3, 2, 1, 1),), row(1, 8, 20)),
    "conv_1d": (apply, (nn.Conv1d(8, 6, 3, 2, 1),), row(1, 8, 20)),
    "conv_3d": (apply, (nn.Conv3d(4, 6, 3, 2, 1),), row(1, 4, 6, 8, 8)),
    "bilinear": (resized(scale_factor=1.3, mode="bilinear"), (conv(),), IMAGE),
    "bicubic": (resized(scale_factor=2, mode="bicubic"), (conv(),), IMAGE),
    "nearest": (resized(size=(17, 23), mode="nearest"), (conv(),), IMAGE),
    "antialias": (resized(size=(5, 5), mode="bilinear", antialias=True), (conv(),), IMAGE),
    "shuffle": (lambda c, x: functional.pixel_shuffle(c(x), 2), (conv(12),), IMAGE),
    "unshuffle": (lambda c, x: c(functional.pixel_unshuffle(x, 2)), (nn.Conv2d(32, 6, 3),), IMAGE),
    "repeated": (lambda c, x: c(x.repeat(1, 2, 1, 1) + x.tile(2, 1, 1)), (nn.Conv2d(16, 6, 3),), IMAGE),
    "gelu": (lambda a, n, x: functional.gelu(n(a(x))), (nn.Linear(16, 16), nn.LayerNorm(16)), row(1, 5, 16)),
    "attention": (lambda a, x: a(x, x, x)[0], (nn.MultiheadAttention(16, 4, batch_first=True),), row(1, 7, 16)),
    "lstm": (lambda a, b, x: b(a(x)[0][:, -1]), (nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)), row(1, 4, 8)),
    "sorted": (
        lambda a, x: torch.cat([torch.topk(a(x), 3)[0], *torch.sort(a(x), dim=1), a(x).argsort(descending=True)], 1),
        (nn.Linear(8, 8),),
        row(1, 8),
    ),
}  # fmt: skip
SLOW = set(CASES) - {"transposed"}


@functools.cache
def graph_of(name: str) -> Graph:
    torch.manual_seed(0)
    if name == "normed":
        image = Input("image", (1, 3, 16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), scale=255.0)
        return capture(Normed().eval(), Task(inputs=(image,), labels=("cat", "köter")))
    if name == "pair":
        inputs = (Input("ids", (1, 7), dtype="int64"), Input("x", (1, 8)))
        return capture(Pair().eval(), Task(inputs=inputs, output_names=("scores", "best")))
    function, layers, inputs = CASES[name]
    return capture(Network(function, *layers).eval(), Task(inputs=inputs))


def write(graph: Graph, folder: Path, **options: object) -> tuple[Artifact, Graph, Census]:
    exporter = parts.find(Exporter, "tflite")(**options)  # type: ignore[type-abstract]
    if exporter.layout or exporter.normalize:
        graph = with_front(graph, exporter.layout, exporter.normalize)
    simulation = exporter.lower(graph, Plan())
    folder.mkdir()
    census = exporter.write(simulation, folder)
    manifest = Manifest("tflite", "a", "float", simulation.inputs, simulation.outputs, describe_files(folder))
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder), simulation, census


def engine(**options: object) -> Runtime:
    return parts.find(Runtime, "tflite")(**options)  # type: ignore[type-abstract]


def arrays_for(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tops = {"uint8": 255, "int64": 49}
    return {
        spec.name: (
            random.integers(0, tops[spec.dtype], spec.shape)
            if spec.dtype in tops
            else random.standard_normal(spec.shape)
        ).astype(spec.dtype)
        for spec in graph.inputs
    }


def worst(artifact: Artifact, simulation: Graph, **options: object) -> float:
    session = engine(**options).load(artifact, threads=1)
    arrays = arrays_for(simulation)
    found, wanted = session.run(arrays), run_graph(simulation, arrays)
    session.close()
    assert list(found) == [spec.name for spec in simulation.outputs]
    assert [value.dtype for value in found.values()] == [value.dtype for value in wanted.values()]
    return max(max_relative(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Artifacts of the small networks, each written once."""
    root = tmp_path_factory.mktemp("tflite")

    found: dict[Path, tuple[Artifact, Graph, Census]] = {}

    def make(name: str, precision: str = "float32", layout: str | None = None, normalize: bool = False):
        folder = root / f"{name}-{precision}-{layout}-{normalize}"
        if folder not in found:
            found[folder] = write(graph_of(name), folder, precision=precision, layout=layout, normalize=normalize)
        return found[folder]

    return make


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_computes_its_simulation(made, name):
    artifact, simulation, _ = made(name)
    assert worst(artifact, simulation) <= 2e-6


@pytest.mark.parametrize(
    "name, options",
    [
        ("normed", {}),
        ("normed", {"precision": "float16"}),
        ("normed", {"normalize": True}),
        pytest.param("normed", {"normalize": True, "precision": "float16"}, marks=pytest.mark.slow),
        ("pair", {}),
        pytest.param("pair", {"precision": "float16"}, marks=pytest.mark.slow),
    ],
)
def test_every_precision_and_interface_computes_its_simulation(made, name, options):
    artifact, simulation, _ = made(name, **options)
    assert worst(artifact, simulation) <= 5e-6
    assert worst(artifact, simulation, xnnpack=False) <= 5e-6


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


def test_trace_shows_what_torch_computes(made):
    artifact, simulation, census = made("normed", layout="NHWC")
    arrays = arrays_for(simulation)
    steps = engine().trace(artifact, arrays)
    assert Counter(step.operator for step in steps) == census.operators
    assert steps[0].inputs == ("image",)
    known = {"image"}
    for step in steps:
        assert set(step.inputs) <= known
        assert not known & set(step.outputs)
        known |= set(step.outputs)
    stem = torch.relu(simulation_stem(simulation, arrays["image"]))
    first = next(iter(steps[0].outputs.values()))
    np.testing.assert_allclose(first, stem.permute(0, 2, 3, 1).numpy(), rtol=1e-4, atol=1e-5)
    last = next(iter(steps[-1].outputs.values()))
    np.testing.assert_allclose(last, run_graph(simulation, arrays)["output"], rtol=1e-4, atol=1e-5)


def simulation_stem(simulation: Graph, image: np.ndarray) -> torch.Tensor:
    torch.manual_seed(0)
    network = Normed().eval()
    with torch.no_grad():
        return network.norm(network.stem(torch.from_numpy(image).permute(0, 3, 1, 2)))


@pytest.mark.parametrize(
    "function, name",
    [
        (lambda x: torch.linalg.eigvalsh(x @ x.transpose(-1, -2)), r"aten\._linalg_eigh"),
        pytest.param(
            lambda x: functional.conv_transpose3d(x[None, None], torch.ones(1, 1, 2, 2, 2), stride=2),
            r"aten\.conv_transpose3d",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_operator_without_a_form_is_named(tmp_path, capfd, function, name):
    graph = capture(Network(function).eval(), Task(inputs=(Input("x", (1, 4, 4), dynamic=()),)))
    with pytest.raises(Unsupported, match=rf"operator {name} has no TFLite form"):
        write(graph, tmp_path / "a")
    assert capfd.readouterr() == ("", "")


def test_dynamic_sizes_are_refused_before_the_conversion():
    image = Input("image", (1, 3, 32, 32), dynamic=("batch", "height", "width"))
    graph = capture(Network(apply, nn.Conv2d(3, 4, 3)).eval(), Task(inputs=(image,)))
    with pytest.raises(Unsupported, match=r"input 'image' may have any height and width, but a TFLite file has fixed"):
        parts.find(Exporter, "tflite")().lower(graph, Plan())  # type: ignore[type-abstract]


def test_a_plan_that_cannot_be_written_is_refused():
    exporter = parts.find(Exporter, "tflite")()  # type: ignore[type-abstract]
    with pytest.raises(Unsupported, match=r"tflite cannot write what the plan says about 'conv2d' \(bits\)"):
        exporter.lower(graph_of("pair"), Plan({"conv2d": {"bits": 8}}))


def test_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(folder: Path, size_bytes: int) -> None:
        assert size_bytes > 3980
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgepack.export.tflite.reserve", full)
    with pytest.raises(OSError, match="No space left"):
        write(graph_of("pair"), tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())


def test_third_parties_are_silenced_on_every_channel(capfd):
    from edgepack.export._tflite_form import quiet

    with capfd.disabled(), quiet():
        sys.stderr.write("")
    with quiet():
        sys.stdout.write("theirs")
        os.write(1, b"theirs")
        os.write(2, b"theirs")
    assert capfd.readouterr() == ("", "")
    os.write(2, b"ours")
    assert capfd.readouterr() == ("", "ours")


def test_a_damaged_file_is_no_traceback_of_the_engine(made, tmp_path):
    whole = made("pair")[0]
    place = shutil.copytree(whole.folder, tmp_path / "a")
    model = place / "model.tflite"
    model.write_bytes(b"\x07" * model.stat().st_size)
    with pytest.raises(IntegrityError):
        engine().load(Artifact.open(place), threads=1)
    manifest = dataclasses.replace(whole.manifest, files=describe_files(place))
    (place / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot load .*model\.tflite"):
        engine().load(Artifact.open(place), threads=1)


def test_a_session_checks_its_inputs_and_copies_its_outputs(made):
    artifact, simulation, _ = made("pair")
    session = engine().load(artifact, threads=2)
    arrays = arrays_for(simulation)
    with pytest.raises(InputError, match="input 'x' is float64, expected float32"):
        session.run(arrays | {"x": np.zeros((1, 8))})
    first = session.run(dict(reversed(arrays.items())))
    kept = {name: value.copy() for name, value in first.items()}
    session.run(arrays_for(simulation, seed=1))
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)
    views = {name: np.repeat(value, 2, axis=1)[:, ::2] for name, value in arrays.items()}
    np.testing.assert_array_equal(session.run(views)["scores"], first["scores"])
    session.close()


def test_a_manifest_of_another_model_is_refused(made):
    artifact = made("pair")[0]
    other = dataclasses.replace(artifact.manifest, outputs=artifact.manifest.outputs[:1])
    with pytest.raises(
        InputError, match=r"the manifest names the outputs \['scores'\], the model \['best', 'scores'\]"
    ):
        engine().load(dataclasses.replace(artifact, manifest=other))


def test_a_missing_engine_names_its_extra(monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    runtime = engine()
    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(MissingExtra, match=r"'ai_edge_litert' is not installed\n.*tflite-run"):
        runtime.version()


@pytest.mark.slow
@pytest.mark.parametrize("precision, share", [("float32", 1.02), ("float16", 0.515)])
def test_resnet20_keeps_its_answers(tmp_path, precision, share):
    weights = SHARED / "data" / "resnet20_cifar10.safetensors"
    if not weights.exists():
        pytest.skip(f"{weights} is not there")
    from edgepack import models

    zoo = Path(__file__).parents[1] / "examples" / "zoo"
    network = models.load("models.py:resnet20", zoo, weights=str(weights))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = Input("x", (1, 3, 32, 32), mean=mean, std=std, scale=255.0)
    artifact, simulation, census = write(
        capture(network, Task(inputs=(image,))), tmp_path / "a", precision=precision, normalize=True
    )
    assert artifact.size_bytes <= share * 269_722 * 4
    assert "TRANSPOSE" not in census.operators
    with np.load(SHARED / "data" / "cifar10_test.npz") as data:
        pixels, labels = data["x"][:100], data["y"][:100]
    session = engine().load(artifact, threads=1)
    found = np.concatenate([session.run({"x": pixels[index : index + 1]})["output"] for index in range(100)])
    wanted = run_graph(simulation, {"x": pixels})["output"]
    assert max_relative(found, wanted) <= 2e-6
    assert (found.argmax(1) == labels).mean() >= 0.88
