"""The parity proof: an artifact against its golden answers, number by number. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgepack import parts
from edgepack.artifact import Artifact, Golden, Parity
from edgepack.contracts import INTEGERS, Arrays, Graph, Runtime, Session, TensorSpec
from edgepack.errors import DeviceError, InputError, MissingExtra, ParityError, Unsupported
from edgepack.samples import Array, compute, count, pick, take

UNBOUNDED = 1e300  # JSON has no infinity
INTEGER_DB = 45.0  # an integer artifact against its simulation: SQNR at least this …
ROUNDING_DB = 6.0  # … or this much under what rounding alone does to the simulation …
STEP_SHARE = 1e-3  # … or one step apart on at most this share of the elements
STEPS = 256  # values that an output on an 8-bit grid can have


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
        found = _answers(artifact, session, golden)
    finally:
        session.close()
    parity = replace(_figures(artifact, found, golden), runtime=f"{parts.name_of(runtime)} {runtime.version()}")
    fault = _fault(artifact, runtime, parity, found, golden.simulation)
    if fault is not None and (tied := _tied(artifact, runtime, found, golden)):
        parity, fault = _without(tied, artifact, runtime, parity, found, golden)
    if fault is not None:
        raise ParityError(
            f"{artifact.manifest.format} {artifact.manifest.name!r}: output {parity.output!r} differs from its "
            f"simulation {fault} on {parity.runtime}",
            "the artifact was not kept" if artifact.folder.name.startswith(".") else "export again",
        )
    return parity


def _tied(artifact: Artifact, runtime: Runtime, found: Arrays, golden: Golden) -> list[int]:
    """Samples that differ, on which a choice is nearer to a tie than the artifact's numbers must be exact."""
    if golden.margins is None:
        return []
    integers = artifact.manifest.dialect.startswith(INTEGERS)
    noise = 10 ** (-(artifact.manifest.parity.least_db or INTEGER_DB) / 20) if integers else runtime.limit(artifact)
    outputs = artifact.manifest.outputs
    near = [int(number) for number in np.flatnonzero(golden.margins <= noise)]

    def differs(number: int) -> bool:
        one, other = (take(outputs, values, number, number + 1) for values in (found, golden.simulation))
        return any(max_relative(one[name], other[name]) > noise for name in golden.simulation)

    return [number for number in near if differs(number)]


def _without(
    tied: Sequence[int], artifact: Artifact, runtime: Runtime, parity: Parity, found: Arrays, golden: Golden
) -> tuple[Parity, str | None]:
    """The figures and the fault of the samples that are not tied; at least one must be left to tell."""
    manifest = artifact.manifest
    others = [number for number in range(parity.samples) if number not in tied]
    if not others:
        return parity, "on every golden sample, all of them ties within its noise, so none can tell more"
    outputs = {spec.name for spec in manifest.outputs}
    specs = tuple(spec for spec in manifest.outputs if spec.name in golden.original) if golden.original else ()
    rest = Golden(
        pick(manifest.inputs, golden.inputs, others), pick(specs, golden.original, others) if specs else {},
        pick(manifest.outputs, golden.simulation, others), golden.margins,
    )  # fmt: skip
    kept = pick(manifest.outputs, {name: found[name] for name in outputs}, others)
    figures = replace(_figures(artifact, kept, rest), runtime=parity.runtime, tied=tuple(tied))
    return figures, _fault(artifact, runtime, figures, kept, rest.simulation)


def _fault(artifact: Artifact, runtime: Runtime, parity: Parity, found: Arrays, simulation: Arrays) -> str | None:
    """By how much too much an artifact differs, None where it is within the limit of its dialect."""
    if not artifact.manifest.dialect.startswith(INTEGERS):
        limit = runtime.limit(artifact)
        if parity.max_rel is not None and parity.max_rel <= limit:
            return None
        return f"{_amount(parity)} (limit {limit:g})"
    least = artifact.manifest.parity.least_db or INTEGER_DB
    if all(same_integers(found[name], simulation[name], least) for name in simulation):
        return None
    kept = "" if parity.sqnr_db is None else f", SQNR {parity.sqnr_db:.1f} dB"
    return f"{_amount(parity)}{kept} (this network keeps {least:.1f} dB)"


def _amount(parity: Parity) -> str:
    return "without bound" if parity.max_rel in (None, UNBOUNDED) else f"by {parity.max_rel:.2g} of its largest value"


def least_db(simulation: Arrays, nudged: Arrays) -> float:
    """The SQNR that an integer artifact must keep.

    45 dB; less for a network in which single values that round the other way grow until the outputs move more.

    Args:
        simulation, nudged: the simulation's answers, and again with a unit or two in the last place of float32 added
            before each rounding.
    """
    own = _least(nudged, simulation)
    return INTEGER_DB if own is None else min(INTEGER_DB, own - ROUNDING_DB)


def least_of(simulation: Graph, golden: Golden) -> float | None:
    """What an integer artifact with this simulation must keep; None for float artifacts."""
    from edgepack.graph import nudged, run_graph

    if not simulation.dialect.startswith(INTEGERS):
        return None
    return least_db(golden.simulation, run_graph(nudged(simulation), golden.inputs))


def same_integers(value: Array, reference: Array, least_db: float = INTEGER_DB) -> bool:
    """Whether an output of an integer artifact is that of its simulation.

    Engines add in integers and round once, the simulation adds in float32: now and then a value falls to the other
    side of a rounding limit, and what follows moves with it.
    """
    if max_relative(value, reference) in (0.0, math.inf):
        return np.array_equal(value, reference)
    found = sqnr_db(value, reference)
    if found is not None and found >= least_db:
        return True
    levels = np.unique(reference)
    if not 2 <= levels.size <= STEPS:
        return False
    apart = np.abs(value.astype(np.float64) - reference)
    one = float(np.diff(levels.astype(np.float64)).min()) * (1 + 1e-3)
    return float(apart.max()) <= one and float((apart > 0).mean()) <= STEP_SHARE


def measure(artifact: Artifact, session: Session, golden: Golden) -> Parity:
    """Parity figures of a loaded artifact, without judging them."""
    return _figures(artifact, _answers(artifact, session, golden), golden)


def _answers(artifact: Artifact, session: Session, golden: Golden) -> dict[str, Array]:
    return compute(session.run, artifact.manifest.inputs, artifact.manifest.outputs, golden.inputs)


def _figures(artifact: Artifact, found: Arrays, golden: Golden) -> Parity:
    manifest = artifact.manifest
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
        least_db=manifest.parity.least_db,
        margin=None if golden.margins is None else float(golden.margins.min()),
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
