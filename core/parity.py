"""The parity proof: an artifact against its golden answers, number by number. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgepack import parts
from edgepack.artifact import Artifact, Golden, Parity
from edgepack.contracts import Arrays, Runtime, Session, TensorSpec
from edgepack.errors import DeviceError, InputError, MissingExtra, ParityError, Unsupported
from edgepack.samples import Array, compute, count

UNBOUNDED = 1e300  # JSON has no infinity


def max_relative(value: Array, reference: Array) -> float:
    """max|a−b| / max|b|; infinite when shapes differ, for any NaN, and where only one of two values is infinite."""
    if value.shape != reference.shape:
        return math.inf
    a, b = value.astype(np.float64), reference.astype(np.float64)
    same = a == b
    with np.errstate(invalid="ignore"):  # inf − inf, where both are equal
        difference = np.where(same, 0.0, np.abs(a - b))
    if not np.isfinite(difference).all():
        return math.inf
    top, scale = float(difference.max(initial=0.0)), float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    return 0.0 if top == 0.0 else math.inf if scale == 0.0 else top / scale


def sqnr_db(value: Array, reference: Array) -> float | None:
    """10·log10(Σb² / Σ(a−b)²); None when there is no difference at all, or it is not finite."""
    if value.shape != reference.shape:
        return None
    a, b = value.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        noise, signal = float(np.square(a - b).sum()), float(np.square(b).sum())
    if noise == 0.0 or signal == 0.0 or not math.isfinite(noise) or not math.isfinite(signal):
        return None
    return 10.0 * math.log10(signal / noise)


def agreement(value: Array, reference: Array) -> float | None:
    """Share of samples with the same arg-max, None for outputs that are not class scores (N, classes)."""
    if reference.ndim != 2 or reference.shape[1] < 2 or value.shape != reference.shape:
        return None
    return float((value.argmax(1) == reference.argmax(1)).mean())


def runtime_for(format_name: str, proof: bool = True) -> Runtime:
    """The first engine of a format that can run here; for a proof of numbers, else the first that proves the format.

    Raises:
        Unsupported: no engine of edgepack reads it.
        MissingExtra: none of those that do is installed.
        DeviceError: the one that does lacks its device.
    """
    missing: MissingExtra | DeviceError | None = None
    classes = [parts.find(Runtime, name) for name in parts.names(Runtime)]
    own = [cls for cls in classes if format_name in cls.formats]
    for cls in [*own, *(cls for cls in classes if proof and format_name in cls.proves)]:
        runtime = cls()
        try:
            runtime.version()
        except (MissingExtra, DeviceError) as error:
            missing = missing or error
            continue
        return runtime
    raise missing or Unsupported(f"no engine here reads {format_name!r}", "edgepack list shows engines and formats")


def engine_for(artifact: Artifact, runtime: Runtime | None, proof: bool = False) -> Runtime:
    """The given engine if it reads the artifact, or the first that can.

    Raises:
        InputError: the given engine does not read the format. Else as ``runtime_for``.
    """
    if runtime is None:
        return runtime_for(artifact.manifest.format, proof)
    if artifact.manifest.format not in (*runtime.formats, *runtime.proves):
        raise InputError(
            f"{parts.name_of(runtime)} does not read {artifact.manifest.format} ({artifact.folder})",
            f"it reads {', '.join(runtime.formats)}",
        )
    return runtime


def check(artifact: Artifact, runtime: Runtime) -> Parity:
    """Run an artifact on its golden inputs and compare.

    Raises:
        ParityError: it differs from its simulation; names format, worst output and by how much.
    """
    golden = artifact.golden()
    session = runtime.load(artifact)
    try:
        parity = replace(measure(artifact, session, golden), runtime=f"{parts.name_of(runtime)} {runtime.version()}")
    finally:
        session.close()
    limit = runtime.limit(artifact)
    if parity.max_rel is None or parity.max_rel > limit:
        amount = (
            "without bound" if parity.max_rel in (None, UNBOUNDED) else f"by {parity.max_rel:.2g} of its largest value"
        )
        raise ParityError(
            f"{artifact.manifest.format} {artifact.manifest.name!r}: output {parity.output!r} differs from its "
            f"simulation {amount} (limit {limit:g}) on {parity.runtime}",
            "the artifact was not kept" if artifact.folder.name.startswith(".") else "export again",
        )
    return parity


def measure(artifact: Artifact, session: Session, golden: Golden) -> Parity:
    """Parity figures of a loaded artifact, without judging them."""
    manifest = artifact.manifest
    found = compute(session.run, manifest.inputs, manifest.outputs, golden.inputs)
    errors = {name: max_relative(found[name], golden.simulation[name]) for name in golden.simulation}
    worst = max(errors, key=lambda name: errors[name])
    first = manifest.outputs[0].name
    return Parity(
        status="checked",
        max_rel=errors[worst] if math.isfinite(errors[worst]) else UNBOUNDED,
        sqnr_db=_least(found, golden.simulation),
        sqnr_original_db=_least(found, golden.original),
        agreement=agreement(found[first], golden.original[first]) if golden.original else None,
        samples=count(manifest.inputs, golden.inputs),
        output=worst,
    )


def beside_original(outputs: Sequence[TensorSpec], golden: Golden) -> Parity:
    """How far a compressed graph is from the original; what exports are checked against is the graph itself."""
    first = outputs[0].name
    return Parity(
        status="not run: exports are checked against it",
        sqnr_original_db=_least(golden.simulation, golden.original),
        agreement=agreement(golden.simulation[first], golden.original[first]),
    )


def _least(found: Arrays, reference: Mapping[str, np.ndarray[Any, Any]]) -> float | None:
    values = [value for name in reference if (value := sqnr_db(found[name], reference[name])) is not None]
    return min(values) if values else None
