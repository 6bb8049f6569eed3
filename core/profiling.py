"""The profile stage: artifacts on devices, every ratio from one interleaved run."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack import parts
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, Parity, describe_files, write_text
from edgepack.compressing import BASELINE, GOLDEN_SAMPLES, PassRun
from edgepack.contracts import INTEGERS, Contender, Device, Exporter, Pass, Runtime, Settings
from edgepack.errors import DeviceError, EdgepackError, InputError, MissingExtra, Unsupported
from edgepack.measurement import Profile
from edgepack.parity import check, engine_for, least_of, runtime_for
from edgepack.plan import Plan
from edgepack.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import nn

    from edgepack.task import Task

PROFILES = "profiles"
LEAST_SECONDS, SECONDS_EACH = 10.0, 1.0  # of a run in which passes time modules


def profile(
    artifacts: Sequence[Artifact],
    device: Device,
    runtime: Runtime | None,
    settings: Settings,
    progress: Progress,
    below: Path | None = None,
) -> list[Profile]:
    """Measure artifacts in one interleaved run; ratios are against the first.

    Args:
        below: folder that labels are relative to; None for the shortest names that tell them apart.
        runtime: the engine for all of them; None takes the first installed engine that reads each format.

    Raises:
        InputError: the runtime does not read an artifact's format.
        ParityError: an artifact does not give its golden answers; it is not timed.
        DeviceError: what would run here is no engine.
    """
    contenders = [
        Contender(label, artifact, engine_for(artifact, runtime))
        for label, artifact in zip(_labels(artifacts, below), artifacts, strict=True)
    ]
    for contender in contenders:
        if (reason := contender.runtime.untimed()) is not None:
            raise DeviceError(reason)
    names = ", ".join(contender.label for contender in contenders)
    step, shown = progress.start(f"measuring {names}", 100), [0]

    def seen(share: float) -> None:
        percent = int(100 * min(share, 1.0))
        step(percent - shown[0])
        shown[0] = percent

    return device.measure(contenders, settings, seen)


def profile_out(
    out: Path,
    names: Sequence[str],
    device: Device,
    runtime: Runtime | None,
    settings: Settings,
    progress: Progress,
) -> list[Profile]:
    """Measure exported artifacts, each format in one run beside its baseline.

    Formats whose engine cannot run here are left out with a warning, unless there are no others.

    Raises:
        MissingExtra, DeviceError: no exported format can be measured here.
    """
    groups: dict[str, list[Artifact]] = {}
    for name in names:
        artifact = Artifact.open(out / name)
        if runtime is None or artifact.manifest.format in runtime.formats:
            groups.setdefault(artifact.manifest.format, []).append(artifact)
    if not groups and runtime is not None:
        raise InputError(f"{parts.name_of(runtime)} reads none of the exported formats", f"it reads {runtime.formats}")
    if runtime is None:
        groups = _measurable(groups)
    profiles: list[Profile] = []
    for format_name, artifacts in groups.items():
        baseline = out / BASELINE / format_name
        first = [Artifact.open(baseline)] if (baseline / MANIFEST).exists() else []
        profiles += profile([*first, *artifacts], device, runtime, settings, progress, out)
    return profiles


def _measurable(groups: Mapping[str, list[Artifact]]) -> dict[str, list[Artifact]]:
    reasons: dict[str, EdgepackError] = {}
    for format_name in groups:
        try:
            if (reason := runtime_for(format_name, proof=False).untimed()) is not None:
                raise DeviceError(reason)
        except (DeviceError, MissingExtra, Unsupported) as error:
            reasons[format_name] = error
    if reasons and len(reasons) == len(groups):
        raise next(iter(reasons.values()))
    for format_name, why in reasons.items():
        logging.getLogger(__name__).warning("%s is not measured: %s", format_name, why.message)
    return {name: artifacts for name, artifacts in groups.items() if name not in reasons}


def store(out: Path, profiles: Sequence[Profile]) -> None:
    """Write ``profiles/*.json``, in place of those of an earlier run."""
    written = set()
    for item in profiles:
        engine = item.runtime.partition(" ")[0]
        path = out / PROFILES / f"{item.label.replace('/', '-')}.{engine}.t{item.threads}.json"
        write_text(path, json.dumps(item.to_json(), indent=2, allow_nan=False) + "\n")
        written.add(path)
    for path in set((out / PROFILES).glob("*.json")) - written:
        path.unlink()


def time_modules(
    modules: Sequence[nn.Module], task: Task, workdir: Path, format: str, then: Sequence[Pass] = ()
) -> list[Profile]:
    """Latencies of modules as artifacts of one format on this host, one thread: what passes decide by.

    Ratios are against the first. Copies of the modules go through the passes ``then`` before they are written.

    Raises:
        MissingExtra, DeviceError, Unsupported: the format cannot be written, or its engine cannot run, here.
    """
    with tempfile.TemporaryDirectory(dir=_made(workdir)) as folder:
        artifacts = []
        for number, item in enumerate(modules):
            made, plan = applied(item, task, then, Path(folder) / "work")
            artifacts.append(write_module(made, task, Path(folder) / f"{number:03}", format, plan))
        settings = Settings(max_seconds=max(LEAST_SECONDS, SECONDS_EACH * len(artifacts)), cold=False)
        return profile(artifacts, parts.find(Device, "host")(), None, settings, Silent())


def applied(module: nn.Module, task: Task, passes: Sequence[Pass], work: Path) -> tuple[nn.Module, Plan]:
    """What passes make of a copy of a module; the module itself where there are none."""
    plan, found = Plan(), copy.deepcopy(module) if passes else module
    for item in passes:
        found = item.apply(found, task, PassRun(work, 0, plan, Silent(), module, task)).eval()
    return found, plan


def write_module(module: nn.Module, task: Task, folder: Path, format: str, plan: Plan | None = None) -> Artifact:
    """A module as an artifact that may be timed, with golden answers of its own simulation.

    How far an integer one is off its simulation in its engine is found out here.
    """
    from edgepack.graph import capture, run_graph

    folder.mkdir(parents=True)
    exporter = parts.find(Exporter, format)()
    simulation = exporter.lower(capture(module, task), plan or Plan())
    exporter.write(simulation, folder)
    integer = simulation.dialect.startswith(INTEGERS)
    inputs = task.samples(GOLDEN_SAMPLES if integer else 1)
    answers = run_graph(simulation, inputs)
    golden = Golden(inputs, answers, answers)
    golden.save(folder / GOLDEN)
    parity = Parity("not run", least_db=least_of(simulation, golden))
    manifest = Manifest(format, folder.name, simulation.dialect, simulation.inputs, simulation.outputs, parity=parity)
    manifest = replace(manifest, files=describe_files(folder))
    if integer:
        artifact = Artifact(folder, manifest)
        manifest = replace(manifest, parity=check(artifact, engine_for(artifact, None)))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def _labels(artifacts: Sequence[Artifact], below: Path | None) -> list[str]:
    """Short names, unique."""
    if below is not None:
        return [artifact.folder.relative_to(below).as_posix() for artifact in artifacts]
    for depth in range(1, 10):
        labels = ["/".join(artifact.folder.resolve().parts[-depth:]) for artifact in artifacts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{chr(ord('A') + index)}:{artifact.folder.name}" for index, artifact in enumerate(artifacts)]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
