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
from edgepack.errors import MissingExtra, ParityError, Unsupported
from edgepack.samples import Array, compute, count

UNBOUNDED = 1e300  # JSON has no infinity
FLOAT_LIMIT = 1e-4  # max|a−b| / max|b| of a float artifact against its simulation


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


def runtime_for(format_name: str) -> Runtime:
    """The first engine that reads a format and is installed here.

    Raises:
        Unsupported: no engine of edgepack reads it.
        MissingExtra: none of those that do is installed.
    """
    missing: MissingExtra | None = None
    for name in parts.names(Runtime):
        cls = parts.find(Runtime, name)
        if format_name not in cls.formats:
            continue
        runtime = cls()
        try:
            runtime.version()
        except MissingExtra as error:
            missing = missing or error
            continue
        return runtime
    raise missing or Unsupported(f"no engine here reads {format_name!r}", "edgepack list shows engines and formats")


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
    if parity.max_rel is None or parity.max_rel > FLOAT_LIMIT:
        amount = (
            "without bound" if parity.max_rel in (None, UNBOUNDED) else f"by {parity.max_rel:.2g} of its largest value"
        )
        raise ParityError(
            f"{artifact.manifest.format} {artifact.manifest.name!r}: output {parity.output!r} differs from its "
            f"simulation {amount} (limit {FLOAT_LIMIT:g}) on {parity.runtime}",
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
