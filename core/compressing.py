"""The compress stage: module → passes → ``compressed/``, and the original beside it as ``baseline/pt2/``."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack import parts
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, Parity, describe_files, replacing
from edgepack.contracts import Arrays, Graph, Pass
from edgepack.errors import EdgepackError, InputError, StepError
from edgepack.graph import capture, run_graph, run_module, save_graph
from edgepack.parity import beside_original
from edgepack.plan import Plan
from edgepack.progress import Progress
from edgepack.scoring import Network, beside, score
from edgepack.versions import versions

if TYPE_CHECKING:
    from torch import nn

    from edgepack.measurement import Ratio
    from edgepack.task import Task

GOLDEN_SAMPLES = 16
COMPRESSED = "compressed"
BASELINE = "baseline"
WORK = "work"  # scratch


@dataclass(frozen=True)
class CompressResult:
    """What ``compress`` did.

    Attributes:
        folder: ``compressed/``.
        manifest: of that folder; history, score and sizes are there.
        notes: what the passes did and left alone, and why.
        up_to_date: nothing had to be done.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]
    up_to_date: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


@dataclass
class PassRun:
    """``run`` of one pass: where it works, what it says, and the host's stopwatch."""

    workdir: Path
    seed: int
    plan: Plan
    watcher: Progress
    original: nn.Module
    task: Task
    folder: Path = Path()
    identity: str = ""
    notes: list[str] = field(default_factory=list)
    findings: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def record(self, what: str, values: Mapping[str, Any]) -> None:
        self.findings[what] = values

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, text: str, total: int | None = None) -> Callable[[int], None]:
        return self.watcher.start(text, total)

    def measure(
        self, module: nn.Module, against: nn.Module | None = None, format: str = "onnx", then: Sequence[Pass] = ()
    ) -> Ratio:
        from edgepack.profiling import time_modules

        pair = [self.original if against is None else against, module]
        ratio = time_modules(pair, self.task, self.workdir, format, then)[1].ratio
        assert ratio is not None  # the second of two contenders always has one
        return ratio

    def time(
        self, modules: Sequence[nn.Module], task: Task | None = None, format: str = "onnx", then: Sequence[Pass] = ()
    ) -> list[float]:
        from edgepack.profiling import time_modules

        profiles = time_modules(modules, task or self.task, self.workdir, format, then)
        return [float(profile.conditions["floor_ms"]) for profile in profiles]


def compress(
    module: nn.Module, task: Task, passes: Sequence[Pass], out: Path, progress: Progress, fingerprint: str = "",
    folder: Path = Path(),
) -> CompressResult:  # fmt: skip
    """Apply the passes to a copy of ``module`` and write ``out/compressed`` and ``out/baseline/pt2``.

    Paths in options are relative to ``folder``. What passes keep to resume lies in ``out/work`` until all succeed.

    Raises:
        EdgepackError: with the exit status of its kind; a pass that fails unexpectedly is named (StepError).
    """
    began = time.perf_counter()
    original = module.eval()
    progress.start("capturing the original network")
    before = capture(original, task)
    inputs = task.samples(GOLDEN_SAMPLES)
    answers = _numbers(run_module(original, before, inputs), "the network", "look at its weights and task.input")
    reference = Network.of(before)
    score_before = score(task, reference, lambda: reference, progress, "scoring the original")

    plan = Plan()
    smaller, history = _apply_all(original, task, passes, plan, out / WORK, folder, progress)
    progress.start("capturing the compressed network")
    after = capture(smaller, task) if passes else before
    _same_interface(before, after)
    score_after = score_before
    if passes:
        score_after = score(task, Network.of(after), lambda: reference, progress, "scoring the compressed")

    facts = _facts(original, before, score_before)
    _write(out / BASELINE / "pt2", before, None, Golden(inputs, answers, answers), facts)
    found = _numbers(run_graph(after, inputs), "the compressed network", "leave out passes to find which does it")
    golden = Golden(inputs, answers, found)
    facts = replace(
        facts, name=COMPRESSED, inputs=after.inputs, outputs=after.outputs, history=tuple(history),
        parity=beside_original(after.outputs, golden), score=beside(score_before, score_after), fingerprint=fingerprint,
    )  # fmt: skip
    manifest = _write(out / COMPRESSED, after, plan, golden, facts)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return result(out, manifest, False, time.perf_counter() - began)


def _facts(original: nn.Module, graph: Graph, scored: Mapping[str, Any] | None) -> Manifest:
    """What is said of the network before compression."""
    return Manifest(
        format="pt2", name=BASELINE, dialect="aten", inputs=graph.inputs, outputs=graph.outputs,
        parity=Parity("not run: this is the reference"), score=beside(scored, scored),
        float_size_bytes=4 * _values(original), versions=versions("numpy", "torch"),
    )  # fmt: skip


def result(out: Path, manifest: Manifest, up_to_date: bool, seconds: float) -> CompressResult:
    notes = tuple(f"{entry['part']}: {note}" for entry in manifest.history for note in entry["notes"])
    return CompressResult(out / COMPRESSED, manifest, notes, up_to_date, seconds)


def _apply_all(
    original: nn.Module, task: Task, passes: Sequence[Pass], plan: Plan, work: Path, folder: Path, progress: Progress
) -> tuple[nn.Module, list[Mapping[str, Any]]]:
    module = copy.deepcopy(original)
    history: list[Mapping[str, Any]] = []
    for number, item in enumerate(passes, 1):
        name = parts.name_of(item)
        progress.start(f"pass {number} of {len(passes)}: {name}")
        identity = _identity(passes[:number])
        run = PassRun(work / f"{number}-{name}", 0, plan, progress, original, task, folder, identity)
        began, size = time.perf_counter(), _values(module)
        try:
            item.check(module, task)
            module = item.apply(module, task, run).eval()
        except EdgepackError:
            raise
        except Exception as error:
            done = ", ".join(str(entry["part"]) for entry in history) or "none"
            raise StepError(
                f"pass {number} ({name}, {parts.options_of(item)}) failed: {type(error).__name__}: {error}; "
                f"passes done before it: {done}", error) from error  # fmt: skip
        history.append({
            "part": name, "options": parts.options_of(item), "seconds": round(time.perf_counter() - began, 3),
            "seed": run.seed, "before": {"values": size}, "after": {"values": _values(module)}, "notes": run.notes,
            "findings": run.findings,
        })  # fmt: skip
    return module, history


def _identity(passes: Sequence[Pass]) -> str:
    facts = [[(parts.name_of(item), parts.options_of(item)) for item in passes], versions("torch")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _numbers(outputs: Arrays, who: str, hint: str) -> Arrays:
    """The outputs, unless NaN is among them: every check that follows would be empty."""
    for name, array in outputs.items():
        if np.isnan(array).any():
            raise InputError(f"{who} answers NaN in output {name!r} for the golden samples", hint)
    return outputs


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _same_interface(before: Graph, after: Graph) -> None:
    old, new = ([spec.shape for spec in graph.outputs] for graph in (before, after))
    if old != new:
        raise StepError(f"a pass changed the outputs from {old} to {new}", ValueError("interface changed"))


def _write(folder: Path, graph: Graph, plan: Plan | None, golden: Golden, manifest: Manifest) -> Manifest:
    with replacing(folder) as temporary:
        save_graph(graph, temporary)
        if plan is not None:
            plan.save(temporary)
        golden.save(temporary / GOLDEN)
        manifest = replace(manifest, preprocessing=dict(graph.preprocessing), labels=graph.labels,
                           files=describe_files(temporary))  # fmt: skip
        (temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder).manifest
