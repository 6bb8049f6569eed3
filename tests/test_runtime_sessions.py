from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
pytest.importorskip("openvino", reason="pip install 'edgepack[openvino]'")

from torch import nn  # noqa: E402

from edgepack import parts  # noqa: E402
from edgepack.artifact import Artifact, Manifest, describe_files  # noqa: E402
from edgepack.contracts import Exporter, Runtime, TensorSpec  # noqa: E402
from edgepack.errors import InputError, IntegrityError, MissingExtra  # noqa: E402
from edgepack.graph import capture  # noqa: E402
from edgepack.runtimes._inputs import REMEMBERED, Gate  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

ENGINES = {"onnxruntime": "onnx", "openvino": "openvino", "pt2": "pt2"}


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.linear(x) + self.linear(y)
        return z, z.argmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    graph = capture(Sum().eval(), Task(inputs=(Input("x", (1, 6)), Input("y", (1, 6))), output_names=("z", "best")))
    root = tmp_path_factory.mktemp("artifacts")
    for format_name in ENGINES.values():
        place = root / format_name
        place.mkdir()
        parts.find(Exporter, format_name)().write(graph, place)  # type: ignore[type-abstract]
        manifest = Manifest(format_name, format_name, "float", graph.inputs, graph.outputs, describe_files(place))
        (place / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return root


def engine_of(name: str, **options: object) -> Runtime:
    return parts.find(Runtime, name)(**options)  # type: ignore[type-abstract]


def arrays(batch: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    return {name: random.standard_normal((batch, 6)).astype(np.float32) for name in ("x", "y")}


@pytest.mark.parametrize("engine", ENGINES)
def test_version_is_a_version(engine):
    assert engine_of(engine).version()[0].isdigit()


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_survive_the_next_run(folder, engine):
    session = engine_of(engine).load(Artifact.open(folder / ENGINES[engine]), threads=1)
    first = session.run(arrays(2))
    kept = {name: value.copy() for name, value in first.items()}
    session.run({name: value + 1 for name, value in arrays(2).items()})
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)
    assert first["best"].dtype == np.int64
    session.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_may_be_views_in_any_order_and_stay_untouched(folder, engine):
    session = engine_of(engine).load(Artifact.open(folder / ENGINES[engine]), threads=1)
    plain = arrays(3)
    wanted = session.run(plain)
    views = {name: np.repeat(plain[name], 2, axis=1)[:, ::2] for name in ("y", "x")}
    for view in views.values():
        view.flags.writeable = False
    found = session.run(views)
    np.testing.assert_allclose(found["z"], wanted["z"], rtol=1e-6)
    np.testing.assert_array_equal(plain["x"], arrays(3)["x"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_input_is_refused_in_words(folder, engine):
    session = engine_of(engine).load(Artifact.open(folder / ENGINES[engine]), threads=1)
    with pytest.raises(InputError, match=r"input 'x' is float64, expected float32"):
        session.run(arrays() | {"x": np.zeros((2, 6))})
    assert session.run(arrays())["z"].shape == (2, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_file_is_no_traceback_of_the_engine(folder, tmp_path, engine):
    place = tmp_path / "a"
    place.mkdir()
    for file in (folder / ENGINES[engine]).iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    model = next(place / name for name in ("model.onnx", "model.xml", "model.pt2") if (place / name).exists())
    model.write_bytes(b"\x07" * model.stat().st_size)
    with pytest.raises((IntegrityError, InputError)):
        engine_of(engine).load(Artifact.open(place), threads=1)
    manifest = Artifact.open(place).manifest
    (place / "artifact.json").write_text(
        dataclasses.replace(manifest, files=describe_files(place)).to_json(), encoding="utf-8"
    )
    with pytest.raises(InputError, match=model.name):
        engine_of(engine).load(Artifact.open(place), threads=1)


def test_an_error_text_that_cannot_be_decoded_is_a_damaged_file_too(folder, monkeypatch):
    import onnxruntime

    def session(*arguments, **options):
        return b"\xff".decode()

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(InputError, match=r"cannot load .*model\.onnx"):
        engine_of("onnxruntime").load(Artifact.open(folder / "onnx"), threads=1)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_manifest_of_another_model_is_refused(folder, engine):
    artifact = Artifact.open(folder / ENGINES[engine])
    other = dataclasses.replace(artifact.manifest, outputs=(TensorSpec("logits", "float32", ("batch", 3)),))
    with pytest.raises(InputError, match="logits"):
        engine_of(engine).load(dataclasses.replace(artifact, manifest=other))


def test_openvino_reads_onnx_too(folder):
    one = engine_of("openvino").load(Artifact.open(folder / "onnx"), threads=1).run(arrays())
    two = engine_of("onnxruntime").load(Artifact.open(folder / "onnx"), threads=1).run(arrays())
    np.testing.assert_allclose(one["z"], two["z"], rtol=1e-5, atol=1e-6)


def test_openvino_precision_is_checked_and_default_loads(folder):
    with pytest.raises(ValueError, match="precision is one of float32, float16, bfloat16, default"):
        engine_of("openvino", precision="f32")
    session = engine_of("openvino", precision="default").load(Artifact.open(folder / "openvino"), threads=1)
    assert session.run(arrays())["z"].shape == (2, 3)


@pytest.mark.parametrize(
    "engine, package", [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("pt2", "torch")]
)
def test_a_missing_engine_names_its_extra(monkeypatch, engine, package):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    runtime = engine_of(engine)
    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(MissingExtra, match=package):
        runtime.version()


SPECS = (
    TensorSpec("image", "float32", ("batch", 3, "height", 8), "NCHW"),
    TensorSpec("ids", "int64", ("batch", 4)),
)


def good(batch: int = 2, height: int = 5) -> dict[str, np.ndarray]:
    return {"image": np.zeros((batch, 3, height, 8), np.float32), "ids": np.zeros((batch, 4), np.int64)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": None}, "input 'ids' is missing"),
        ({"imago": good()["image"]}, "there is no input 'imago'\n  did you mean 'image'"),
        ({"ids": np.zeros((2, 4), np.int32)}, "input 'ids' is int32, expected int64"),
        ({"ids": np.zeros(2, np.int64)}, r"input 'ids' has shape \(2,\), expected \(batch, 4\)"),
        ({"image": np.zeros((2, 3, 5, 7), np.float32)}, r"has shape \(2, 3, 5, 7\), expected \(batch, 3, height, 8\)"),
        ({"image": np.zeros((0, 3, 5, 8), np.float32)}, "input 'image' is empty"),
        ({"ids": np.zeros((3, 4), np.int64)}, "inputs 'image' and 'ids' differ in their axis 'batch': 2 and 3"),
        ({"ids": [[0, 0, 0, 0]] * 2}, "input 'ids' is a list, expected a NumPy array"),
    ],
)
def test_gate_says_what_does_not_fit(change, message):
    inputs = {name: value for name, value in (good() | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Gate(SPECS).check(inputs)


def test_gate_accepts_every_size_of_a_dynamic_axis():
    gate = Gate(SPECS)
    for height in range(1, REMEMBERED + 10):
        gate.check(good(1, height))
    gate.check(good(7, 3))
