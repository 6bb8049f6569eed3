"""A machine in virtual time, on noise like that of a shared one: nothing here waits for a real clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from edgepack.devices._measure import Tools

INSTANCE_OFFSET = 0.007
MIXED = (0.6, 0.4)
Call = Callable[[], None]


class World:
    """A machine with a neighbour: virtual seconds, and a slow state that comes and goes."""

    def __init__(self, seed: int, dwell_s: tuple[float, float] = MIXED) -> None:
        self.random = np.random.default_rng(seed)
        self.dwell_s = dwell_s
        self.slow = bool(self.random.random() < dwell_s[1] / sum(dwell_s))
        self.now = 0.0
        self.change = 0.0 if dwell_s[1] else np.inf
        self.jitter = self._jitter()

    def _jitter(self) -> Iterator[float]:
        while True:  # mostly tight, with the long right tail of real run times
            yield from 1 + 0.004 * self.random.exponential(1.0, 4096)

    def clock(self) -> float:
        return self.now

    def spend(self, seconds: float, slow_factor: float) -> None:
        if self.now >= self.change:
            self.slow = not self.slow
            self.change = self.now + self.random.exponential(self.dwell_s[self.slow])
        self.now += seconds * (slow_factor if self.slow else 1.0) * next(self.jitter)

    def arm(self, seconds: float, slow_factor: float, instances: int = 5) -> list[Call]:
        offsets = 1 + INSTANCE_OFFSET * self.random.uniform(-1, 1, instances)
        return [partial(self.spend, seconds * offset, slow_factor) for offset in offsets]

    def tools(self) -> Tools:
        return Tools(self.clock, lambda: self.spend(1e-4, 1.3))
