"""The export stage: ``compressed/`` → artifacts. Sees no user code and no training data, only that folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack import parts, probing, scoring
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, Parity, describe_files, replacing
from edgepack.choosing import Choice, choose, decided, undecided
from edgepack.collector import without_collection
from edgepack.compressing import BASELINE, COMPRESSED, WORK
from edgepack.contracts import FLOAT_LIMIT, Exporter, Graph, Preprocessing, TensorSpec
from edgepack.errors import DeviceError, EdgepackError, InputError, IntegrityError, MissingExtra, StepError, Unsupported
from edgepack.front import to_front, with_front
from edgepack.graph import fixed, load_graph, run_graph
from edgepack.parity import least_of, max_relative, runtime_for
from edgepack.plan import Plan
from edgepack.progress import Progress
from edgepack.proof import hold_storage, prove
from edgepack.recipe import build
from edgepack.samples import Array, resized
from edgepack.ties import margins
from edgepack.versions import versions

if TYPE_CHECKING:
    from edgepack.sheet import Budget
    from edgepack.task import Task

PACKAGES = (
    "torch", "onnx", "onnxruntime", "openvino", "litert-torch", "ai-edge-litert", "coremltools", "tensorrt",
)  # fmt: skip


@dataclass(frozen=True)
class ExportResult:
    """One artifact and the original's in the same format."""

    artifact: Artifact
    baseline: Artifact | None
    up_to_date: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.artifact.folder),
            "size_bytes": self.artifact.size_bytes,
            "manifest": asdict(self.artifact.manifest),
            "baseline": None if self.baseline is None else str(self.baseline.folder),
            "up_to_date": self.up_to_date,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Source:
    """What an export starts from: a captured graph, its plan and its golden samples."""

    graph: Graph
    plan: Plan
    golden: Golden
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Read ``compressed/`` (or ``baseline/pt2``). Raises InputError, IntegrityError."""
        artifact = Artifact.open(folder)
        artifact.check_hashes()
        if artifact.manifest.format != "pt2":
            raise InputError(f"{folder} holds {artifact.manifest.format}; export starts from a compressed/ folder")
        plan = Plan.load(folder) if (folder / "plan.json").exists() else Plan()
        return cls(load_graph(folder, artifact.manifest), plan, artifact.golden(), artifact.manifest)


def export(
    out: Path,
    exporters: Sequence[Exporter],
    progress: Progress,
    task: Task | None = None,
    budget: Budget | None = None,
    force: bool = False,
) -> list[ExportResult]:
    """Write one verified artifact per exporter into ``out``, and a baseline per format.

    Args:
        out: holds ``compressed/``, and ``baseline/pt2/`` if compress wrote it.
        task: scores the artifacts on its evaluation data; without it scores stay empty.

    Raises:
        EdgepackError: the first failure; artifacts written before it stay, a failed one is not written.
    """
    if not (out / COMPRESSED / MANIFEST).exists():
        raise InputError(f"{out / COMPRESSED} does not exist", "run edgepack compress first")
    stage = _Stage(out, progress, task, budget, force)
    results = []
    for exporter in exporters:
        began = time.perf_counter()
        baseline = stage.baseline(exporter)
        artifact, fresh = stage.artifact(out / (exporter.name or exporter.format), out / COMPRESSED, exporter)
        results.append(ExportResult(artifact, baseline, not fresh, time.perf_counter() - began))
    return results


@dataclass
class _Stage:
    out: Path
    progress: Progress
    task: Task | None
    budget: Budget | None
    force: bool
    opened: dict[Path, Source] = field(default_factory=dict)

    def baseline(self, exporter: Exporter) -> Artifact | None:
        """The original in the exporter's format, written once."""
        source = self.out / BASELINE / "pt2"
        if not (source / MANIFEST).exists():
            return None
        if exporter.format == "pt2":
            return Artifact.open(source)
        plain = replace(exporter, name=BASELINE, precision="float32", layout=None, normalize=False)
        return self.artifact(self.out / BASELINE / exporter.format, source, plain)[0]

    def artifact(self, folder: Path, source: Path, exporter: Exporter) -> tuple[Artifact, bool]:
        """The artifact, and whether it had to be written."""
        fingerprint = self._fingerprint(source, exporter)
        if not self.force and (current := _current(folder, fingerprint)) is not None:
            return current, False
        name = parts.name_of(exporter)
        self.progress.start(f"exporting {folder.relative_to(self.out).as_posix()} ({name})")
        try:
            with without_collection():
                return self._write(folder, self._source(source), exporter, fingerprint), True
        except (EdgepackError, OSError):
            raise
        except Exception as error:
            message = f"exporter {name} ({parts.options_of(exporter)}) failed: {type(error).__name__}: {error}"
            raise StepError(message, error) from error

    def _write(self, folder: Path, source: Source, exporter: Exporter, fingerprint: str) -> Artifact:
        if exporter.precision != "plan" or not undecided(source.plan):
            return self._keep(folder, source, exporter, fingerprint)
        trials = replace(self, task=None, budget=None)
        (self.out / WORK).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.out / WORK) as place:

            def write(form: str) -> Artifact:
                self.progress.start(f"trying activations = {form!r}")
                return trials._keep(Path(place) / form, _with_form(source, form), exporter, fingerprint)

            choice = choose(write, self.progress)
        return self._keep(folder, _with_form(source, choice.form), exporter, fingerprint, choice)

    def _keep(
        self, folder: Path, source: Source, exporter: Exporter, fingerprint: str, choice: Choice | None = None
    ) -> Artifact:
        began = time.perf_counter()
        if exporter.sizes:
            source = self._sized(source, exporter.sizes)
        graph = with_front(source.graph, exporter.layout, exporter.normalize)
        simulation = exporter.lower(graph, source.plan)
        golden = _golden(source, graph, simulation)
        with replacing(folder) as temporary:
            golden.save(temporary / GOLDEN)
            census = exporter.write(simulation, temporary)
            seconds = round(time.perf_counter() - began, 3)
            step = {"part": exporter.format, "options": parts.options_of(exporter), "seconds": seconds, **_said(choice)}
            manifest = Manifest(
                format=exporter.format,
                name=exporter.name or exporter.format,
                dialect="float16" if exporter.precision == "float16" else simulation.dialect,
                inputs=simulation.inputs,
                outputs=simulation.outputs,
                files=describe_files(temporary),
                preprocessing=dict(simulation.preprocessing),
                labels=simulation.labels,
                history=(*({**entry, "findings": {}} for entry in source.manifest.history), step),
                census={key: value for key, value in asdict(census).items() if key != "contents"},
                float_size_bytes=source.manifest.float_size_bytes,
                versions=versions(*PACKAGES),
                fingerprint=fingerprint,
                parity=Parity("not run yet", least_db=least_of(simulation, golden)),
            )
            hold_storage(simulation, census, f"{manifest.format} {manifest.name!r}")
            manifest = self._proved(temporary, manifest, source, simulation)
            (temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return Artifact.open(folder)

    def _proved(self, folder: Path, manifest: Manifest, source: Source, simulation: Graph) -> Manifest:
        """Load the artifact again, compare it with its golden answers, score it, hold it against the budget."""
        artifact = Artifact(folder, manifest)
        try:
            runtime = runtime_for(manifest.format)
        except (DeviceError, MissingExtra, Unsupported) as error:
            return replace(manifest, parity=replace(manifest.parity, status=f"not run: {error.message}"))
        parity, compiled_bytes = prove(artifact, runtime, simulation), runtime.compiled_bytes(artifact)
        manifest = replace(manifest, parity=parity, compiled_bytes=compiled_bytes)
        artifact = replace(artifact, manifest=manifest)
        if self.task is not None and manifest.name != BASELINE:
            session = runtime.load(artifact)
            try:
                network = scoring.Network(session.run, manifest.inputs, manifest.outputs)
                what = f"scoring {manifest.format} {manifest.name}"
                this = scoring.score(self.task, network, self._original, self.progress, what)
            finally:
                session.close()
            original = source.manifest.score
            manifest = replace(
                manifest, score=scoring.beside({"value": original["original"]} if original else None, this)
            )
        return replace(manifest, budget_missed=tuple(_missed(self.budget, manifest, artifact.size_bytes)))

    def _sized(self, source: Source, sizes: Mapping[str, int]) -> Source:
        """The source for one size, with its golden samples cut or repeated to it."""
        graph = _fixed(source.graph, sizes)
        inputs = resized(source.golden.inputs, graph.inputs)
        place, original = self.out / BASELINE / "pt2", dict[str, Array]()
        if (place / MANIFEST).exists():
            original = run_graph(fixed(self._source(place).graph, sizes), inputs)
        return replace(source, graph=graph, golden=Golden(inputs, original, run_graph(graph, inputs)))

    def _judged_by(self) -> dict[str, Any]:
        scored = None if self.task is None or self.task.evaluation is None else len(self.task.evaluation)
        return {"scored": scored, "budget": None if self.budget is None else self.budget.model_dump()}

    def _original(self) -> scoring.Network:
        return scoring.Network.of(self._source(self.out / BASELINE / "pt2").graph)

    def _source(self, folder: Path) -> Source:
        if folder not in self.opened:
            self.opened[folder] = Source.open(folder)
        return self.opened[folder]

    def _fingerprint(self, source: Path, exporter: Exporter) -> str:
        engine = probing.ENGINES.get(exporter.format)
        facts = {
            "source": Artifact.open(source).manifest.files,
            "exporter": [parts.name_of(exporter), parts.options_of(exporter)],
            **({} if exporter.name == BASELINE else self._judged_by()),
            "versions": versions(*PACKAGES),
            "probe": None if engine is None or exporter.name == BASELINE else probing.digest(engine),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def simulation_of(artifact: Artifact) -> Graph:
    """Make an artifact's simulation again from the folder it was exported from.

    Raises:
        InputError: that folder is not there any more, or holds another network by now.
    """
    inside = artifact.folder.parent
    folder = inside / "pt2" if inside.name == BASELINE else inside / COMPRESSED
    source = Source.open(folder)
    step = artifact.manifest.history[-1]
    exporter = build(Exporter, {"use": artifact.manifest.format, **step["options"]})
    graph = with_front(_fixed(source.graph, exporter.sizes), exporter.layout, exporter.normalize)
    plan = decided(source.plan, step["activations"]) if "activations" in step else source.plan
    simulation = exporter.lower(graph, plan)
    golden = artifact.golden()
    for name, answers in run_graph(simulation, golden.inputs).items():
        if max_relative(answers, golden.simulation[name]) > FLOAT_LIMIT:
            raise InputError(f"{folder} is not what {artifact.folder} was made from", "export again")
    return simulation


def _current(folder: Path, fingerprint: str) -> Artifact | None:
    """The artifact in ``folder`` if it is whole and came from the same inputs."""
    try:
        artifact = Artifact.open(folder)
        if artifact.manifest.fingerprint != fingerprint:
            return None
        artifact.check_hashes()
    except (InputError, IntegrityError):
        return None
    return artifact


def _fixed(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    axes = {axis for spec in graph.inputs for axis in spec.shape if isinstance(axis, str)}
    if unknown := [name for name in sizes if name not in axes]:
        raise InputError(
            f"sizes names {unknown[0]!r}, which is no dynamic axis of the network: "
            f"{', '.join(sorted(axes)) or 'it has none'}"
        )
    return fixed(graph, sizes)


def _with_form(source: Source, form: str) -> Source:
    return replace(source, plan=decided(source.plan, form))


def _said(choice: Choice | None) -> dict[str, Any]:
    """What a step says of the form that was chosen; ``simulation_of`` reads it again."""
    return {"notes": []} if choice is None else {"notes": [choice.note], "activations": choice.form}


def _golden(source: Source, graph: Graph, simulation: Graph) -> Golden:
    """The source's golden samples as the artifact takes them, with the simulation's answers."""
    raw = _raw(source, graph)
    inputs = to_front(source.golden.inputs, source.graph.inputs, graph.inputs, raw)
    return Golden(inputs, source.golden.original, run_graph(simulation, inputs), margins(simulation, inputs))


def _raw(source: Source, graph: Graph) -> dict[str, Array]:
    """uint8 NHWC pixels for the inputs that take them, by undoing the preprocessing exactly."""
    pairs = zip(source.graph.inputs, graph.inputs, strict=True)
    return {
        inner.name: _pixels(source.golden.inputs[inner.name], source.graph.preprocessing[inner.name], inner)
        for inner, outer in pairs
        if inner.dtype != outer.dtype
    }


def _pixels(values: Array, how: Preprocessing, spec: TensorSpec) -> Array:
    mean = np.asarray(how.mean or (0.0,), dtype=np.float64).reshape(1, -1, 1, 1)
    std = np.asarray(how.std or (1.0,), dtype=np.float64).reshape(1, -1, 1, 1)
    exact = (values * std + mean) * how.scale
    pixels = np.clip(np.rint(exact), 0, 255)
    if np.abs(exact - pixels).max(initial=0.0) > 0.01:
        raise Unsupported(
            f"normalize: the samples of input {spec.name!r} are not 8-bit pixels under its preprocessing",
            "check task.input scale, mean and std, or leave out normalize",
        )
    return np.ascontiguousarray(np.moveaxis(pixels.astype(np.uint8), 1, -1))


def _missed(budget: Budget | None, manifest: Manifest, size_bytes: int) -> list[str]:
    missed: list[str] = []
    if budget is None or manifest.name == BASELINE:
        return missed
    drop = scoring.drop(manifest.score)
    if budget.score_drop is not None and drop is not None and drop > budget.score_drop:
        missed.append(f"score_drop {drop:.4f} is above {budget.score_drop}")
    if budget.size_ratio is not None and manifest.float_size_bytes:
        ratio = size_bytes / manifest.float_size_bytes
        if ratio > budget.size_ratio:
            missed.append(f"size_ratio {ratio:.3f} is above {budget.size_ratio}")
    return missed


def score_text(score: Mapping[str, Any] | None) -> str:
    """A score in the metric's unit, such as ``91.69 % (91.1 … 92.2)``; ``not scored`` without one."""
    if score is None:
        return "not scored"
    factor, unit = (100.0, " %") if score["unit"] == "%" else (1.0, f" {score['unit']}".rstrip())
    value, low, high = (factor * score[key] for key in ("this", "low", "high"))
    return f"{value:.2f}{unit} ({low:.2f} … {high:.2f})"
