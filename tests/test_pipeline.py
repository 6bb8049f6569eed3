"""The stages end to end on a small network: resume, budgets, refusals, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgepack
from edgepack import pipeline, recipe
from edgepack.artifact import Artifact, describe_files
from edgepack.compressing import compress
from edgepack.contracts import Census, Graph, Pass
from edgepack.errors import (
    BudgetError,
    InputError,
    IntegrityError,
    MissingExtra,
    ParityError,
    StepError,
    Unsupported,
    together,
)
from edgepack.export.onnx import Onnx
from edgepack.export.pt2 import Pt2
from edgepack.exporting import export
from edgepack.parts import find
from edgepack.pipeline import Options, verify
from edgepack.progress import Silent
from edgepack.task import Input, Task

MODELS = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), *head)
"""
RECIPE = """
[model]
module = "models.py:net"
[task]
calibration = {data = "data.npz", samples = 8}
evaluation = {data = "data.npz"}
input = {shape = [1, 3, 12, 12], mean = [0.4, 0.5, 0.6], std = [0.2, 0.2, 0.2], scale = 255}
metric = "top1"
labels = ["a", "b", "c", "d"]
[[compress]]
use = "fold"
[[export]]
use = "onnx"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "edgepack.toml").write_text(RECIPE)
    np.savez(
        tmp_path / "data.npz",
        x=random.integers(0, 256, (40, 12, 12, 3), dtype=np.uint8),
        y=random.integers(0, 4, 40),
    )
    return tmp_path


def run(folder: Path, *overrides: str, **options: Any) -> tuple[pipeline.CompressResult, list[pipeline.ExportResult]]:
    loaded = recipe.load(folder, overrides)
    opts = Options(**options)
    return pipeline.compress_recipe(loaded, opts), pipeline.export_recipe(loaded, opts)


def test_the_main_job(folder: Path) -> None:
    compressed, (exported,) = run(folder)
    manifest = exported.artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.parity.max_rel is not None
    assert manifest.parity.max_rel <= 1e-4
    assert manifest.score is not None
    assert manifest.score["this"] == pytest.approx(manifest.score["original"], abs=0.026)
    assert manifest.score["samples"] == 40
    assert manifest.float_size_bytes == 4 * (8 * 27 + 8 + 16 + 36)
    assert [step["part"] for step in manifest.history] == ["fold", "onnx"]
    assert compressed.notes
    assert exported.baseline is not None
    assert exported.baseline.folder == folder / "edgepack-out" / "baseline" / "onnx"
    assert {path.name for path in (folder / "edgepack-out").iterdir()} == {"compressed", "baseline", "onnx"}
    for found in pipeline.artifacts_in(folder / "edgepack-out"):
        assert pipeline.verify(found).parity.status == "checked"


def test_a_second_run_does_nothing_and_a_change_does_what_it_must(folder: Path) -> None:
    run(folder)
    compressed, (exported,) = run(folder)
    assert compressed.up_to_date
    assert exported.up_to_date
    compressed, (exported,) = run(folder, "export.onnx.precision=float16")
    assert compressed.up_to_date
    assert not exported.up_to_date
    (folder / "models.py").write_text(MODELS.replace("manual_seed(0)", "manual_seed(1)"))
    compressed, (exported,) = run(folder)
    assert not compressed.up_to_date
    assert not exported.up_to_date


def test_a_damaged_artifact_is_found_and_written_again(folder: Path) -> None:
    _, (exported,) = run(folder)
    path = exported.artifact.file(".onnx")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="was changed"):
        pipeline.verify(exported.artifact.folder)
    _, (again,) = run(folder)
    assert not again.up_to_date
    assert pipeline.verify(again.artifact.folder).parity.status == "checked"


def test_normalize_bakes_pixels_in_and_scores_the_same(folder: Path) -> None:
    _, (exported,) = run(folder, "export.onnx.normalize=true")
    manifest = exported.artifact.manifest
    assert (manifest.inputs[0].dtype, manifest.inputs[0].layout) == ("uint8", "NHWC")
    assert manifest.preprocessing["input"].identity
    assert manifest.labels == ("a", "b", "c", "d")
    assert manifest.score is not None
    assert manifest.score["this"] == pytest.approx(manifest.score["original"], abs=0.026)


def test_missed_budgets_are_marked_and_the_artifact_stays(folder: Path) -> None:
    _, results = run(folder, "budget.size_ratio=0.1")
    with pytest.raises(BudgetError, match="onnx: size_ratio") as caught:
        pipeline.hold_budget(results)
    assert caught.value.exit_status == 4
    (missed,) = Artifact.open(folder / "edgepack-out" / "onnx").manifest.budget_missed
    assert missed.startswith("size_ratio")


def test_the_agreement_metric_needs_no_labels(folder: Path) -> None:
    _, (exported,) = run(folder, "task.metric=agreement")
    assert exported.artifact.manifest.score is not None
    assert exported.artifact.manifest.score["this"] == 1.0


def test_export_from_a_folder_without_the_recipe(folder: Path) -> None:
    pipeline.compress_recipe(recipe.load(folder), Options())
    out = folder / "edgepack-out"
    (exported,) = pipeline.export_folder(out / "compressed", ["openvino"], Options())
    assert exported.artifact.manifest.parity.status == "checked"
    assert exported.artifact.manifest.score is None
    with pytest.raises(InputError, match="is not a compressed/ folder"):
        pipeline.export_folder(out / "openvino", ["onnx"], Options())


def test_export_before_compress(folder: Path) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        pipeline.export_recipe(recipe.load(folder), Options())
    assert caught.value.hint == "run edgepack compress first"


def test_a_missing_engine_leaves_parity_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Any) -> str:
        raise MissingExtra("the package 'onnxruntime' is not installed", "pip install 'edgepack[onnx-run]'")

    from edgepack.contracts import Runtime

    for name in ("onnxruntime", "openvino"):
        monkeypatch.setattr(find(Runtime, name), "version", missing)
    _, (exported,) = run(folder)
    assert exported.artifact.manifest.parity.status.startswith("not run: the package")
    with pytest.raises(MissingExtra, match="not installed"):
        pipeline.verify(exported.artifact.folder)


@dataclass(frozen=True, kw_only=True)
class Breaks(Pass):
    """Fails inside."""

    def apply(self, module: nn.Module, task: Task, run: Any) -> nn.Module:
        raise ZeroDivisionError("oops")


@dataclass(frozen=True, kw_only=True)
class Halves(Pass):
    """Drops half of the outputs."""

    def apply(self, module: nn.Module, task: Task, run: Any) -> nn.Module:
        return nn.Sequential(module, nn.Linear(4, 2))


def small_task() -> Task:
    return Task((Input("x", (1, 4)),))


def test_a_failing_pass_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        StepError, match=r"pass 1 \(.*Breaks.* failed: ZeroDivisionError: oops; passes done before it: none"
    ):
        compress(nn.Linear(4, 4), small_task(), [Breaks()], tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_a_pass_that_changes_the_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="a pass changed the outputs"):
        compress(nn.Linear(4, 4), small_task(), [Halves()], tmp_path / "out", Silent())


def test_passes_work_on_a_copy(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = [tensor.clone() for tensor in net.state_dict().values()]
    from edgepack.compress.fold import Fold

    compress(net, small_task(), [Fold()], tmp_path / "out", Silent())
    assert isinstance(net[1], nn.BatchNorm1d)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def wrong_write(self: Onnx, simulation: Graph, folder: Path) -> Census:
    for parameter in simulation.program.state_dict.values():
        parameter.data *= 1.5
    return original_write(self, simulation, folder)


original_write = Onnx.write


@pytest.fixture
def wrong_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Onnx, "write", wrong_write)


@pytest.mark.usefixtures("wrong_exporter")
def test_a_wrong_artifact_is_a_parity_error_and_is_not_kept(tmp_path: Path) -> None:
    compress(nn.Linear(4, 4), small_task(), [], tmp_path / "out", Silent())
    with pytest.raises(ParityError, match="differs from its simulation"):
        export(tmp_path / "out", [Onnx()], Silent())
    assert not (tmp_path / "out" / "onnx").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_kill_in_the_middle_of_an_export_keeps_the_old_artifact(folder: Path) -> None:
    _, (exported,) = run(folder)
    before = exported.artifact.file(".onnx").read_bytes()
    program = f"""
        import os, signal
        from pathlib import Path
        from edgepack import pipeline, recipe
        from edgepack.export.onnx import Onnx
        original = Onnx.write
        def write(self, simulation, folder):
            original(self, simulation, folder)
            os.kill(os.getpid(), signal.SIGKILL)
        Onnx.write = write
        pipeline.export_recipe(recipe.load(Path({str(folder)!r})), pipeline.Options(force=True))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert pipeline.verify(folder / "edgepack-out" / "onnx").parity.status == "checked"
    assert exported.artifact.file(".onnx").read_bytes() == before
    run(folder, force=True)
    assert not [path for path in (folder / "edgepack-out").rglob(".*") if path.is_dir()]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk needs root on Linux")
def test_a_full_disk_is_a_storage_error_and_leaves_nothing(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("no permission to mount a tmpfs")
    try:
        from edgepack.errors import StorageError

        with pytest.raises(StorageError, match="No space left on device") as caught:
            run(folder, out=disk / "out")
        assert caught.value.exit_status == 9
        assert not [path for path in disk.rglob("*") if path.is_file()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_python_verbs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = edgepack.compress(nn.Linear(4, 4).eval(), small_task(), [], out=out)
    assert result.folder == out / "compressed"
    (exported,) = edgepack.export(out, [Onnx()])
    assert edgepack.verify(exported.artifact.folder).parity.status == "checked"
    assert json.loads(json.dumps(exported.to_json()))["manifest"]["format"] == "onnx"


def test_normalize_needs_an_image(tmp_path: Path) -> None:
    compress(nn.Linear(4, 4), small_task(), [], tmp_path / "out", Silent())
    with pytest.raises(Unsupported, match="no input of this model is an image"):
        export(tmp_path / "out", [Pt2(normalize=True)], Silent())


def test_code_that_the_model_imports_is_watched_too(folder: Path) -> None:
    (folder / "blocks.py").write_text("CLASSES = 4\n")
    source = MODELS.replace("nn.Linear(8, 4)", "nn.Linear(8, CLASSES)")
    (folder / "models.py").write_text(source + "\nfrom blocks import CLASSES\n")
    opts = Options()
    assert not pipeline.compress_recipe(recipe.load(folder), opts).up_to_date
    assert pipeline.compress_recipe(recipe.load(folder), opts).up_to_date
    (folder / "blocks.py").write_text("CLASSES = 4  # changed\n")
    assert not pipeline.compress_recipe(recipe.load(folder), opts).up_to_date


def test_a_network_that_answers_nan_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    net.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="the network answers NaN in output 'output'"):
        compress(net, small_task(), [], tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_an_output_path_that_is_a_file_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.npz is a file, not a folder"):
        pipeline.compress_recipe(recipe.load(folder), Options(out=folder / "data.npz"))


def test_verify_goes_on_after_a_failure_and_names_all(folder: Path) -> None:
    one, two = IntegrityError("a was changed", "export again"), ParityError("b differs", details={"node": "conv2d"})
    assert together([one]) is one
    both = together([one, two])
    assert isinstance(both, IntegrityError)
    assert both.exit_status == 8
    assert str(both) == "2 artifacts failed:\n  - a was changed\n  - b differs\n  export again"
    assert both.details["failures"][1] == {"kind": "ParityError", "message": "b differs", "node": "conv2d"}


def test_verify_reads_settings_and_refuses_an_engine_of_another_format(tmp_path: Path) -> None:
    compress(nn.Linear(4, 4), small_task(), [], tmp_path, Silent())
    (result,) = export(tmp_path, [Onnx()], Silent())
    folder = result.artifact.folder
    with pytest.raises(InputError, match="pt2 does not read onnx"):
        verify(folder, "pt2")
    (folder / "settings.json").write_text("{")
    manifest = replace(result.artifact.manifest, files=describe_files(folder))
    (folder / "artifact.json").write_text(manifest.to_json())
    with pytest.raises(InputError, match=r"settings\.json is not JSON"):
        verify(folder)
