"""What edgepack makes of a network: quantized once per fold, exported once per format."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _cases import Case

from edgepack import parts
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, describe_files
from edgepack.compress.fold import Fold
from edgepack.compressing import BASELINE, COMPRESSED, compress
from edgepack.contracts import Exporter, Pass
from edgepack.exporting import export
from edgepack.progress import Silent
from edgepack.recipe import build
from edgepack.samples import count, take

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("compress", "core", "export", "runtimes")
STATIC, DYNAMIC = "static", "dynamic"
OURS: dict[bool, dict[str, dict[str, Any]]] = {  # by whether linear layers dominate
    False: {STATIC: {}},
    True: {STATIC: {}, DYNAMIC: {"activations": "dynamic"}},
}
QUIETLY = {"explain": False}  # says more and changes no number
SIZED_SAMPLES = 2  # golden samples of each file where every size of picture has its own
EXPORTS: dict[str, dict[str, Any]] = {"tflite": {"layout": "NHWC"}}


@functools.cache
def source_hash(*rooms: str) -> str:
    """Of every file, kernels and templates too, of these rooms, or of all that decide what an artifact is."""
    found = hashlib.sha256()
    for room in rooms or ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def ours(case: Case, number: int, format: str, kind: str, size: Sequence[int] = ()) -> Artifact:
    """Raises EdgepackError where edgepack refuses.

    Args:
        size: height and width, for a file of this size alone.
    """
    return _exported(_compressed(case, number, kind), format, size)


def ours_float(case: Case, format: str, size: Sequence[int] = ()) -> Artifact:
    """The original in the same format: what int8 is compared with."""
    out = case.folder / f"float-{source_hash(*ROOMS[:2])}"
    if not (out / COMPRESSED / MANIFEST).exists():
        compress(case.module, case.task(case.folds[0]), [Fold()], out, Silent())
        shutil.rmtree(out / BASELINE)
    return _exported(out, format, size)


def _exported(out: Path, format: str, size: Sequence[int]) -> Artifact:
    name = "x".join([f"{format}-{source_hash()}", *map(str, size)])
    exporter = replace(_exporter(format), name=name)
    if size:
        exporter = replace(exporter, sizes=dict(zip(("height", "width"), size, strict=True)))
    export(out, [exporter], Silent())
    return Artifact.open(out / name)


def _exporter(format: str) -> Exporter:
    return parts.find(Exporter, format)(**EXPORTS.get(format, {}))


def _compressed(case: Case, number: int, kind: str) -> Path:
    out = case.folder / f"{number}-edgepack-{kind}-{source_hash(*ROOMS[:2])}"
    if not (out / COMPRESSED / MANIFEST).exists():
        quantize = build(Pass, {"use": "quantize", **OURS[case.linear][kind], **QUIETLY})
        compress(case.module, case.task(case.folds[number]), [quantize], out, Silent())
        shutil.rmtree(out / BASELINE)
    if case.any_size:
        _keep_samples(out / COMPRESSED, SIZED_SAMPLES)
    return out


def _keep_samples(folder: Path, most: int) -> None:
    """Drop golden samples beyond the first ``most``."""
    artifact = Artifact.open(folder)
    golden, manifest = artifact.golden(), artifact.manifest
    if count(manifest.inputs, golden.inputs) <= most:
        return
    given = take(manifest.inputs, golden.inputs, 0, most)
    answers = (take(manifest.outputs, arrays, 0, most) for arrays in (golden.original, golden.simulation))
    Golden(given, *answers).save(folder / GOLDEN)
    text = replace(manifest, files=describe_files(folder)).to_json()
    (folder / MANIFEST).write_text(text, encoding="utf-8")
