"""Energy per inference: windows of one contender at a time, in random order, read off the first meter that works."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from edgepack import parts
from edgepack.contracts import Meter, Settings
from edgepack.measurement import Energy
from edgepack.statistics import mean_interval

WINDOWS = 5
WINDOW_S = 2.0


def meters() -> list[Meter]:
    """Every meter edgepack knows, with default options."""
    return [parts.find(Meter, name)() for name in parts.names(Meter)]


def energies(
    calls: Sequence[Callable[[], object]],
    settings: Settings,
    candidates: Sequence[Meter],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Energy]:
    """Joules per inference of each call (whatever else runs in the meter's scope included), or why there are none."""
    reasons = []
    for meter in candidates:
        reason = meter.check()
        if reason is None:
            return _measured(calls, settings, meter, clock)
        reasons.append(f"{parts.name_of(meter)}: {reason}")
    unavailable = Energy("unavailable", reason="; ".join(reasons) or "no meter is known for this device")
    return [unavailable for _ in calls]


def _measured(
    calls: Sequence[Callable[[], object]], settings: Settings, meter: Meter, clock: Callable[[], float]
) -> list[Energy]:
    joules: list[list[float]] = [[] for _ in calls]
    order = np.random.default_rng(settings.seed)
    for _ in range(WINDOWS):
        for index in order.permutation(len(calls)):
            joules[index].append(_window(calls[index], meter, clock))
    found = []
    for values in joules:
        mean = mean_interval(values)
        found.append(
            Energy("measured", mean.value, max(0.0, mean.low), mean.high, parts.name_of(meter), type(meter).scope)
        )
    return found


def _window(call: Callable[[], object], meter: Meter, clock: Callable[[], float]) -> float:
    """Joules per run over a window of at least two seconds."""
    call()
    before, start, runs = meter.joules(), clock(), 0
    while clock() - start < WINDOW_S:
        call()
        runs += 1
    return (meter.joules() - before) / runs
