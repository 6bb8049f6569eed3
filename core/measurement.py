"""What a measurement says: latency, ratio, energy, profile. Plain values that go into profiles/*.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Latency:
    """Milliseconds of single inferences; p99 is None below 662 samples, p90 below 64 (LoadGen's bounds)."""

    p50: float
    p90: float | None
    p99: float | None
    mean: float
    min: float
    n: int


@dataclass(frozen=True)
class Ratio:
    """Latency of one contender over another, from one interleaved run: below 1 is faster.

    Attributes:
        value: ratio of floors (10 % quantile of block medians), geometric mean over engine instances.
        low, high: 95 % Welch interval on the log floors of the engine instances.
        against: label of the denominator.
        verdict: ``faster``, ``slower``, ``same`` or ``cannot tell``, against 1 ± tolerance.
        typical: ratio of medians, which contention moves.
    """

    value: float
    low: float
    high: float
    against: str
    verdict: str
    typical: float


@dataclass(frozen=True)
class Energy:
    """Joules per inference, tagged with where the number comes from.

    Attributes:
        kind: ``measured``, ``estimated`` or ``unavailable``.
        reason: why it is unavailable.
    """

    kind: str
    joules: float | None = None
    low: float | None = None
    high: float | None = None
    meter: str | None = None
    scope: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Profile:
    """One contender on one device.

    Attributes:
        label: the contender's.
        load_ms, first_ms: in fresh processes, medians; None when not asked for.
        peak_bytes: peak resident memory of the fresh process.
        conditions: load, canary, slow share, blocks, instances, state (``settled``, ``not reached``, ``contended``) …
        checked: the artifact equalled its golden outputs before it was timed.
    """

    label: str
    artifact: str
    latency_ms: Latency
    ratio: Ratio | None
    load_ms: float | None
    first_ms: float | None
    peak_bytes: int | None
    energy: Energy
    device: dict[str, str]
    runtime: str
    threads: int
    conditions: dict[str, Any] = field(default_factory=dict)
    checked: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
