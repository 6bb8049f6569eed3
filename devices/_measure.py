"""The one timing loop: blocks of every engine instance of every contender, interleaved in random order.

Interleaving removes drift; floors (low quantiles of block medians) remove contention, which slows contenders by
different factors; several instances give the interval its unit. The clock and the canary can be replaced, so the
loop itself is tested in virtual time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgepack.collector import without_collection
from edgepack.contracts import Settings
from edgepack.measurement import Ratio
from edgepack.statistics import Interval, floor, floor_ratio, mean_interval, verdict

Call = Callable[[], object]
Arm = Sequence[Call]

LEAST_BLOCKS = 20
LEAST_S = 5.0  # a neighbour's slow spell lasts up to seconds; a run that fits into one has no floor
SLOW = 1.12
CONTENDED_SHARE = 0.30
STEADY = 0.02
LEAD_IN_BELOW_S = 0.03
BLOCK_S = (0.001, 0.010)


@dataclass(frozen=True)
class Tools:
    """What the loop touches of the world.

    Attributes:
        clock: seconds, only rising.
        canary: a fixed piece of work whose time shows interference.
    """

    clock: Callable[[], float] = time.perf_counter
    canary: Call = field(default_factory=lambda: matmul_canary())


@dataclass(frozen=True)
class Timing:
    """What one interleaved run saw.

    Attributes:
        runs_s: per arm, seconds of all single inferences.
        medians_s: per arm, block medians, shape (instances, rounds).
        canary_s: canary before each block, shape (all instances, rounds).
        runs_per_block: per arm.
        lead_in: an untimed run stands before each block (brings the instance back into the caches).
        seconds: of the interleaved rounds.
        warm_up_s: before them.
        steady: warm-up ended because times had settled.
        reached: the stopping rule was met before the time was over.
    """

    runs_s: tuple[NDArray[np.float64], ...]
    medians_s: tuple[NDArray[np.float64], ...]
    canary_s: NDArray[np.float64]
    runs_per_block: tuple[int, ...]
    lead_in: bool
    seconds: float
    warm_up_s: float
    steady: bool
    reached: bool

    @property
    def rounds(self) -> int:
        return int(self.canary_s.shape[1])

    @property
    def canary_floor_s(self) -> float:
        return floor(self.canary_s.ravel())

    def slow_blocks(self, arm: int) -> NDArray[np.bool_]:
        """Which blocks of an arm ran in a disturbed moment, shape (instances, rounds)."""
        medians = self.medians_s[arm]
        start = sum(len(other) for other in self.medians_s[:arm])
        canary = self.canary_s[start : start + len(medians)]
        floors = np.array([[floor(row)] for row in medians])
        return np.asarray((medians > SLOW * floors) | (canary > SLOW * self.canary_floor_s))

    @property
    def slow_share(self) -> float:
        return float(np.mean(np.concatenate([self.slow_blocks(arm).ravel() for arm in range(len(self.medians_s))])))

    @property
    def state(self) -> str:
        """``contended``, ``settled`` or ``not reached``."""
        if self.slow_share > CONTENDED_SHARE:
            return "contended"
        return "settled" if self.reached else "not reached"


def matmul_canary() -> Call:
    """Eight small float32 matrix products: vector units, one thread, a tenth of a millisecond or less."""
    one, other = np.full((60, 60), 0.5, np.float32), np.full((60, 60), 0.25, np.float32)
    out = np.empty_like(one)

    def canary() -> None:
        for _ in range(8):
            np.matmul(one, other, out=out)

    return canary


def interleave(
    arms: Sequence[Arm],
    settings: Settings,
    progress: Callable[[float], None] | None = None,
    tools: Tools | None = None,
) -> Timing:
    """Time the arms against each other; an arm is one call per engine instance, the first arm is the reference."""
    tools = tools or Tools()
    begin = tools.clock()
    with without_collection():
        warm = _warm_up(arms, settings, tools.clock)
        start = tools.clock()
        blocks = _Blocks.plan(arms, warm, settings, tools)
        order = np.random.default_rng(settings.seed)
        reached = False
        while not reached:
            blocks.round(order)
            elapsed = tools.clock() - begin
            if progress is not None:
                progress(min(1.0, max(elapsed / settings.max_seconds, min(0.9, 0.9 * blocks.rounds / LEAST_BLOCKS))))
            if blocks.rounds >= LEAST_BLOCKS and tools.clock() - start >= min(LEAST_S, 0.2 * settings.max_seconds):
                reached = _widest(blocks.medians()) < settings.half_width
            if elapsed >= settings.max_seconds:
                break
    return blocks.timing(start - begin, tools.clock() - start, warm.steady, reached)


def ratio(timing: Timing, arm: int, against: str, settings: Settings) -> Ratio:
    """Latency of an arm over that of the first, with its verdict."""
    interval = _ratio_of_floors(timing.medians_s[arm], timing.medians_s[0])
    enough = timing.rounds >= LEAST_BLOCKS
    word = verdict(interval, settings.tolerance) if enough else "cannot tell"
    return Ratio(*interval, against, word, _typical(timing.medians_s[arm], timing.medians_s[0]))


def contention_sensitive(ratio: Ratio, tolerance: float) -> bool:
    """Undisturbed and typical ratio differ by more than the tolerance: interference changes the comparison."""
    return abs(math.log(ratio.typical / ratio.value)) > math.log1p(tolerance)


def _ratio_of_floors(medians: NDArray[np.float64], against: NDArray[np.float64]) -> Interval:
    return floor_ratio([floor(row) for row in medians], [floor(row) for row in against])


def _typical(medians: NDArray[np.float64], against: NDArray[np.float64]) -> float:
    logs = [np.log(np.median(side, axis=1)).mean() for side in (medians, against)]
    return float(np.exp(logs[0] - logs[1]))


def _widest(medians: Sequence[NDArray[np.float64]]) -> float:
    """Largest half-width of the ratios; of one arm alone, that of its own floors (0 with a single instance)."""
    if len(medians) == 1:
        logs = mean_interval([math.log(floor(row)) for row in medians[0]])
        return logs.high - logs.value if len(medians[0]) > 1 else 0.0
    return max(_ratio_of_floors(other, medians[0]).half_width for other in medians[1:])


def _block(call: Call, runs: int, clock: Callable[[], float]) -> list[float]:
    seconds = []
    for _ in range(runs):
        start = clock()
        call()
        seconds.append(clock() - start)
    return seconds


class _Warm(NamedTuple):
    """Seconds of one run per arm, how much longer it took by the wall clock, and whether times had settled."""

    run_s: list[float]
    stretch: float
    steady: bool


def _warm_up(arms: Sequence[Arm], settings: Settings, clock: Callable[[], float]) -> _Warm:
    """Run everything until the last three rounds agree within 2 %, or for 15 % of the time."""
    begin = clock()
    least_s, most_s = min(0.5, 0.05 * settings.max_seconds), min(30.0, 0.15 * settings.max_seconds)
    history: list[list[float]] = [[] for _ in arms]
    done, runs = [0] * len(arms), [1] * len(arms)
    block_s = least_s / 4 / sum(len(arm) for arm in arms)  # so that three agreeing rounds span most of least_s
    while True:
        for index, arm in enumerate(arms):
            medians = [float(np.median(_block(call, runs[index], clock))) for call in arm]
            done[index] += runs[index] * len(arm)
            history[index].append(float(np.median(medians)))
            runs[index] = max(1, round(block_s / max(history[index][-1], 1e-9)))
        elapsed = clock() - begin
        steady = all(len(seen) >= 3 and max(seen[-3:]) <= (1 + STEADY) * min(seen[-3:]) for seen in history)
        if (steady and elapsed >= least_s and min(done) >= 10) or elapsed >= most_s:
            run_s = [min(seen[-3:]) for seen in history]
            busy_s = sum(count * seconds for count, seconds in zip(done, run_s, strict=True))
            return _Warm(run_s, max(1.0, elapsed / busy_s), steady)


@dataclass
class _Blocks:
    """The rounds so far. ``slots`` are all (arm, instance) pairs."""

    arms: Sequence[Arm]
    runs: tuple[int, ...]
    lead_in: bool
    tools: Tools
    slots: list[tuple[int, int]]
    seconds: list[list[list[float]]]
    middles: list[list[float]]
    canaries: list[list[float]]

    @classmethod
    def plan(cls, arms: Sequence[Arm], warm: _Warm, settings: Settings, tools: Tools) -> _Blocks:
        """Choose block lengths: 10 ms of work, less when the time would not suffice for enough blocks."""
        slots = [(arm, instance) for arm, calls in enumerate(arms) for instance in range(len(calls))]
        shortest, longest = BLOCK_S
        share_s = 0.25 * settings.max_seconds / (LEAST_BLOCKS * len(slots)) / warm.stretch
        block_s, run_s = min(longest, max(shortest, share_s)), warm.run_s
        # near-equal arms take equally many runs: medians of unequal counts have unequal low quantiles
        near = [run_s[0] if 0.5 < seconds / run_s[0] < 2 else seconds for seconds in run_s]
        runs = tuple(max(1, round(block_s / max(seconds, 1e-9))) for seconds in near)
        lead_in = min(run_s) < LEAD_IN_BELOW_S
        return cls(arms, runs, lead_in, tools, slots, [[] for _ in slots], [[] for _ in slots], [[] for _ in slots])

    @property
    def rounds(self) -> int:
        return len(self.canaries[0])

    def round(self, order: np.random.Generator) -> None:
        """One block of every instance, in random order, each after a canary."""
        clock, canary = self.tools.clock, self.tools.canary
        for slot in order.permutation(len(self.slots)):
            arm, instance = self.slots[slot]
            canary()
            self.canaries[slot] += _block(canary, 1, clock)
            call = self.arms[arm][instance]
            if self.lead_in:
                call()
            self.seconds[slot].append(_block(call, self.runs[arm], clock))
            self.middles[slot].append(float(np.median(self.seconds[slot][-1])))

    def medians(self) -> tuple[NDArray[np.float64], ...]:
        return tuple(self._by_arm([np.array(row) for row in self.middles]))

    def timing(self, warm_up_s: float, seconds: float, steady: bool, reached: bool) -> Timing:
        runs = tuple(np.concatenate(part, axis=None) for part in self._by_arm([np.array(s) for s in self.seconds]))
        return Timing(
            runs, self.medians(), np.array(self.canaries), self.runs, self.lead_in, seconds, warm_up_s, steady, reached
        )

    def _by_arm(self, rows: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return [
            np.array([row for row, (owner, _) in zip(rows, self.slots, strict=True) if owner == arm])
            for arm in range(len(self.arms))
        ]
