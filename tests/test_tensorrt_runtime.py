"""TensorRT's runtime against a stand-in (_fake_tensorrt.py): no GPU is needed."""

from __future__ import annotations

import inspect
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[tensorrt]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")

from torch import nn  # noqa: E402

from _fake_tensorrt import STANDING_IN, SURFACE, Builder, ILogger, OnnxParser, Place, enum  # noqa: E402
from edgepack import parts  # noqa: E402
from edgepack.artifact import Artifact, Manifest, describe_files  # noqa: E402
from edgepack.contracts import Exporter, Graph, Runtime  # noqa: E402
from edgepack.errors import DeviceError, InputError, IntegrityError, MissingExtra, Unsupported  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.parity import max_relative  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.runtimes import _tensorrt_cuda as cuda  # noqa: E402
from edgepack.runtimes import _tensorrt_engine as engines  # noqa: E402
from edgepack.runtimes._tensorrt_types import typed  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(Builder, "builds", [])
    return Place(monkeypatch, tmp_path / "cache")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.head(self.body(x))
        return z, z.argmax(1)


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Net().eval(), Task(inputs=(Input("x", (1, 3, 16, 16)),), output_names=("z", "best")))


def written(graph: Graph, folder: Path, **options) -> tuple[Artifact, Graph]:
    exporter = parts.find(Exporter, "tensorrt")(**options)
    simulation = exporter.lower(graph, Plan())
    folder.mkdir()
    exporter.write(simulation, folder)
    dialect = "float16" if exporter.precision == "float16" else "float32"
    manifest = Manifest("tensorrt", "t", dialect, simulation.inputs, simulation.outputs, describe_files(folder))
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder), simulation


@pytest.fixture(scope="module")
def plain(graph, tmp_path_factory) -> Artifact:
    return written(graph, tmp_path_factory.mktemp("plain") / "a")[0]


def images(count: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(count).standard_normal((count, 3, 16, 16)).astype(np.float32)}


@pytest.mark.parametrize("version", SURFACE)
def test_the_stand_in_offers_what_tensorrt_offers(version):
    for class_name, members in SURFACE[version]["classes"].items():
        cls = STANDING_IN.get(class_name)
        for name, signatures in members.items():
            assert signatures, f"{class_name}.{name} is not in TensorRT {version}"
            if cls is None or name == "__init__" or name not in vars(cls):
                continue
            if signatures == "property":
                assert isinstance(vars(cls)[name], property)
                continue
            ours = [parameter for parameter in inspect.signature(getattr(cls, name)).parameters if parameter != "self"]
            theirs = [re.findall(r"(\w+):", text.partition("->")[0]) for text in signatures]
            assert any(ours == names[1 : len(ours) + 1] for names in theirs), (class_name, name, theirs)
        for name, value in vars(cls).items() if cls is not None else ():
            if inspect.isfunction(value) and name not in ("__init__", "array"):
                assert name in members, f"the stand-in's {class_name}.{name} was not recorded"


@pytest.mark.parametrize("version", SURFACE)
def test_builds_once_and_computes_the_network(gpu, graph, plain, version):
    gpu.on(version)
    assert gpu.runtime().version() == version
    for _ in range(2):
        session = gpu.runtime().load(plain, threads=1)
        found, wanted = session.run(images()), run_graph(graph, images())
        assert max_relative(found["z"], wanted["z"]) < 1e-5
        np.testing.assert_array_equal(found["best"], wanted["best"])
        session.close()
    build = Builder.builds.pop()
    assert not Builder.builds
    kinds = enum(version, "NetworkDefinitionCreationFlag")
    assert build.network.flags == 1 << kinds.STRONGLY_TYPED
    assert "TF32" not in build.config.flags
    assert build.config.profiles == [{"x": ((1, 3, 16, 16), (1, 3, 16, 16), (64, 3, 16, 16))}]
    assert build.config.pools == {}


def test_everything_is_given_back(gpu, plain):
    session = gpu.runtime().load(plain)
    kept = session.run(images(2))
    copies = {name: value.copy() for name, value in kept.items()}
    session.run(images(5))
    session.run({"x": images(5)["x"][:, :, ::-1]})
    for name, value in copies.items():
        np.testing.assert_array_equal(kept[name], value)
    assert len(gpu.library.memory) == 3
    session.close()
    assert (gpu.library.memory, gpu.library.contexts, gpu.library.streams) == ({}, 0, 0)


def test_a_batch_beyond_the_profile_is_split_and_one_below_refused(gpu, graph, tmp_path):
    artifact, simulation = written(graph, tmp_path / "a", batch=(2, 2, 3))
    session = gpu.runtime().load(artifact)
    np.testing.assert_allclose(session.run(images(8))["z"], run_graph(simulation, images(8))["z"], rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"'x' has shape \(1, 3, 16, 16\); the engine takes 2 to 3 along axis 0"):
        session.run(images(1))
    with pytest.raises(InputError, match="float64, expected float32"):
        session.run({"x": images()["x"].astype(np.float64)})


def test_float16_computes_in_float16(gpu, graph, tmp_path):
    artifact, simulation = written(graph, tmp_path / "a", precision="float16", workspace_mb=64)
    runtime = gpu.runtime()
    assert runtime.limit(artifact) == 2e-2
    found = runtime.load(artifact).run(images())["z"]
    assert 1e-6 < max_relative(found, run_graph(simulation, images())["z"]) < runtime.limit(artifact)
    exact = gpu.runtime(compute="float32")
    assert exact.limit(artifact) == 1e-4
    assert max_relative(exact.load(artifact).run(images())["z"], run_graph(simulation, images())["z"]) < 1e-5
    half, wide = (onnx.load_model_from_string(build.network.model) for build in Builder.builds)
    assert {t.data_type for t in half.graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in wide.graph.initializer}
    assert Builder.builds[0].config.pools == {"WORKSPACE": 64 << 20}
    runtime.load(artifact)
    assert len(Builder.builds) == 2


def test_sparse_weights_are_a_flag(gpu, graph, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("edgepack.export._tensorrt_sparse.sparse_weights", lambda path: (1, 2))
    gpu.runtime().load(written(graph, tmp_path / "a")[0])
    gpu.runtime().load(plain)
    assert ["SPARSE_WEIGHTS" in build.config.flags for build in Builder.builds] == [True, False]


def test_tf32_is_a_flag(gpu, plain):
    gpu.runtime(compute="tf32").load(plain)
    assert "TF32" in Builder.builds[0].config.flags


@pytest.mark.parametrize(
    "elsewhere, difference",
    [
        ({"name": "NVIDIA Other"}, "GPU NVIDIA Test instead of NVIDIA Other"),
        ({"capability": (9, 0)}, r"compute capability 8.7 instead of 9.0"),
        ({"version": "11.4.0.106"}, r"TensorRT 10.16.1.11 instead of 11.4.0.106"),
    ],
)
def test_a_foreign_engine_is_refused_and_never_taken_from_the_cache(gpu, plain, elsewhere, difference):
    gpu.runtime().load(plain).close()
    (engine,) = gpu.folder.glob("*.engine")
    gpu.runtime(engine=str(engine)).load(plain).close()
    assert len(Builder.builds) == 1
    gpu.on(**elsewhere)
    with pytest.raises(Unsupported, match=f"is a foreign engine: .*{difference}"):
        gpu.runtime(engine=str(engine)).load(plain)
    assert (gpu.library.contexts, gpu.library.streams) == (0, 0)
    gpu.runtime().load(plain).close()
    assert len(Builder.builds) == 2
    # A foreign engine under the name that is looked for here: the tag tells.
    (mine,) = set(gpu.folder.glob("*.engine")) - {engine}
    engines.tag_of(mine).write_bytes(engines.tag_of(engine).read_bytes())
    gpu.runtime().load(plain).close()
    assert len(Builder.builds) == 3


def test_an_engine_in_the_artifact_must_be_of_this_machine(gpu, plain, tmp_path):
    folder = shutil.copytree(plain.folder, tmp_path / "a")
    gpu.runtime().load(plain).close()
    (engine,) = gpu.folder.glob("*.engine")
    (folder / "model.engine").write_bytes(engine.read_bytes())
    (folder / "model.engine.json").write_bytes(engines.tag_of(engine).read_bytes())
    manifest = Manifest(
        "tensorrt", "t", "float32", plain.manifest.inputs, plain.manifest.outputs, describe_files(folder)
    )
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    gpu.runtime().load(Artifact.open(folder)).close()
    assert len(Builder.builds) == 1
    gpu.on(name="NVIDIA Other")
    with pytest.raises(Unsupported, match=r"model\.engine is a foreign engine"):
        gpu.runtime().load(Artifact.open(folder))


def test_an_engine_nobody_vouches_for_is_not_loaded(gpu, plain):
    gpu.runtime().load(plain).close()
    (engine,) = gpu.folder.glob("*.engine")
    handed = gpu.runtime(engine=str(engine))
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1] + b"x")
    with pytest.raises(IntegrityError, match="SHA-256 does not match its tag"):
        handed.load(plain)
    gpu.runtime().load(plain).close()
    assert len(Builder.builds) == 2
    assert engine.read_bytes() == whole
    engines.tag_of(engine).write_text("{", encoding="utf-8")
    with pytest.raises(IntegrityError, match="is damaged"):
        handed.load(plain)
    engines.tag_of(engine).unlink()
    with pytest.raises(IntegrityError, match="has no tag"):
        handed.load(plain)
    with pytest.raises(InputError, match="there is no engine"):
        gpu.runtime(engine=str(engine) + "x").load(plain)


def test_timings_are_kept_for_the_next_build(gpu, plain, graph, tmp_path):
    gpu.runtime().load(plain).close()
    (timings,) = gpu.folder.glob("*.timings")
    assert timings.read_bytes() == b"t"
    gpu.runtime(compute="tf32").load(plain).close()
    assert timings.read_bytes() == b"tt"
    assert not list(gpu.folder.glob(".*"))


def test_a_cache_that_cannot_be_written_costs_only_time(gpu, plain, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        session = gpu.runtime(cache=str(tmp_path / "file" / "below")).load(plain)
    assert session.run(images())["z"].shape == (2, 5)
    assert "was not kept" in caplog.text


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engines.cache_folder(None) == tmp_path / "edgepack" / "tensorrt"


def test_tensorrts_own_words_reach_the_user(gpu, plain, monkeypatch):
    monkeypatch.setattr(Builder, "fails", True)
    with pytest.raises(Unsupported, match=r"finds no engine for the model: no tactic for node_0"):
        gpu.runtime().load(plain)
    monkeypatch.setattr(OnnxParser, "refusal", "kernel is odd")
    with pytest.raises(Unsupported, match=r"does not take the model: Conv node_0: kernel is odd"):
        gpu.runtime().load(plain)
    assert gpu.library.contexts == 0


def test_a_driver_that_is_too_old(gpu, plain, monkeypatch):
    def refuse(self, logger):
        logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(Builder, "__init__", refuse)
    with pytest.raises(DeviceError, match=r"cannot start on this GPU: CUDA initialization failure with error: 35"):
        gpu.runtime().load(plain)


def test_changed_files_are_refused(gpu, plain, tmp_path):
    folder = shutil.copytree(plain.folder, tmp_path / "a")
    model = folder / "model.onnx"
    model.write_bytes(b"\x00" * model.stat().st_size)
    with pytest.raises(IntegrityError, match=r"model\.onnx was changed"):
        gpu.runtime().load(Artifact.open(folder))
    (folder / "tensorrt.json").write_text('{"schema": 2}', encoding="utf-8")
    manifest = Manifest(
        "tensorrt", "t", "float32", plain.manifest.inputs, plain.manifest.outputs, describe_files(folder)
    )
    with pytest.raises(InputError, match=r"tensorrt\.json: no settings"):
        gpu.runtime().load(Artifact(folder, manifest))


def test_a_manifest_of_another_model_is_refused(gpu, plain):
    manifest = Manifest(
        "tensorrt", "t", "float32", plain.manifest.inputs, plain.manifest.outputs[:1], plain.manifest.files
    )
    with pytest.raises(InputError, match=r"the manifest names .* the engine .*best"):
        gpu.runtime().load(Artifact(plain.folder, manifest))
    assert gpu.library.contexts == 0


def test_options_are_checked():
    with pytest.raises(ValueError, match="compute is one of float32, tf32, float16, not 'int8'"):
        parts.find(Runtime, "tensorrt")(compute="int8")
    with pytest.raises(ValueError, match="device is 0 for the first GPU, not -1"):
        parts.find(Runtime, "tensorrt")(device=-1)


def absent(monkeypatch, error: Exception | None = None) -> None:
    def load(name: str) -> None:
        raise error or ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", load)


def test_nothing_is_installed(monkeypatch, plain):
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so.1")
    runtime = parts.find(Runtime, "tensorrt")()
    absent(monkeypatch)
    for act in (runtime.version, lambda: runtime.load(plain)):
        with pytest.raises(MissingExtra, match=r"'tensorrt' is not installed, and the NVIDIA driver is not") as caught:
            act()
        assert caught.value.hint == "pip install 'edgepack[tensorrt-run]'"
        assert caught.value.exit_status == 3


def test_the_package_without_its_libraries(gpu, monkeypatch):
    runtime = gpu.runtime()
    absent(monkeypatch, ImportError("libnvinfer.so.10: cannot open shared object file"))
    with pytest.raises(MissingExtra, match=r"installed but cannot be loaded: libnvinfer\.so\.10"):
        runtime.version()


def test_no_driver_and_no_gpu(gpu, monkeypatch):
    gpu.on(init=100)
    with pytest.raises(DeviceError, match="there is no NVIDIA GPU here"):
        gpu.runtime().version()
    gpu.on(init=3)
    with pytest.raises(DeviceError, match=r"failed in start: invalid something \(3\)"):
        gpu.runtime().version()
    gpu.on()
    with pytest.raises(DeviceError, match="there is no GPU 1; this machine has 1"):
        gpu.runtime(device=1).version()
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(DeviceError, match=r"the NVIDIA driver is not installed \(libno-such-driver\.so\.1"):
        cuda.Driver()


@pytest.mark.parametrize("version", ["8.6.1", "10.8.0.43", "12.0.0"])
def test_another_tensorrt_is_not_used(gpu, version):
    SURFACE[version] = SURFACE["10.16.1.11"]
    try:
        gpu.on(version)
    finally:
        del SURFACE[version]
    with pytest.raises(MissingExtra, match=rf"TensorRT {version} is installed, edgepack needs 10\.9 to 11"):
        gpu.runtime().version()


def test_typed_keeps_what_must_stay_float32():
    helper, kinds = onnx.helper, onnx.TensorProto
    scales = np.asarray([1, 1, 2, 2], np.float32)
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["x", "two"], ["a"]),
        helper.make_node("Resize", ["a", "", "s"], ["b"], mode="nearest"),
        helper.make_node("Mul", ["b", "big"], ["c"]),
        helper.make_node("Cast", ["c"], ["d"], to=kinds.INT64),
        helper.make_node("Cast", ["d"], ["e"], to=kinds.FLOAT),
        helper.make_node("Add", ["e", "s"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kinds.FLOAT, ["n", 1, 2, 2])],
        [value("y", kinds.FLOAT, ["n", 1, 4, 4]), value("x", kinds.FLOAT, ["n", 1, 2, 2])],
        [onnx.numpy_helper.from_array(scales, "s"), onnx.numpy_helper.from_array(np.float32([1e9]), "big")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    found = onnx.load_model_from_string(typed(model.SerializeToString(), "float16"))
    onnx.checker.check_model(found, full_check=True)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    assert sorted(str(array.dtype) for array in stored.values()) == ["float16", "float16", "float32"]
    assert stored["big"][0] == np.float16(65504)
    assert [value.type.tensor_type.elem_type for value in found.graph.output] == [kinds.FLOAT, kinds.FLOAT]
