"""TFLite artifacts compute their simulation, step by step; what cannot be written or read is refused in words."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'edgepack[tflite-run]'")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from _networks import Network  # noqa: E402
from _tflite_files import CASES, Normed, apply, arrays_for, engine, graph_of, maker, worst, write  # noqa: E402
from edgepack import parts  # noqa: E402
from edgepack.artifact import Artifact, describe_files  # noqa: E402
from edgepack.contracts import Exporter, Graph  # noqa: E402
from edgepack.errors import InputError, IntegrityError, MissingExtra, Unsupported  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.parity import max_relative  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
SLOW = set(CASES) - {"transposed"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("tflite"))


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
    with pytest.raises(InputError, match="the plan does not say which operator 'conv2d' is"):
        exporter.lower(graph_of("pair"), Plan({"conv2d": {"bits": 8}}))
    half = parts.find(Exporter, "tflite")(precision="float16")  # type: ignore[type-abstract]
    with pytest.raises(Unsupported, match=r"tflite cannot write what the plan says about 'conv2d' \(bits\)"):
        half.lower(graph_of("pair"), Plan({"conv2d": {"bits": 8}}))


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
