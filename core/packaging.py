"""The deploy stage: artifacts → packages. A package appears whole or not at all, and never over somebody's edits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgepack import parts
from edgepack.artifact import Artifact, replacing, sha256
from edgepack.compressing import BASELINE
from edgepack.contracts import Packager
from edgepack.errors import InputError, MissingExtra, ParityError, Unsupported
from edgepack.parity import runtime_for
from edgepack.progress import Progress

PACKAGES = "packages"
CONTRACT = "contract.json"
BUILT = ("build", "__pycache__")  # folders that anybody can make again


@dataclass(frozen=True)
class PackageResult:
    """One package.

    Attributes:
        files: relative to the folder.
        notes: what the user should know before shipping it, one sentence each.
    """

    folder: Path
    artifact: Artifact
    packager: str
    files: tuple[str, ...]
    size_bytes: int
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "artifact": str(self.artifact.folder),
            "packager": self.packager,
            "files": list(self.files),
            "size_bytes": self.size_bytes,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def deploy(
    folders: Sequence[Path], packager: Packager, out: Path | None, progress: Progress, force: bool = False
) -> list[PackageResult]:
    """Write one package per artifact into ``packages/`` of ``out``, default the folder the artifact lies in.

    Raises:
        Unsupported: the packager does not take an artifact's format.
        IntegrityError: a file of an artifact was changed.
        ParityError: an artifact was never compared with its golden answers, and could be here.
        InputError: something else lies in a package's place.
    """
    artifacts = [Artifact.open(folder) for folder in folders]
    for artifact in artifacts:
        _check_format(artifact, packager)
    return [_package(artifact, packager, out, progress, force) for artifact in artifacts]


def place_of(artifact: Artifact, packager: Packager, out: Path | None) -> Path:
    """Where the package of an artifact goes."""
    home = artifact.folder.resolve().parent
    baseline = artifact.manifest.name == BASELINE
    name = f"{BASELINE}-{artifact.manifest.format}" if baseline else artifact.manifest.name
    stem = parts.name_of(packager).rpartition(":")[2].lower()
    return (out or (home.parent if baseline else home)) / PACKAGES / f"{name}-{stem}"


def takes(artifact: Artifact, packager: Packager) -> bool:
    return artifact.manifest.format in packager.formats


def noting(results: list[PackageResult], left: Sequence[Artifact], packager: Packager) -> list[PackageResult]:
    """The results, the last one saying which artifacts the packager left out."""
    if not left:
        return results
    names = ", ".join(f"{item.manifest.name} ({item.manifest.format})" for item in left)
    note = f"not packaged: {names}; packager {parts.name_of(packager)} takes {', '.join(packager.formats)}"
    return [*results[:-1], replace(results[-1], notes=(*results[-1].notes, note))]


def _check_format(artifact: Artifact, packager: Packager) -> None:
    if not takes(artifact, packager):
        raise Unsupported(
            f"packager {parts.name_of(packager)} does not take {artifact.manifest.format} ({artifact.folder})",
            f"it takes {', '.join(packager.formats)}",
        )


def _package(
    artifact: Artifact, packager: Packager, out: Path | None, progress: Progress, force: bool
) -> PackageResult:
    began = time.perf_counter()
    folder = place_of(artifact, packager, out)
    progress.start(f"packaging {artifact.folder.name} ({parts.name_of(packager)})")
    artifact.check_hashes()
    notes = [*_unchecked(artifact), *(f"budget missed: {text}" for text in artifact.manifest.budget_missed)]
    if not force:
        _keep_edits(folder)
    with replacing(folder) as temporary:
        written = [path.relative_to(temporary) for path in packager.write(artifact, temporary)]
    return PackageResult(
        folder=folder,
        artifact=artifact,
        packager=parts.name_of(packager),
        files=tuple(path.as_posix() for path in written),
        size_bytes=sum((folder / path).stat().st_size for path in written),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _unchecked(artifact: Artifact) -> list[str]:
    """A warning for an artifact that no engine here can check. Raises ParityError for one that could be."""
    manifest = artifact.manifest
    if manifest.parity.status == "checked":
        return []
    what = f"{manifest.format} {manifest.name!r} was never compared with its golden answers"
    try:
        engine = parts.name_of(runtime_for(manifest.format))
    except (MissingExtra, Unsupported):
        return [f"{what} ({manifest.parity.status}): run the package's self-test on the target before you trust it"]
    raise ParityError(f"{what} ({manifest.parity.status})", f"{engine} can do it here: edgepack export --force")


def _keep_edits(folder: Path) -> None:
    """Raises InputError when replacing the folder would lose what is not ours."""
    if not folder.exists():
        return
    try:
        files = json.loads((folder / CONTRACT).read_text(encoding="utf-8"))["files"]
        known = {name: facts["sha256"] for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is there and is not a package of edgepack", "--force replaces it") from error
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if name == Path(CONTRACT) or name.parts[0].startswith(BUILT):
            continue
        if known.get(name.as_posix()) != sha256(path):
            raise InputError(f"{path} was added or edited; a new package would replace it", "--force replaces it")
