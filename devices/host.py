"""This machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgepack import parity, parts, statistics
from edgepack.artifact import Parity
from edgepack.contracts import Contender, Device, Session, Settings
from edgepack.devices import _cold, _energy, _facts, _measure
from edgepack.devices._measure import Timing
from edgepack.errors import DeviceError, InputError, ParityError
from edgepack.measurement import Energy, Profile
from edgepack.samples import take

PARITY_LIMIT = 1e-3
TIMING_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class Host(Device):
    """The machine edgepack runs on.

    Attributes:
        affinity: cores to measure on, such as (2, 3); None for all that this process may use.
    """

    affinity: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.affinity is None:
            return
        cores = tuple(self.affinity)
        if not cores or len(set(cores)) < len(cores) or any(not isinstance(c, int) or c < 0 for c in cores):
            raise ValueError(f"affinity is a list of different core numbers, not {self.affinity!r}")
        object.__setattr__(self, "affinity", cores)

    def facts(self) -> dict[str, str]:
        """Name, processor, cores, memory, system … of this machine."""
        return _facts.facts()

    def measure(
        self,
        contenders: Sequence[Contender],
        settings: Settings,
        progress: Callable[[float], None] | None = None,
    ) -> list[Profile]:
        """Time all contenders in one interleaved run, in this process; ratios are against the first.

        Raises:
            InputError: no contender, two of one label, or too few instances for a ratio.
            ParityError: an artifact does not reproduce its golden answers; nothing is timed.
            DeviceError: a core of ``affinity`` is not available, or a fresh process cannot be started.
        """
        _refuse(contenders, settings)
        with _pinned(self.affinity), ExitStack() as stack:
            before = _facts.Surroundings.now()
            arms = [_load(contender, settings, stack) for contender in contenders]
            share = TIMING_SHARE if settings.cold else 1.0
            report = None if progress is None else lambda done: progress(share * done)
            timing = _measure.interleave(arms, settings, report)
            conditions = {**_conditions(timing, settings), **before.until_now()}
            energies = _energy.energies([arm[0] for arm in arms], settings, _energy.meters())
            stack.close()
            colds = _colds(contenders, settings, progress)
            device = self.facts()
        return [
            _profile(index, contenders, timing, settings, (energies[index], colds[index], conditions, device))
            for index in range(len(contenders))
        ]


def _refuse(contenders: Sequence[Contender], settings: Settings) -> None:
    labels = [contender.label for contender in contenders]
    if not labels or len(set(labels)) < len(labels):
        raise InputError(f"a measurement needs contenders with different labels, not {labels}")
    if settings.instances < (1 if len(labels) == 1 else 2):
        raise InputError(
            f"{settings.instances} engine instances per artifact give no interval", "use instances = 5, at least 2"
        )
    if not settings.max_seconds > 0 or settings.threads < 1:
        raise InputError(f"max_seconds and threads must be positive, not {settings.max_seconds} and {settings.threads}")


@contextmanager
def _pinned(cores: tuple[int, ...] | None) -> Iterator[None]:
    if cores is None:
        yield
        return
    before = _facts.available_cores()
    if not hasattr(os, "sched_setaffinity") or not set(cores) <= set(before):
        raise DeviceError(f"affinity {list(cores)} cannot be set here", f"cores of this process: {list(before)}")
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _load(contender: Contender, settings: Settings, stack: ExitStack) -> list[Callable[[], object]]:
    """One call per engine instance, on the first golden sample; checked before anything is timed."""
    golden = contender.artifact.golden()
    inputs = take(contender.artifact.manifest.inputs, golden.inputs, 0, 1)
    sessions: list[Session] = []
    for _ in range(settings.instances):
        session = contender.runtime.load(contender.artifact, settings.threads)
        stack.callback(session.close)
        if not sessions:
            _check(contender, parity.measure(contender.artifact, session, golden))
        sessions.append(session)
    return [partial(session.run, inputs) for session in sessions]


def _check(contender: Contender, found: Parity) -> None:
    """A wrong artifact is never timed. Integer artifacts may be as far off as when they were accepted."""
    accepted, error = contender.artifact.manifest.parity, found.max_rel
    limit = max(PARITY_LIMIT, contender.runtime.limit(contender.artifact))
    if accepted.status == "checked" and accepted.max_rel is not None:
        limit = max(limit, 2 * accepted.max_rel)
    if accepted.least_db is not None and found.sqnr_db is not None and found.sqnr_db >= accepted.least_db:
        return  # now and then a value falls to the other side of a rounding limit
    if error is None or not error <= limit:
        raise ParityError(
            f"{contender.label}: {contender.artifact.folder} differs from its golden answers by {error:.2g} of the "
            f"largest value (limit {limit:.2g}) on {parts.name_of(contender.runtime)}, so it was not timed",
            "edgepack verify shows each output; export again",
        )


def _conditions(timing: Timing, settings: Settings) -> dict[str, Any]:
    return {
        "state": timing.state,
        "slow_share": round(timing.slow_share, 4),
        "blocks": timing.rounds,
        "instances": settings.instances,
        "seconds": round(timing.seconds, 3),
        "warm_up_seconds": round(timing.warm_up_s, 3),
        "warm_up_steady": timing.steady,
        "lead_in": timing.lead_in,
        "canary_floor_us": round(1e6 * timing.canary_floor_s, 2),
        "threads": settings.threads,
        "tolerance": settings.tolerance,
        "half_width": settings.half_width,
        "order_seed": settings.seed,
        "cores": list(_facts.available_cores()),
        "input": "first golden sample",
        "binding": "python run",
    }


def _profile(
    index: int,
    contenders: Sequence[Contender],
    timing: Timing,
    settings: Settings,
    rest: tuple[Energy, _cold.Cold | None, dict[str, Any], dict[str, str]],
) -> Profile:
    contender, (energy, cold, conditions, device) = contenders[index], rest
    ratio = _measure.ratio(timing, index, contenders[0].label, settings) if index else None
    floors_ms = [1e3 * statistics.floor(row) for row in timing.medians_s[index]]
    own = {
        "floor_ms": statistics.geometric_mean(floors_ms),
        "runs_per_block": timing.runs_per_block[index],
        "contention_sensitive": ratio is not None and _measure.contention_sensitive(ratio, settings.tolerance),
        "enough_blocks": timing.rounds >= _measure.LEAST_BLOCKS,
    }
    return Profile(
        label=contender.label,
        artifact=str(contender.artifact.folder),
        latency_ms=statistics.latency(1e3 * timing.runs_s[index]),
        ratio=ratio,
        load_ms=cold.load_ms if cold else None,
        first_ms=cold.first_ms if cold else None,
        peak_bytes=cold.peak_bytes if cold else None,
        energy=energy,
        device=device,
        runtime=f"{parts.name_of(contender.runtime)} {contender.runtime.version()}",
        threads=settings.threads,
        conditions={**conditions, **own},
        checked=True,
    )


def _colds(
    contenders: Sequence[Contender], settings: Settings, progress: Callable[[float], None] | None
) -> list[_cold.Cold | None]:
    if not settings.cold:
        return [None for _ in contenders]
    colds: list[_cold.Cold | None] = []
    for contender in contenders:
        colds.append(_cold.start_cold(contender, settings.threads))
        if progress is not None:
            progress(TIMING_SHARE + (1 - TIMING_SHARE) * len(colds) / len(contenders))
    return colds
