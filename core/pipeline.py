"""The verbs over a recipe: compress, export, profile, deploy, verify, compare, report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import fingerprint, parts
from edgepack.artifact import MANIFEST, Artifact, Parity
from edgepack.compressing import BASELINE, COMPRESSED, CompressResult, compress, result
from edgepack.contracts import Device, Exporter, Packager, Runtime, Settings
from edgepack.errors import (
    BudgetError,
    EdgepackError,
    InputError,
    IntegrityError,
    MeasurementError,
    ParityError,
    nearest,
)
from edgepack.exporting import ExportResult, export, simulation_of
from edgepack.measurement import Profile
from edgepack.parity import check, engine_for
from edgepack.profiling import profile, profile_out, store
from edgepack.progress import Progress, Silent
from edgepack.proof import blamed
from edgepack.recipe import Measurement, Recipe, artifact_name, build

if TYPE_CHECKING:
    from torch import nn

    from edgepack.packaging import PackageResult
    from edgepack.task import Task


@dataclass(frozen=True)
class Options:
    """How to run a verb.

    Attributes:
        out: where results go; None: the recipe's ``edgepack-out``.
        force: do again what is up to date.
        progress: who is told.
    """

    out: Path | None = None
    force: bool = False
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True)
class VerifyResult:
    """One artifact, read whole and run on its golden inputs."""

    artifact: Artifact
    parity: Parity
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.artifact.folder), "parity": asdict(self.parity), "seconds": self.seconds}


def compress_recipe(recipe: Recipe, opts: Options) -> CompressResult:
    """Load the recipe's model, apply its passes, write ``compressed/`` and ``baseline/pt2/``."""
    out = _folder(opts.out or recipe.out)
    began = time.perf_counter()
    made_from = fingerprint.of(recipe)
    if not opts.force and (done := _current(out, made_from)) is not None:
        return result(out, done.manifest, True, time.perf_counter() - began)
    task = task_of(recipe)
    opts.progress.start("loading the model")
    return compress(load_model(recipe), task, recipe.passes, out, opts.progress, made_from, recipe.folder)


def narrowed(recipe: Recipe, to: Sequence[str]) -> Recipe:
    """The recipe with its exports of these formats alone, by default options where it asks for none of a format."""
    own = [item for item in recipe.exporters if item.format in to]
    missing = [name for name in to if name not in {item.format for item in own}]
    return replace(recipe, exporters=(*own, *(build(Exporter, {"use": name}) for name in missing)))


def export_recipe(recipe: Recipe, opts: Options) -> list[ExportResult]:
    """Write every ``[[export]]`` of the recipe, verified and scored; then ``hold_budget``."""
    if not recipe.exporters:
        raise InputError(f"{recipe.path.name} has no [[export]]", 'add [[export]] with use = "onnx"')
    out = _folder(opts.out or recipe.out)
    return export(out, recipe.exporters, opts.progress, task_of(recipe), recipe.sheet.budget, opts.force)


def hold_budget(results: Sequence[ExportResult]) -> None:
    """Raises BudgetError when an artifact missed the recipe's budget; all artifacts stay, marked."""
    missed = [f"{r.artifact.manifest.name}: {text}" for r in results for text in r.artifact.manifest.budget_missed]
    if missed:
        raise BudgetError("; ".join(missed), "the artifacts stay, marked")


def export_folder(folder: Path, to: Sequence[str], opts: Options) -> list[ExportResult]:
    """Export a ``compressed/`` folder (or the folder that holds it) to formats, without a recipe."""
    out = folder if (folder / COMPRESSED / MANIFEST).exists() else folder.parent
    if folder.name != COMPRESSED and out == folder.parent:
        Artifact.open(folder)
        raise InputError(f"{folder} is not a compressed/ folder", "export starts from what edgepack compress wrote")
    exporters = [build(Exporter, {"use": name}) for name in to]
    return export(out, exporters, opts.progress, force=opts.force)


def profile_recipe(recipe: Recipe, opts: Options) -> list[Profile]:
    """Run every ``[[profile]]`` of the recipe, the host with one thread if it has none; then ``hold_latency``.

    Profiles of an earlier run are replaced.
    """
    out = _folder(opts.out or recipe.out)
    names = [artifact_name(item) for item in recipe.exporters]
    device = parts.find(Device, "host")
    found: list[Profile] = []
    for item in recipe.measurements or (Measurement(device(), None, Settings()),):
        found += profile_out(out, names, item.device, item.runtime, item.settings, opts.progress)
    store(out, found)
    return found


def deploy_recipe(recipe: Recipe, packager: Packager, opts: Options, only: Sequence[str] = ()) -> list[PackageResult]:
    """Package the recipe's artifacts that the packager takes, or the ones named."""
    from edgepack import packaging

    names = [artifact_name(item) for item in recipe.exporters]
    for name in only:
        if name not in names:
            raise InputError(f"{recipe.path.name} has no [[export]] {name!r}", nearest(name, names))
    out = _folder(opts.out or recipe.out)
    found = [Artifact.open(out / name) for name in (only or names)]
    if not found:
        raise InputError(f"{recipe.path.name} has no [[export]]", 'add [[export]] with use = "onnx"')
    taken = [item for item in found if packaging.takes(item, packager)]
    chosen = found if only or not taken else taken
    results = packaging.deploy([item.folder for item in chosen], packager, out, opts.progress, opts.force)
    return packaging.noting(results, [item for item in found if item not in chosen], packager)


def deploy_folders(folders: Sequence[Path], packager: Packager, opts: Options) -> list[PackageResult]:
    """Package artifact folders."""
    from edgepack import packaging

    return packaging.deploy(folders, packager, opts.out, opts.progress, opts.force)


def profile_folders(
    folders: Sequence[Path], runtime: str | None, settings: Settings, progress: Progress | None = None
) -> list[Profile]:
    """Measure artifacts on this host in one interleaved run; ratios are against the first."""
    device = parts.find(Device, "host")()
    engine = None if runtime is None else build(Runtime, {"use": runtime})
    artifacts = [Artifact.open(folder) for folder in folders]
    for artifact in artifacts:
        artifact.check_hashes()
    return profile(artifacts, device, engine, settings, progress or Silent())


def compare(
    a: Path, b: Path, settings: Settings, runtime: str | None = None, progress: Progress | None = None
) -> list[Profile]:
    """Time two artifacts against each other; the second profile's ratio is B over A."""
    return profile_folders([a, b], runtime, settings, progress)


def verify(folder: Path, runtime: str | None = None) -> VerifyResult:
    """Check every hash of an artifact and its answers to the golden inputs.

    Raises:
        IntegrityError: a file was changed. ParityError: it computes something else.
        MissingExtra: no engine for it is installed here.
    """
    began = time.perf_counter()
    artifact = Artifact.open(folder)
    artifact.check_hashes()
    _check_settings(artifact)
    engine = engine_for(artifact, None if runtime is None else build(Runtime, {"use": runtime}), proof=True)
    return VerifyResult(artifact, _checked(artifact, engine), time.perf_counter() - began)


def _check_settings(artifact: Artifact) -> None:
    """Model files that are JSON can be read, whether or not their engine is here to do it."""
    for name in artifact.manifest.files:
        if name.endswith(".json"):
            try:
                json.loads((artifact.folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{artifact.folder / name} is not JSON: {error}", "export again") from error


def _checked(artifact: Artifact, engine: Runtime) -> Parity:
    try:
        return check(artifact, engine)
    except ParityError as error:
        try:
            simulation = simulation_of(artifact)
        except EdgepackError as reason:
            message = f"{error.message}; which operator cannot be told: {reason.message}"
            raise ParityError(message, error.hint) from error
        raise blamed(error, artifact, engine, simulation) from error


def artifacts_in(out: Path) -> list[Path]:
    """Every artifact folder below an output folder: compressed, baselines, exports."""
    places = [*_folder(out).glob(f"*/{MANIFEST}"), *out.glob(f"{BASELINE}/*/{MANIFEST}")]
    found = sorted(path.parent for path in places if not path.parent.name.startswith("."))
    if not found:
        raise InputError(
            f"{out} is not an artifact folder and holds none", "run edgepack compress and edgepack export first"
        )
    return found


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder")
    return path


def report_recipe(out: Path) -> Path:
    """Write ``report.json`` and ``report.html`` from what lies in an output folder."""
    from edgepack import reporting
    from edgepack.artifact import write_text

    data = reporting.build(out)
    write_text(out / "report.json", json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")
    reporting.write_html(data, out / "report.html")
    return out / "report.html"


def load_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with its weights, in inference mode."""
    from edgepack.models import load

    model = recipe.sheet.model
    module = load(model.module, recipe.folder, model.weights, model.options)
    return _fitted(module, recipe) if model.interpolate else module


def _fitted(module: nn.Module, recipe: Recipe) -> nn.Module:
    from edgepack.models.resolution import fit
    from edgepack.task import Input

    inputs = [Input(name, **item.model_dump()) for name, item in recipe.sheet.task.interfaces.items()]
    if len(inputs) != 1 or inputs[0].layout != "NCHW":
        raise InputError("model.interpolate: the task has not one image as its input", "leave interpolate out")
    return fit(module, *inputs[0].shape[2:])


def task_of(recipe: Recipe) -> Task:
    """The recipe's task with its data opened."""
    from edgepack import losses, metrics
    from edgepack.data import open_data
    from edgepack.task import Input, Task

    section = recipe.sheet.task
    inputs = tuple(Input(name, **item.model_dump()) for name, item in section.interfaces.items())
    given = {key: getattr(section, key) for key in ("calibration", "evaluation", "training")}
    tables = {key: item and item.model_dump(exclude_unset=True, exclude={"augment"}) for key, item in given.items()}
    opened = {key: item and open_data(item, inputs, recipe.folder) for key, item in tables.items()}
    metric = None if section.metric is None else metrics.find(section.metric, recipe.folder)
    loss = None if section.loss is None else losses.find(section.loss, recipe.folder)
    augment = "" if section.training is None else section.training.augment
    labels = _labels(section.labels, recipe.folder)
    if not labels and opened["evaluation"] is not None:
        labels = opened["evaluation"].labels
    names = tuple(section.outputs)
    return Task(inputs, metric=metric, labels=labels, output_names=names, augment=augment, loss=loss, **opened)


def _labels(labels: Sequence[str] | str, folder: Path) -> tuple[str, ...]:
    if isinstance(labels, str):
        from edgepack.images import read_labels

        return read_labels(folder / labels)
    return tuple(labels)


def hold_latency(recipe: Recipe, profiles: Sequence[Profile]) -> None:
    """Hold measured ratios against the recipe's budget.

    Raises:
        BudgetError: latency_ratio is missed. MeasurementError: it cannot be told.
    """
    limit = recipe.sheet.budget.latency_ratio
    ratios = [(item.label, item.ratio) for item in profiles if item.ratio is not None]
    if limit is None:
        return
    if not ratios:
        raise MeasurementError("the budget names latency_ratio, but nothing was measured against a baseline")
    missed = [f"{label}: latency_ratio {r.value:.3f} is above {limit}" for label, r in ratios if r.low > limit]
    if missed:
        raise BudgetError("; ".join(missed))
    open_ = [f"{label} ({r.low:.3f} … {r.high:.3f})" for label, r in ratios if r.high > limit]
    if open_:
        raise MeasurementError(f"latency_ratio {limit} cannot be told for {', '.join(open_)}", "measure longer")


def _current(out: Path, made_from: str) -> Artifact | None:
    try:
        done = Artifact.open(out / COMPRESSED)
        baseline = Artifact.open(out / BASELINE / "pt2")
        done.check_hashes()
        baseline.check_hashes()
    except (InputError, IntegrityError):
        return None
    return done if done.manifest.fingerprint == made_from else None
