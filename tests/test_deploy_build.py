"""Packages are built, run and tested as their users would: CMake, a C++ compiler and the engine's own library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
openvino = pytest.importorskip("openvino", reason="pip install 'edgepack[openvino]'")

from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from edgepack import parts  # noqa: E402
from edgepack.artifact import Artifact, Golden, Manifest, Parity, describe_files  # noqa: E402
from edgepack.contracts import Exporter, Graph  # noqa: E402
from edgepack.deploy.linux import Linux  # noqa: E402
from edgepack.front import with_front  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.images import Folder  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

STRICT = "-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror"
OPENVINO = f"-DOpenVINO_DIR={Path(openvino.__path__[0]) / 'cmake'}"
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
ARM_FEATURES = """processor : 0
Features : fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x0
CPU part : 0xd08
CPU revision : 3
"""

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and shutil.which("c++")),
    reason="needs cmake, ninja and a C++ compiler",
)


class Views(nn.Module):
    """Every kind of input that the samples prepare, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb = nn.Conv2d(3, 4, 3, stride=2)
        self.gray = nn.Conv2d(1, 4, 3)
        self.mix = nn.Linear(14, 5)

    def forward(self, rgb, gray, many, state):
        pooled = [self.rgb(rgb).mean((2, 3)), self.gray(gray).mean((2, 3)), many.mean((2, 3))]
        scores = self.mix(torch.cat([*pooled, state[0]], 1))
        return scores, scores.argmax(1)


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(7))

    def forward(self, x):
        return self.layers(x)


VIEWS = (
    Input("rgb", (1, 3, 24, 20), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=255, resize=29),
    Input("gray", (1, 1, 9, 16), mean=(0.5,), std=(0.25,), scale=255),
    Input("many", (1, 3, 8, 8), mean=(0.1,), scale=200, dynamic=("batch", "height", "width")),
    Input("state/0", (2, 1, 3), dynamic={"batch": 1}),
)
PICTURE = Input("picture", (1, 3, 20, 26), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), scale=255)


def artifact_of(graph: Graph, task: Task, format_name: str, folder: Path, inputs: dict | None = None) -> Artifact:
    """An artifact as export writes it, without scoring."""
    folder.mkdir(parents=True)
    exporter = parts.find(Exporter, format_name)()
    simulation = exporter.lower(graph, Plan())
    exporter.write(simulation, folder)
    inputs = inputs or task.samples(3)
    answers = run_graph(simulation, inputs)
    Golden(inputs, answers, answers).save(folder / "golden.npz")
    manifest = Manifest(format_name, format_name, "float32", simulation.inputs, simulation.outputs,
                        preprocessing=dict(simulation.preprocessing), labels=simulation.labels)  # fmt: skip
    manifest = replace(manifest, files=describe_files(folder), parity=Parity("checked", "the tests", 1e-7))
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def package_of(artifact: Artifact, folder: Path) -> Path:
    folder.mkdir()
    Linux(samples=3).write(artifact, folder)
    return folder


def run(*words: str | Path, at: Path | None = None) -> subprocess.CompletedProcess[str]:
    elsewhere = ("ONNXRUNTIME_ROOT", "OpenVINO_DIR", "CXXFLAGS")
    environment = {key: value for key, value in os.environ.items() if key not in elsewhere} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in words], cwd=at, capture_output=True, text=True, env=environment)


def built(package: Path, options: Sequence[str], place: str = "build") -> Path:
    configured = run("cmake", "-G", "Ninja", "-B", place, f"-DCMAKE_CXX_FLAGS={STRICT}", *options, at=package)
    assert configured.returncode == 0, configured.stderr
    made = run("cmake", "--build", place, at=package)
    assert made.returncode == 0, made.stdout
    return package / place / "sample"


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def views(folder: Path, format_name: str) -> Artifact:
    torch.manual_seed(0)
    task = Task(VIEWS, output_names=("scores", "best"), labels=('say "x"', "back\\slash", "zwei ä", "??/", "e"))
    return artifact_of(capture(Views().eval(), task), task, format_name, folder)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("views")
    return package_of(views(root / "openvino", "openvino"), root / "package")


@pytest.fixture(scope="module")
def sample(package: Path) -> Path:
    return built(package, [OPENVINO, "-DCMAKE_BUILD_TYPE=Debug"])


@needs_compiler
def test_the_self_test_checks_hashes_pixels_and_answers(sample: Path) -> None:
    done = run(sample, "--self-test", "--threads", "1")
    assert done.returncode == 0, done.stderr
    for name in ("rgb", "gray", "many"):
        assert f"preprocessing of '{name}'" in done.stdout
    assert "39x44 pixels to the tensor, equal bit for bit" in done.stdout
    assert "output 'scores': largest error" in done.stdout
    assert "output 'best': largest error 0 of its largest value" in done.stdout
    assert "self-test passed" in done.stdout


@needs_compiler
@pytest.mark.parametrize("name", ["model/model.bin", "golden/00/input0.bin", "golden/02/output1.bin"])
def test_one_flipped_bit_fails_the_self_test(sample: Path, package: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("build"))
    assert run(sample, "--self-test", "--package", copy).returncode == 0
    spoil(copy / name)
    for command in ([sample, "--self-test", "--package", copy], [sys.executable, copy / "sample.py", "--self-test"]):
        done = run(*command)
        assert done.returncode == 1
        assert f"failed: {name} was changed" in done.stderr
    (copy / name).unlink()
    done = run(sample, "--self-test", "--package", copy)
    assert (done.returncode, done.stderr) == (1, f"failed: {copy / name} cannot be read\n")


@needs_compiler
def test_wrong_answers_and_wrong_pixels_fail_even_with_matching_hashes(package: Path, tmp_path: Path) -> None:
    """The hashes are of the wrong files, so that only what is computed can tell."""
    wrong = tmp_path / "wrong"
    shutil.copytree(package, wrong, ignore=shutil.ignore_patterns("build"))
    answer = wrong / "golden" / "01" / "output0.bin"
    (np.fromfile(answer, "<f4") + np.float32(0.01)).tofile(answer)
    contract = (wrong / "src" / "contract.cpp").read_text(encoding="utf-8")
    old = next(facts.sha256 for name, facts in describe_files(package).items() if name == "golden/01/output0.bin")
    new = describe_files(wrong)["golden/01/output0.bin"].sha256
    (wrong / "src" / "contract.cpp").write_text(contract.replace(old, new), encoding="utf-8")
    program = built(wrong, [OPENVINO, "-DCMAKE_BUILD_TYPE=Debug"])
    done = run(program, "--self-test")
    assert (done.returncode, done.stderr) == (1, "failed: output 'scores' is not what the model must answer\n")
    (wrong / "src" / "contract.cpp").write_text(
        contract.replace(old, new).replace("static_cast<float>(0.406)", "static_cast<float>(0.416)"), encoding="utf-8"
    )
    done = run(built(wrong, []), "--self-test")
    assert done.returncode == 1
    assert "input 'rgb': preprocessing gives other values than the reference" in done.stderr


@needs_compiler
def test_command_lines_that_make_no_sense_are_refused(sample: Path, tmp_path: Path) -> None:
    assert run(sample).returncode == 2
    assert run(sample, "--selftest").returncode == 2
    assert "usage:" in run(sample, "--self-test", "x.ppm").stderr
    done = run(sample, "x.ppm")
    assert done.returncode == 1
    assert "does not take one picture" in done.stderr
    assert "cannot be read" in run(sample, "--self-test", "--package", tmp_path).stderr


@needs_compiler
@pytest.mark.parametrize("format_name, word", [("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_cmake_says_what_is_missing(tmp_path: Path, format_name: str, word: str) -> None:
    if format_name == "onnx":
        pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
    package = package_of(views(tmp_path / format_name, format_name), tmp_path / "package")
    done = run("cmake", "-G", "Ninja", "-B", "build", "-DCMAKE_DISABLE_FIND_PACKAGE_OpenVINO=ON", at=package)
    if format_name == "onnx" and done.returncode == 0:
        pytest.skip("ONNX Runtime is installed for the whole system")
    assert done.returncode != 0
    sentence = " ".join(done.stderr.split())
    assert f"{word} was not found" in sentence
    assert {"onnx": "-DONNXRUNTIME_ROOT=", "openvino": "-DOpenVINO_DIR="}[format_name] in sentence


def picture_package(root: Path, normalize: bool, format_name: str = "openvino") -> tuple[Artifact, Path]:
    torch.manual_seed(1)
    module = Classes()
    module(torch.zeros(PICTURE.shape))
    task = Task((PICTURE,), output_names=("scores",), labels=tuple("abcdefg"))
    graph = capture(module.eval(), task)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 20, 26, 3), dtype=np.uint8)
    graph = with_front(graph, None, normalize)
    inputs = {"picture": pixels} if normalize else None
    artifact = artifact_of(graph, task, format_name, root / format_name, inputs)
    return artifact, package_of(artifact, root / "package")


def expected(artifact: Artifact, photo: Path) -> list[str]:
    """Labels in the order of their scores, by edgepack's own reading of the image and its own runtime."""
    from edgepack.parity import runtime_for

    batch = next(iter(Folder(PICTURE, (photo,), None).batches(1)))
    raw = artifact.manifest.inputs[0].dtype == "uint8"
    session = runtime_for(artifact.manifest.format).load(artifact, threads=1)
    scores = session.run({"picture": batch.raw["picture"] if raw else batch.inputs["picture"]})["scores"][0]
    session.close()
    return [f"{scores[place]:10.6f}  {'abcdefg'[place]}" for place in np.argsort(-scores, kind="stable")[:5]]


@needs_compiler
@pytest.mark.parametrize("normalize", [False, True], ids=["float", "uint8"])
def test_both_samples_classify_an_image_file_as_edgepack_does(tmp_path: Path, normalize: bool) -> None:
    artifact, package = picture_package(tmp_path, normalize)
    program = built(package, [OPENVINO])
    assert run(program, "--self-test").returncode == 0
    photo = tmp_path / "photo.ppm"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (51, 47, 3), dtype=np.uint8)).save(photo)
    wanted = expected(artifact, photo)
    for command in ([program, photo], [sys.executable, package / "sample.py", photo]):
        lines = run(*command).stdout.splitlines()
        assert [line.split()[1] for line in lines] == [line.split()[1] for line in wanted]
        scores = [[float(line.split()[0]) for line in found] for found in (lines, wanted)]
        np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)
    photo.write_bytes(photo.read_bytes()[:-1])
    assert "ends before its last pixel" in run(program, photo).stderr
    photo.write_bytes(b"P3\n1 1\n255\n0 0 0\n")
    assert "not a binary 8-bit .ppm" in run(program, photo).stderr
    Image.new("L", (30, 30)).save(photo.with_suffix(".pgm"))
    assert "has 1 channels, the model takes 3" in run(program, photo.with_suffix(".pgm")).stderr


@needs_compiler
def test_onnx_runtime_from_a_release_folder(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
    root = os.environ.get("ONNXRUNTIME_ROOT")
    if root is None:
        pytest.skip("set ONNXRUNTIME_ROOT to an unpacked release of ONNX Runtime (include/ and lib/)")
    package = package_of(views(tmp_path / "onnx", "onnx"), tmp_path / "package")
    program = built(package, [f"-DONNXRUNTIME_ROOT={root}"])
    done = run(program, "--self-test")
    assert done.returncode == 0, done.stderr
    assert run("ctest", "--test-dir", "build", at=package).returncode == 0
    (package / "model" / "model.onnx").write_bytes(b"not a model")
    assert "model.onnx was changed" in run(program, "--self-test").stderr


def emulated(folder: Path) -> Path:
    """A system root for qemu whose processor is an ARM one; without it engines read the host's."""
    (folder / "proc").mkdir(parents=True)
    (folder / "proc" / "cpuinfo").write_text(ARM_FEATURES, encoding="utf-8")
    (folder / "lib").symlink_to("/usr/aarch64-linux-gnu/lib")
    return folder


@needs_compiler
@pytest.mark.parametrize("format_name", ["onnx", "openvino"])
def test_cross_built_for_arm64_and_run_under_qemu(tmp_path: Path, format_name: str) -> None:
    if not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")):
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    root = Path(os.environ.get("EDGEPACK_AARCH64_ROOT", "/nonexistent")) / ENGINES[format_name]
    if not root.is_dir():
        pytest.skip(
            f"set EDGEPACK_AARCH64_ROOT to a folder with {root.name}/ for ARM: its release, or of OpenVINO the wheel"
        )
    pytest.importorskip(format_name)
    engine = f"-DONNXRUNTIME_ROOT={root}" if format_name == "onnx" else f"-DOpenVINO_DIR={root / 'cmake'}"
    package = package_of(views(tmp_path / format_name, format_name), tmp_path / "package")
    toolchain = ["-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake", f"-DEMULATOR_ROOT={emulated(tmp_path / 'root')}"]
    program = built(package, [*toolchain, engine], "build-arm64")
    assert program.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64
    done = run("ctest", "--test-dir", "build-arm64", "-V", at=package)
    assert done.returncode == 0, done.stdout
    assert "equal bit for bit" in done.stdout
    assert "self-test passed" in done.stdout
