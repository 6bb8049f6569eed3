from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[coreml]'")
pytest.importorskip("coremltools", reason="pip install 'edgepack[coreml]'")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from _networks import resnet20  # noqa: E402
from edgepack import contents, parts  # noqa: E402
from edgepack.artifact import Artifact, Manifest, describe_files  # noqa: E402
from edgepack.contracts import Census, Exporter, Graph, Runtime, TensorSpec  # noqa: E402
from edgepack.errors import DeviceError, InputError, MissingExtra, Unsupported  # noqa: E402
from edgepack.export._coreml_package import feature_names  # noqa: E402
from edgepack.front import with_front  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.parity import max_relative  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

INTERPRETED = {"engine": "interpreter"}


class Of(nn.Module):
    """A function of one input and some layers."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.layers)


def attention(x, layer):
    q, k, v = layer(x).reshape(x.shape[0], 7, 3, 2, 24).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def keep_best(x):
    best = x[..., 0].topk(4, 1).indices
    return x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def masked(x):
    keep = ((x > 0) & (x < 1)) | (x == 2)
    return torch.softmax(torch.where(keep, x, -x).masked_fill(torch.ones(8, 8).triu(1) > 0, -torch.inf), -1)


IMAGE, WORDS = (1, 6, 9, 11), (1, 8, 8)
ZOO = {
    "pixel shuffle": (Of(lambda x, c: F.pixel_shuffle(c(x), 2), nn.Conv2d(6, 12, 3, padding=1)), IMAGE),
    "grouped": (nn.Conv2d(6, 12, (3, 5), (2, 1), (1, 2), dilation=(2, 1), groups=3), IMAGE),
    "same": (nn.Conv2d(6, 4, 4, padding="same"), IMAGE),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2), IMAGE),
    "conv1d": (nn.Conv1d(8, 6, 5, 2, 3), WORDS),
    "conv3d": (nn.Conv3d(2, 4, 3, (1, 2, 2), 1), (1, 2, 5, 6, 7)),
    "bilinear": (Of(lambda x: F.interpolate(x, size=(11, 7), mode="bilinear")), IMAGE),
    "nearest": (Of(lambda x: F.interpolate(x, scale_factor=2)), IMAGE),
    "bicubic": (Of(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")), (1, 2, 4, 5)),
    "pools": (Of(lambda x: F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), 3, 2, 1, ceil_mode=True)), IMAGE),
    "pools without strides": (Of(lambda x: F.max_pool1d(F.max_pool2d(x, 2).flatten(2), 3)), IMAGE),
    "gelu": (Of(lambda x, a, n: n(F.gelu(F.gelu(a(x)), approximate="tanh")), nn.Linear(8, 9), nn.LayerNorm(9)), WORDS),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), WORDS),
    "attention": (Of(attention, nn.Linear(16, 144)), (1, 7, 16)),
    "norms": (nn.Sequential(nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.BatchNorm2d(6)), IMAGE),
    "lstm": (Of(lambda x, a: a(x)[0], nn.LSTM(8, 5, bidirectional=True, batch_first=True)), (1, 3, 8)),
    "gru": (Of(lambda x, a: a(x)[0], nn.GRU(8, 5, batch_first=True)), (1, 3, 8)),
    "keep best": (Of(keep_best), WORDS),
    "masked": (Of(masked), WORDS),
    "hard": (Of(lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.silu(x) + F.mish(x) + F.logsigmoid(x)), WORDS),
    "statistics": (Of(lambda x: x.std(1) + torch.var_mean(x, 2)[0] + x.norm(dim=1) + x.amax(1)), WORDS),
    "windows": (Of(lambda x: x.roll(2, 1)[:, 1::2, :-3].flip(2).cumsum(2)), WORDS),
    "scattered": (Of(lambda x: torch.zeros(1, 8, 8).scatter(2, x.argsort(-1), x)), WORDS),
}  # fmt: skip
FAST = {"pixel shuffle", "pools without strides", "transposed", "attention", "gelu", "keep best", "lstm"}


@functools.cache
def graph_of(name: str) -> Graph:
    torch.manual_seed(0)
    module, shape = ZOO[name]
    return capture(module.eval(), Task(inputs=(Input("x", shape, dynamic=()),)))


def exporter_of(**options: object) -> Exporter:
    return parts.find(Exporter, "coreml")(**options)


def runtime_of(**options: object) -> Runtime:
    return parts.find(Runtime, "coreml")(**(INTERPRETED | options))


def write(exporter: Exporter, graph: Graph, folder: Path) -> tuple[Artifact, Graph, Census]:
    simulation = exporter.lower(with_front(graph, exporter.layout, exporter.normalize), Plan())
    folder.mkdir()
    census = exporter.write(simulation, folder)
    manifest = Manifest("coreml", "coreml", "", simulation.inputs, simulation.outputs, describe_files(folder))
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder), simulation, census


def arrays(simulation: Graph) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    top = {"uint8": 256, "int64": 49}
    return {
        spec.name: (
            random.integers(0, top[spec.dtype], spec.shape) if spec.dtype in top else random.standard_normal(spec.shape)
        ).astype(spec.dtype)
        for spec in simulation.inputs
    }


def worst(artifact: Artifact, simulation: Graph, **options: object) -> float:
    inputs = arrays(simulation)
    session = runtime_of(**options).load(artifact, threads=1)
    found, wanted = session.run(inputs), run_graph(simulation, inputs)
    session.close()
    assert list(found) == [spec.name for spec in simulation.outputs]
    for name, value in wanted.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
    return max(max_relative(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ZOO])
def test_computes_its_simulation(tmp_path, name):
    for precision in ("float16",) if name in FAST else ("float16", "float32"):
        artifact, simulation, census = write(exporter_of(precision=precision), graph_of(name), tmp_path / precision)
        assert worst(artifact, simulation) <= 2e-6
        assert ("cast" in census.operators) or precision == "float32" or census.notes


class Tied(nn.Module):
    """Two inputs, three outputs, one weight used twice, and names that Core ML does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.out.weight = self.words.weight
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = torch.relu(self.words(ids).mean(1) + x + self.bias)
        scores = self.out(hidden)
        return scores, scores.argmax(1), hidden > 1


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> tuple[Artifact, Graph, Census]:
    torch.manual_seed(0)
    inputs = (Input("ids", (1, 7), dtype="int64"), Input("x", (1, 16)))
    graph = capture(Tied().eval(), Task(inputs=inputs, output_names=("scores.0", "int32", "high")))
    return write(exporter_of(precision="float32"), graph, tmp_path_factory.mktemp("tied") / "a")


def test_interface_keeps_order_names_and_types(tied):
    from coremltools.models.utils import load_spec

    artifact, simulation, _ = tied
    assert worst(artifact, simulation) <= 1e-6
    assert simulation.inputs[0].shape == (1, 7)
    description = load_spec(str(artifact.folder / "model.mlpackage")).description
    assert [feature.name for feature in description.input] == ["ids", "x"]
    assert [feature.name for feature in description.output] == ["scores_0", "_int32", "high"]


def test_a_shared_weight_is_stored_once(tied):
    _, simulation, census = tied
    weight = simulation.program.state_dict["words.weight"].detach().numpy()
    assert census.contents.count(contents.key(weight)) == 1
    assert census.weight_bytes["float32"] < 1.2 * weight.nbytes


def test_numbers_beyond_32_bits_are_refused(tied):
    artifact, simulation, _ = tied
    session = runtime_of().load(artifact)
    with pytest.raises(InputError, match="'ids' has a number beyond 32 bits"):
        session.run(arrays(simulation) | {"ids": np.full((1, 7), 2**40)})


def test_trace_shows_every_operator(tied):
    artifact, simulation, census = tied
    inputs = arrays(simulation)
    steps = runtime_of().trace(artifact, inputs)
    assert len(steps) == sum(census.operators.values())
    made: set[str] = set(inputs)
    for step in steps:
        assert made.issuperset(step.inputs)
        made |= step.outputs.keys()
    first = next(step for step in steps if "ids" in step.inputs)
    assert first.operator in census.operators
    final = {name: value for step in steps for name, value in step.outputs.items()}
    np.testing.assert_allclose(final["scores_0"], run_graph(simulation, inputs)["scores.0"], rtol=1e-5, atol=1e-6)
    again = runtime_of().trace(artifact, {**inputs, "x": inputs["x"] + 1})
    assert not np.array_equal(final["scores_0"], {n: v for s in again for n, v in s.outputs.items()}["scores_0"])


def test_a_manifest_of_another_model_is_refused(tied):
    artifact = tied[0]
    outputs = (TensorSpec("logits", "float32", (1, 50)), *artifact.manifest.outputs[1:])
    other = dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, outputs=outputs))
    with pytest.raises(InputError, match=r"the manifest names .*logits.*, the model .*scores_0"):
        runtime_of().load(other)


@pytest.mark.parametrize("name", ["model.mlmodel", "weight.bin", "Manifest.json"])
def test_a_damaged_file_is_no_traceback(tied, tmp_path, name):
    import shutil

    place = tmp_path / "a"
    shutil.copytree(tied[0].folder, place)
    damaged = next(place.rglob(name))
    damaged.write_bytes(b"\x07" * damaged.stat().st_size)
    manifest = dataclasses.replace(tied[0].manifest, files=describe_files(place))
    (place / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(InputError, match=r"coremltools cannot read .*model\.mlpackage"):
        runtime_of().load(Artifact.open(place))


FLOAT_BYTES = 269_722 * 4


@pytest.fixture(scope="module")
def resnet() -> Graph:
    torch.manual_seed(0)
    image = Input("image", (1, 3, 32, 32), mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.2), scale=255.0)
    return capture(resnet20().eval(), Task(inputs=(image,), labels=(*"abcdefghi", "köter")))


def test_packages_are_small(tmp_path, resnet):
    artifact, simulation, census = write(exporter_of(precision="float32"), resnet, tmp_path / "a")
    assert artifact.size_bytes <= 1.02 * FLOAT_BYTES
    assert census.operators["conv"] == 19
    assert "batch_norm" not in census.operators
    artifact, simulation, census = write(exporter_of(), resnet, tmp_path / "b")
    assert artifact.size_bytes < 0.5 * FLOAT_BYTES + 25_000
    assert "float32" not in census.weight_bytes
    assert not census.notes
    assert len(census.contents) == len(set(census.contents)) == 20
    assert worst(artifact, simulation) <= 2e-6
    rounded = worst(artifact, simulation, arithmetic="float16")
    assert 1e-5 < rounded < 2e-2


def test_float16_rounds_every_constant_and_says_so(resnet):
    before = {name: tensor.clone() for name, tensor in resnet.program.state_dict.items()}
    half = exporter_of().lower(resnet, Plan())
    assert all(torch.equal(tensor, before[name]) for name, tensor in resnet.program.state_dict.items())
    for tensor in half.program.state_dict.values():
        assert torch.equal(tensor.half().float(), tensor)
    x = {"image": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    exact, rounded = run_graph(resnet, x)["output"], run_graph(half, x)["output"]
    assert 0 < max_relative(rounded, exact) < 1e-2
    assert (exporter_of().precision, half.dialect) == ("plan", "float16")


def test_writing_twice_gives_the_same_bytes(tmp_path):
    one, _, _ = write(exporter_of(), graph_of("gelu"), tmp_path / "one")
    two, _, _ = write(exporter_of(), graph_of("gelu"), tmp_path / "two")
    assert one.manifest.files == two.manifest.files
    assert sorted(Path(name).name for name in one.manifest.files) == ["Manifest.json", "model.mlmodel", "weight.bin"]


def test_normalize_makes_image_inputs_and_keeps_labels(tmp_path, resnet):
    from coremltools.models.utils import load_spec

    artifact, simulation, _ = write(exporter_of(normalize=True), resnet, tmp_path / "a")
    assert simulation.inputs == (TensorSpec("image", "uint8", (1, 32, 32, 3), "NHWC"),)
    assert worst(artifact, simulation) <= 2e-6
    description = load_spec(str(artifact.folder / "model.mlpackage")).description
    image = description.input[0].type.imageType
    assert (image.width, image.height, image.colorSpace) == (32, 32, image.ColorSpace.Value("RGB"))
    facts = description.metadata.userDefined
    assert json.loads(facts["edgepack.labels"])[-1] == "köter"
    left = json.loads(facts["edgepack.preprocessing"])
    assert left == json.loads(json.dumps({n: dataclasses.asdict(how) for n, how in simulation.preprocessing.items()}))
    assert "com.github.apple.coremltools.conversion_date" not in facts
    steps = runtime_of().trace(artifact, arrays(simulation))
    assert steps[0].inputs == ("image",)


def test_a_constant_beyond_16_bits_keeps_its_operator_in_float32(tmp_path):
    graph = capture(Of(lambda x: torch.relu(x * 1e6) + 1).eval(), Task(inputs=(Input("x", (1, 8)),)))
    artifact, simulation, census = write(exporter_of(), graph, tmp_path / "a")
    assert worst(artifact, simulation) <= 1e-6
    assert census.notes == ("1 operators stay float32: 16 bits do not hold one of their constants",)


def test_an_operator_without_a_form_is_named(tmp_path, capfd):
    eigen = Of(lambda x: torch.linalg.eigvalsh(x @ x.mT))
    graph = capture(eigen.eval(), Task(inputs=(Input("x", (1, 4, 4)),)))
    with pytest.raises(Unsupported, match=r"operator aten\.\w*linalg_eigvalsh.* has no Core ML form"):
        write(exporter_of(), graph, tmp_path / "a")
    circular = capture(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), Task(inputs=(Input("x", (1, 2, 5, 5)),)))
    with pytest.raises(Unsupported, match=r"cannot take operator aten\.pad as it is used here: Pad mode should be"):
        write(exporter_of(), circular, tmp_path / "b")
    assert capfd.readouterr() == ("", "")


def test_a_fourier_transform_is_refused_in_plain_words(tmp_path):
    graph = capture(Of(lambda x: torch.fft.rfft(x).real).eval(), Task(inputs=(Input("x", (1, 8)),)))
    with pytest.raises(Unsupported) as caught:
        write(exporter_of(), graph, tmp_path / "a")
    assert caught.value.message == "operator aten.fft_rfft has no Core ML form for the way it is called here"
    assert caught.value.hint == "export to another format, or replace the operator"


def test_what_core_ml_cannot_take_is_refused():
    with pytest.raises(ValueError, match="target is one of iOS16, iOS17, iOS18, not 'iOS9'"):
        exporter_of(target="iOS9")


def test_dynamic_sizes_have_bounds(tmp_path):
    from coremltools.models.utils import load_spec

    image = Input("image", (1, 3, 32, 32), mean=(0.5,) * 3, scale=255.0, dynamic=("batch", "height", "width"))
    network = Of(lambda x, c: F.pixel_shuffle(c(x), 2), nn.Conv2d(3, 12, 3, padding=1))
    graph = capture(network.eval(), Task(inputs=(image,)))
    for normalize in (False, True):
        exporter = exporter_of(largest=640, normalize=normalize)
        artifact, simulation, _ = write(exporter, graph, tmp_path / str(normalize))
        random, session = np.random.default_rng(0), runtime_of().load(artifact)
        for height, width in ((64, 64), (33, 47)):
            shape = (1, height, width, 3) if normalize else (1, 3, height, width)
            values = random.integers(0, 256, shape).astype(simulation.inputs[0].dtype)
            found, wanted = session.run({"image": values}), run_graph(simulation, {"image": values})
            assert found["output"].shape == (1, 3, 2 * height, 2 * width)
            assert max_relative(found["output"], wanted["output"]) <= 2e-6
        kind = load_spec(str(artifact.folder / "model.mlpackage")).description.input[0].type
        sizes = kind.imageType.imageSizeRange.widthRange if normalize else kind.multiArrayType.shapeRange.sizeRanges[3]
        assert (sizes.lowerBound, sizes.upperBound) == (2, 640)
        assert (kind.imageType.width if normalize else kind.multiArrayType.shape[3]) == 64
    with pytest.raises(ValueError, match="largest is at least 1, not 0"):
        exporter_of(largest=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_targets(tmp_path, target):
    artifact, simulation, _ = write(exporter_of(target=target), graph_of("attention"), tmp_path / "a")
    assert worst(artifact, simulation) <= 2e-6


def test_feature_names_are_identifiers():
    specs = [TensorSpec(name, "float32", ()) for name in ("x", "x.0", "x_0", "9", "tensor", "größe", "")]
    assert feature_names(specs) == ["x", "x_0", "x_0_", "_9", "_tensor", "gr__e", "_"]
    assert feature_names(specs[:1], taken=["x"]) == ["x_"]


def test_runtime_options_are_checked():
    for name, value in (("engine", "ane"), ("compute_units", "GPU"), ("arithmetic", "bfloat16")):
        with pytest.raises(ValueError, match=rf"{name} is one of .*, not {value!r}"):
            runtime_of(**{name: value})


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")
def test_off_a_mac_artifacts_are_interpreted_and_never_timed(tied):
    runtime = parts.find(Runtime, "coreml")()
    assert runtime.version().endswith(", interpreted")
    assert runtime.version()[0].isdigit()
    assert "there is no latency" in runtime.untimed()
    with pytest.raises(DeviceError, match="Core ML runs on a Mac only"):
        runtime_of(engine="coreml").load(tied[0])


def test_a_missing_package_names_its_extra(monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    runtime = runtime_of()
    monkeypatch.setattr("edgepack.runtimes.coreml.installed", lambda name: None)
    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(MissingExtra, match="coremltools"):
        runtime.version()
