"""Packages: the contract, the Python sample, and the deploy verb. test_deploy_build.py builds the C++ sample."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
pytest.importorskip("openvino", reason="pip install 'edgepack[openvino]'")

from torch import nn  # noqa: E402

from edgepack import api, packaging, parts  # noqa: E402
from edgepack.artifact import Artifact, Golden, Manifest, Parity, describe_files  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.deploy import _sources  # noqa: E402
from edgepack.deploy.linux import Linux  # noqa: E402
from edgepack.errors import InputError, MissingExtra, ParityError, Unsupported  # noqa: E402
from edgepack.front import with_front  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

if TYPE_CHECKING:
    from conftest import Run

ROOT = Path(__file__).parent.parent
PICTURE = Input("picture", (1, 3, 10, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), scale=255, resize=13)


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(80, 5))

    def forward(self, x):
        return self.layers(x)


def write_artifact(folder: Path, kind: str = "onnx", front: str = "plain") -> Artifact:
    """An artifact as export writes it; ``front`` is ``plain``, ``NHWC`` or ``normalize``."""
    torch.manual_seed(0)
    task = Task((PICTURE,), output_names=("scores",), labels=tuple("abcde"))
    graph = with_front(capture(Classes().eval(), task), "NHWC" if front == "NHWC" else None, front == "normalize")
    exporter = parts.find(Exporter, kind)()
    simulation = exporter.lower(graph, Plan())
    folder.mkdir(parents=True)
    exporter.write(simulation, folder)
    random, (spec,) = np.random.default_rng(0), simulation.inputs
    shape = (3, 3, 10, 12) if spec.layout == "NCHW" else (3, 10, 12, 3)
    raw = random.integers(0, 256, shape, dtype=np.uint8)
    inputs = {"picture": raw if front == "normalize" else random.standard_normal(shape).astype(np.float32)}
    answers = run_graph(simulation, inputs)
    Golden(inputs, answers, answers).save(folder / "golden.npz")
    manifest = Manifest(kind, folder.name, "float32", simulation.inputs, simulation.outputs,
                        preprocessing=dict(simulation.preprocessing), labels=simulation.labels,
                        parity=Parity("checked", "onnxruntime 1.32.0", 1e-7))  # fmt: skip
    return stored(replace(manifest, files=describe_files(folder)), folder)


def stored(manifest: Manifest, folder: Path) -> Artifact:
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with an artifact per interface and format."""
    root = tmp_path_factory.mktemp("artifacts")
    for kind, front in (("onnx", "plain"), ("openvino", "plain"), ("onnx", "NHWC"), ("onnx", "normalize")):
        write_artifact(root / (kind if front == "plain" else front), kind, front)
    return root


@pytest.fixture
def out(artifacts: Path, tmp_path: Path) -> Path:
    """The same, to spoil."""
    return Path(shutil.copytree(artifacts, tmp_path / "out"))


def packaged(folder: Path, place: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    place.mkdir()
    files = Linux(**options).write(Artifact.open(folder), place)
    assert files == sorted(path for path in place.rglob("*") if path.is_file())
    return place, json.loads((place / "contract.json").read_text(encoding="utf-8"))


def run_sample(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", str(package / "sample.py"), "--threads", "1", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def values_of(package: Path, item: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.fromfile(package / item["file"], np.dtype(item["dtype"]).newbyteorder("<")).reshape(item["shape"])


@pytest.mark.parametrize("name", ["onnx", "NHWC", "normalize"])
def test_the_contract_says_what_the_golden_inputs_are(artifacts: Path, tmp_path: Path, name: str) -> None:
    package, contract = packaged(artifacts / name, tmp_path / "package")
    golden = Artifact.open(artifacts / name).golden()
    (item,) = contract["inputs"]
    takes = {
        "onnx": ("float32", ["batch", 3, 10, 12], "NCHW", "preprocessed values, (raw / scale - mean) / std, RGB"),
        "NHWC": ("float32", ["batch", 10, 12, 3], "NHWC", "preprocessed values, (raw / scale - mean) / std, RGB"),
        "normalize": ("uint8", ["batch", 10, 12, 3], "NHWC", "raw 8-bit pixels, RGB; the model does the rest"),
    }
    dtype, shape, layout, sentence = takes[name]
    assert (item["dtype"], item["shape"], item["layout"]) == (dtype, shape, layout)
    assert item["takes"].startswith(sentence)
    assert item["takes"] in (package / "README.md").read_text(encoding="utf-8")
    baked = name == "normalize"
    assert item["preprocessing"]["scale"] == (1.0 if baked else 255)
    assert item["preprocessing"]["mean"] == ([] if baked else [0.4, 0.5, 0.6])
    for index, sample in enumerate(contract["golden"]["samples"]):
        for word, arrays in (("inputs", golden.inputs), ("outputs", golden.simulation)):
            for stored_as in sample[word]:
                np.testing.assert_array_equal(values_of(package, stored_as)[0], arrays[stored_as["tensor"]][index])
    assert len(contract["golden"]["samples"]) == 3


@pytest.mark.parametrize("name", ["onnx", "NHWC", "normalize"])
def test_pixels_are_those_of_the_formula(artifacts: Path, tmp_path: Path, name: str) -> None:
    """Against (raw / scale - mean) / std in float64, written out here."""
    package, contract = packaged(artifacts / name, tmp_path / "package")
    (check,) = contract["pixels"]
    fitted, tensor = values_of(package, check["fitted"]), values_of(package, check["tensor"])
    assert fitted.shape == (10, 12, 3)
    assert min(check["picture"]["shape"][:2]) > 12
    wanted = fitted if name == "normalize" else (fitted / 255.0 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    wanted = wanted.transpose(2, 0, 1) if name == "onnx" else wanted
    np.testing.assert_allclose(tensor[0], wanted, rtol=1e-5, atol=1e-6)


def test_every_file_has_its_hash_and_the_engine_is_named(artifacts: Path, tmp_path: Path) -> None:
    package, contract = packaged(artifacts / "openvino", tmp_path / "package", samples=2)
    listed = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert set(contract["files"]) == listed - {"contract.json"}
    for name, facts in contract["files"].items():
        content = (package / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (facts["sha256"], facts["size_bytes"])
    assert contract["model"] == "model/model.xml"
    assert contract["engine"] == {"package": "openvino", "tested": "onnxruntime 1.32.0"}
    assert contract["labels"] == list("abcde")
    assert contract["golden"]["limit"] == 1e-4
    assert len(contract["golden"]["samples"]) == 2
    assert not [name for name in listed if name.endswith(".j2") or "model_onnx" in name]


def test_integer_artifacts_may_differ_as_much_as_their_own_proof_allows(out: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(out / "onnx")
    for index, (least_db, limit) in enumerate([(None, 0.01125), (40.0, 0.02)]):
        parity = replace(artifact.manifest.parity, least_db=least_db)
        stored(replace(artifact.manifest, dialect="u8s8", parity=parity), out / "onnx")
        _, contract = packaged(out / "onnx", tmp_path / str(index))
        assert contract["golden"]["limit"] == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("name", ["onnx", "openvino", "normalize"])
def test_the_python_sample_needs_no_edgepack_and_finds_faults(artifacts: Path, tmp_path: Path, name: str) -> None:
    package, contract = packaged(artifacts / name, tmp_path / "package")
    assert "edgepack" not in [line.split()[1] for line in (package / "sample.py").read_text().splitlines()
                              if line.strip().startswith(("import", "from"))]  # fmt: skip
    done = run_sample(package, "--self-test")
    assert done.returncode == 0, done.stderr
    assert "self-test passed" in done.stdout
    answer = package / contract["golden"]["samples"][1]["outputs"][0]["file"]
    (np.fromfile(answer, "<f4") + np.float32(1e-2)).tofile(answer)
    assert run_sample(package, "--self-test").stderr.startswith(f"failed: {answer.relative_to(package)} was changed")
    contract["files"] = {}
    (package / "contract.json").write_text(json.dumps(contract))
    done = run_sample(package, "--self-test")
    assert (done.returncode, done.stderr) == (1, "failed: output 'scores' is not what the model must answer\n")


def test_the_python_sample_reads_images_as_evaluation_does(artifacts: Path, tmp_path: Path) -> None:
    from PIL import Image

    from edgepack.images import Folder
    from edgepack.parity import runtime_for

    package, _ = packaged(artifacts / "onnx", tmp_path / "package")
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 31, 3), dtype=np.uint8)).save(photo)
    done = run_sample(package, str(photo))
    assert done.returncode == 0, done.stderr
    inputs = next(iter(Folder(PICTURE, (photo,), None).batches(1))).inputs
    session = runtime_for("onnx").load(Artifact.open(artifacts / "onnx"), threads=1)
    scores = session.run(inputs)["scores"][0]
    session.close()
    wanted = [f"{scores[place]:10.6f}  {'abcde'[place]}" for place in np.argsort(-scores)]
    assert done.stdout.splitlines() == wanted
    assert run_sample(package).returncode == 2


@pytest.mark.parametrize(
    "text, literal",
    [
        ("plain", '"plain"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("??/", '"\\?\\?/"'),
        ("ä1", '"\\303\\2441"'),
        ("\n", '"\\012"'),
    ],
)
def test_names_become_safe_cxx_literals(text: str, literal: str) -> None:
    assert _sources._literal(text) == literal


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        Linux(samples=0)


def test_templates_are_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = {path for path in (ROOT / "deploy" / "templates").rglob("*") if path.is_file()}
    assert found
    assert found == {
        path for item in patterns["edgepack.deploy"] for path in (ROOT / "deploy").glob(item) if path.is_file()
    }


def test_the_verb_packages_folders(edgepack: Run, out: Path) -> None:
    status, text, err = edgepack("deploy", out / "onnx", out / "openvino", "--to", "linux", "--json",
                                 "--set", "deploy.linux.samples=1")  # fmt: skip
    assert status == 0, err
    results = json.loads(text)["packages"]
    assert [Path(item["folder"]).name for item in results] == ["onnx-linux", "openvino-linux"]
    for item in results:
        folder = Path(item["folder"])
        assert folder.parent == out / "packages"
        assert item["size_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert len(json.loads((folder / "contract.json").read_text())["golden"]["samples"]) == 1
        assert item["notes"] == []
    assert not list(out.glob("packages/.*"))


def test_the_verb_packages_what_a_recipe_exports(edgepack: Run, out: Path, tmp_path: Path) -> None:
    shutil.copytree(str(resources.files("edgepack") / "examples" / "digits"), tmp_path / "digits")
    assert edgepack("deploy", tmp_path / "digits", "--out", out)[0] == 0
    assert sorted(path.name for path in (out / "packages").iterdir()) == ["onnx-linux", "openvino-linux"]
    shutil.rmtree(out / "packages")
    assert edgepack("deploy", tmp_path / "digits", "--out", out, "--only", "openvino")[0] == 0
    assert [path.name for path in (out / "packages").iterdir()] == ["openvino-linux"]
    manifest = Artifact.open(out / "onnx").manifest
    stored(replace(manifest, format="pt2", name="onnx"), out / "onnx")
    status, text, _ = edgepack("deploy", tmp_path / "digits", "--out", out)
    assert (status, "not packaged: onnx (pt2); packager linux takes onnx, openvino" in " ".join(text.split())) == (
        0,
        True,
    )
    status, _, err = edgepack("deploy", tmp_path / "digits", "--out", out, "--only", "onnx")
    assert (status, "does not take pt2" in err) == (7, True)
    status, _, err = edgepack("deploy", tmp_path / "digits", "--out", out, "--only", "onx")
    assert (status, "did you mean 'onnx'?" in err) == (2, True)
    status, _, err = edgepack("deploy", tmp_path / "digits")
    assert (status, "does not exist" in err) == (2, True)


def test_a_dry_run_writes_nothing(edgepack: Run, out: Path) -> None:
    before = sorted(out.rglob("*"))
    status, text, _ = edgepack("deploy", out / "onnx", "--dry-run", "--json")
    assert (status, sorted(out.rglob("*"))) == (0, before)
    assert json.loads(text)["plan"] == [{"stage": f"deploy {out / 'onnx'}", "part": "linux", "options": {"samples": 8}}]


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        (("--to", "linus"), 2, "did you mean 'linux'?"),
        (("--set", "deploy.linux.sample=2"), 2, "did you mean 'samples'?"),
        (("--set", "deploy.linux.samples=0"), 2, "samples must be at least 1"),
        (("--set", "deploy.linx.samples=2"), 2, "did you mean 'linux'?"),
        (("--set", "export.onnx.name=x"), 2, "need a recipe"),
        (("--only", "onnx"), 2, "need a recipe"),
    ],
)
def test_wrong_words_are_named(edgepack: Run, out: Path, words: tuple[str, ...], status: int, sentence: str) -> None:
    found, _, err = edgepack("deploy", out / "onnx", *words)
    assert found == status
    assert sentence in " ".join(err.split())
    assert not (out / "packages").exists()


def test_what_cannot_be_packaged_is_refused(edgepack: Run, out: Path) -> None:
    (out / "pt2").mkdir()
    artifact = Artifact.open(out / "onnx")
    stored(replace(artifact.manifest, format="pt2", files={}), out / "pt2")
    status, _, err = edgepack("deploy", out / "onnx", out / "pt2")
    assert status == Unsupported.exit_status
    assert "it takes onnx, openvino" in err
    assert not (out / "packages").exists()
    (out / "onnx" / "model.onnx").write_bytes(b"\0" * (out / "onnx" / "model.onnx").stat().st_size)
    assert edgepack("deploy", out / "onnx")[0] == 8
    assert edgepack("deploy", out / "nowhere")[0] == 2
    assert edgepack("deploy", out / "onnx", out)[0] == 2
    assert not list(out.glob("packages/*"))


def test_an_unchecked_artifact_is_refused_where_it_could_be_checked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(out / "onnx")
    parity = Parity("not run: the engine was missing")
    stored(replace(artifact.manifest, parity=parity, budget_missed=("size_ratio 2 is above 1",)), out / "onnx")
    with pytest.raises(ParityError, match="'onnx' was never compared with its golden answers") as caught:
        api.deploy([out / "onnx"], Linux())
    assert caught.value.hint == "onnxruntime can do it here: edgepack export --force"

    def missing(format_name: str) -> None:
        raise MissingExtra(f"no engine for {format_name}")

    monkeypatch.setattr(packaging, "runtime_for", missing)
    (result,) = api.deploy([out / "onnx"], Linux())
    assert "run the package's self-test on the target" in result.notes[0]
    assert result.notes[1] == "budget missed: size_ratio 2 is above 1"
    readme = (result.folder / "README.md").read_text(encoding="utf-8")
    assert "Parity: not run: the engine was missing" in readme


def test_a_package_is_replaced_but_nobodys_work_is(out: Path) -> None:
    (first,) = api.deploy([out / "onnx"], Linux())
    (first.folder / "build").mkdir()
    (first.folder / "build" / "cache").touch()
    (second,) = api.deploy([out / "onnx"], Linux(samples=1))
    assert len(second.files) < len(first.files)
    assert not (second.folder / "build").exists()
    for name in ("src/main.cpp", "src/mine.cpp"):
        (second.folder / name).write_text("mine", encoding="utf-8")
        with pytest.raises(InputError, match=f"{Path(name).name} was added or edited"):
            api.deploy([out / "onnx"], Linux())
        api.deploy([out / "onnx"], Linux(), force=True)
        assert not (second.folder / "src" / "mine.cpp").exists()
    shutil.rmtree(second.folder)
    second.folder.mkdir()
    with pytest.raises(InputError, match="is not a package of edgepack"):
        api.deploy([out / "onnx"], Linux())


def test_a_failed_package_leaves_the_old_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = api.deploy([out / "onnx"], Linux(), out=out / "elsewhere")
    assert first.folder == out / "elsewhere" / "packages" / "onnx-linux"

    def broken(*arguments: Any) -> None:
        raise Unsupported("no")

    monkeypatch.setattr("edgepack.deploy._contract.save", broken)
    with pytest.raises(Unsupported):
        api.deploy([out / "onnx"], Linux(), out=out / "elsewhere")
    assert sorted(path.name for path in first.folder.parent.iterdir()) == ["onnx-linux"]
    assert (first.folder / "contract.json").exists()


def test_baselines_go_beside_the_other_packages(out: Path) -> None:
    (out / "baseline").mkdir()
    shutil.copytree(out / "onnx", out / "baseline" / "onnx")
    manifest = replace(Artifact.open(out / "onnx").manifest, name="baseline")
    artifact = stored(manifest, out / "baseline" / "onnx")
    assert packaging.place_of(artifact, Linux(), None) == out / "packages" / "baseline-onnx-linux"
