"""The verbs in Python, typed. ``edgepack.compress(...)`` and its siblings call these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack import pipeline, profiling
from edgepack.artifact import Artifact
from edgepack.compressing import CompressResult
from edgepack.contracts import Device, Exporter, Packager, Pass, Runtime, Settings
from edgepack.exporting import ExportResult
from edgepack.measurement import Profile
from edgepack.pipeline import VerifyResult
from edgepack.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import nn

    from edgepack.packaging import PackageResult
    from edgepack.task import Task

OUT = "edgepack-out"


def compress(
    module: nn.Module,
    task: Task,
    passes: Sequence[Pass] = (),
    out: Path | str = OUT,
    progress: Progress | None = None,
) -> CompressResult:
    """Apply passes to a copy of ``module`` and write ``out/compressed``; the original goes to ``out/baseline/pt2``.

    Raises:
        EdgepackError: with the exit status and the hint of its kind.
    """
    from edgepack import compressing

    return compressing.compress(module, task, passes, Path(out), progress or Silent())


def export(
    out: Path | str = OUT,
    exporters: Sequence[Exporter] = (),
    task: Task | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> list[ExportResult]:
    """Write one verified artifact per exporter from ``out/compressed``; with ``task``, scored on its evaluation data.

    Raises:
        ParityError: an artifact does not compute what it must; it is not written.
    """
    from edgepack import exporting

    return exporting.export(Path(out), exporters, progress or Silent(), task, force=force)


def profile(
    artifacts: Sequence[Artifact | Path | str],
    device: Device | None = None,
    runtime: Runtime | None = None,
    settings: Settings | None = None,
) -> list[Profile]:
    """Measure artifacts in one interleaved run (default: on this host); ratios are against the first."""
    from edgepack import parts

    opened = [item if isinstance(item, Artifact) else Artifact.open(item) for item in artifacts]
    where = device or parts.find(Device, "host")()
    return profiling.profile(opened, where, runtime, settings or Settings(), Silent())


def deploy(
    artifacts: Sequence[Path | str], packager: Packager, out: Path | str | None = None, force: bool = False
) -> list[PackageResult]:
    """Write one package per artifact folder into ``out/packages``; default ``packages`` beside the artifact.

    Raises:
        Unsupported: the packager does not take a format. ParityError: an artifact was never checked, and could be.
    """
    opts = pipeline.Options(out=None if out is None else Path(out), force=force)
    return pipeline.deploy_folders([Path(folder) for folder in artifacts], packager, opts)


def verify(folder: Path | str) -> VerifyResult:
    """Check every hash of an artifact and its answers to the golden inputs.

    Raises:
        IntegrityError: a file was changed. ParityError: it computes something else.
    """
    return pipeline.verify(Path(folder))


def compare(a: Path | str, b: Path | str, settings: Settings | None = None) -> list[Profile]:
    """Time two artifacts against each other; the second profile's ratio is B over A."""
    return pipeline.compare(Path(a), Path(b), settings or Settings())


def report(out: Path | str = OUT) -> Path:
    """Write ``report.json`` and ``report.html`` from what lies in ``out``; returns the HTML file."""
    return pipeline.report_recipe(Path(out))
