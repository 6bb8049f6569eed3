"""What one rounded operator computes beside its float self, and why it differs: the figures and the words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OUTLIER = 8.0  # times the median channel
MISMATCH = 8.0  # between the ranges of two summands
PEAK = 10.0  # largest value of a weight's row over the root mean square of the others
MOSTLY = 0.5  # of a rounding error
DEAD = "dead channel"
NAMED = 8  # channels that a sentence lists
PARTS = ("input", "weight", "result")
WHOSE = {"input": "of what it reads", "result": "of its result"}


@dataclass(eq=False)
class Values:
    """What was seen of one activation, over batches.

    Attributes:
        axis: of its channels.
        around: the range it is rounded in, None where it is not.
    """

    axis: int
    around: tuple[float, float] | None
    count: int = 0
    outside: int = 0
    clipped: float = 0.0
    noise: float = 0.0
    ends: tuple[Tensor, Tensor] | None = None
    rounded: tuple[Tensor, Tensor] | None = None

    def see(self, value: Tensor, rounded: Tensor) -> None:
        self.ends, self.rounded = self._widen(self.ends, value), self._widen(self.rounded, rounded)
        if self.around is None:
            return
        error = (rounded - value).double().square()
        beyond = (value < self.around[0]) | (value > self.around[1])
        self.count += value.numel()
        self.outside += int(beyond.sum())
        self.clipped += float(error[beyond].sum())
        self.noise += float(error.sum())

    def _widen(self, old: tuple[Tensor, Tensor] | None, value: Tensor) -> tuple[Tensor, Tensor]:
        rows = value.movedim(self.axis, 0).flatten(1)
        low, high = rows.amin(1), rows.amax(1)
        return (low, high) if old is None else (torch.minimum(low, old[0]), torch.maximum(high, old[1]))


@dataclass(eq=False)
class Row:
    """One operator.

    Attributes:
        values: what it reads and what it writes, by ``input`` and ``result``.
        weight: before rounding, None for operators without.
        sources: range and name of each summand of a sum.
        signal: energy of its float result.
        noise: energy of the error with all of it rounded, and with each of ``PARTS`` alone.
    """

    node: str
    layer: str
    operator: str
    values: dict[str, Values]
    weight: Tensor | None = None
    sources: tuple[tuple[str, tuple[float, float]], ...] = ()
    signal: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, reference: Tensor, results: Mapping[str, Tensor]) -> None:
        self.signal += float(reference.double().square().sum())
        for what, result in results.items():
            error = float((result - reference).double().square().sum())
            self.noise[what] = self.noise.get(what, 0.0) + error

    @property
    def most(self) -> str:
        """The part whose rounding alone makes the largest error."""
        return max(PARTS, key=lambda part: self.noise.get(part, 0.0))

    def to_json(self) -> dict[str, Any]:
        parts = {f"{part}_db": decibel(self.signal, self.noise[part]) for part in PARTS if part in self.noise}
        return {
            "layer": self.layer, "node": self.node, "operator": self.operator,
            "sqnr_db": decibel(self.signal, self.noise["all"]), **parts, "most_in": self.most,
            "gain_db": None, "causes": self.causes(),
        }  # fmt: skip

    def causes(self) -> list[dict[str, Any]]:
        """What stands out, first what concerns the part that loses most, last what costs nothing but size."""
        worst = self.most
        found = [*self._of_values(), *self._of_weight(), *self._of_sum()]
        return sorted(found, key=lambda cause: (cause["kind"] == DEAD, cause["where"] not in (worst, "sum")))

    def _of_values(self) -> Iterator[dict[str, Any]]:
        for where, seen in self.values.items():
            if seen.ends is not None and seen.around is not None:
                yield from _outlier(where, seen.ends)
                yield from _clipping(where, seen)
        seen = self.values["result"]
        if seen.ends is not None and seen.rounded is not None:
            yield from _constant(seen.ends, seen.rounded)

    def _of_weight(self) -> Iterator[dict[str, Any]]:
        if self.weight is None or self.weight[0].numel() < 3:
            return
        rows = self.weight.flatten(1).double()
        largest = rows.abs().amax(1)
        rest = (rows.square().sum(1) - largest.square()).clamp_min(0) / (rows.shape[1] - 1)
        peaks = torch.where(rest > 0, largest / rest.sqrt().clamp_min(1e-30), 0.0)
        row, ratio = int(peaks.argmax()), float(peaks.max())
        if ratio >= PEAK:
            text = f"one weight of channel {row} is {ratio:.3g}× the root mean square of that channel's others"
            yield {"kind": "weight outlier", "where": "weight", "channel": row, "ratio": ratio, "text": text}

    def _of_sum(self) -> Iterator[dict[str, Any]]:
        reaches = [max(-low, high) for _, (low, high) in self.sources]
        if len(reaches) != 2 or min(reaches) <= 0 or max(reaches) < MISMATCH * min(reaches):
            return
        ratio = max(reaches) / min(reaches)
        small = self.sources[reaches.index(min(reaches))][0]
        text = f"the ranges of its summands differ ×{ratio:.3g}: {small} is small beside the other"
        yield {"kind": "residual mismatch", "where": "sum", "smaller": small, "ratio": ratio, "text": text}


def decibel(signal: float, noise: float) -> float | None:
    """None where there is no difference, or nothing to differ from."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _outlier(where: str, ends: tuple[Tensor, Tensor]) -> Iterator[dict[str, Any]]:
    size = torch.maximum(ends[0].abs(), ends[1].abs())
    alive = size[size > 0]
    if len(alive) < 2:
        return
    channel, ratio = int(size.argmax()), float(size.max() / alive.median())
    if ratio >= OUTLIER:
        text = f"channel {channel} {WHOSE[where]} reaches {ratio:.3g}× the median channel"
        yield {"kind": "outlier channel", "where": where, "channel": channel, "ratio": ratio, "text": text}


def _clipping(where: str, seen: Values) -> Iterator[dict[str, Any]]:
    if seen.noise > 0 and seen.clipped > MOSTLY * seen.noise:
        share, part = seen.outside / seen.count, seen.clipped / seen.noise
        text = f"{100 * share:.3g} % {WHOSE[where]} lies outside its range and makes {100 * part:.0f} % of the error"
        yield {"kind": "clipped range", "where": where, "share": share, "of_error": part, "text": text}


def _constant(ends: tuple[Tensor, Tensor], rounded: tuple[Tensor, Tensor]) -> Iterator[dict[str, Any]]:
    dead = ends[0] == ends[1]
    lost = (rounded[0] == rounded[1]) & ~dead
    for kind, which, what in ((DEAD, dead, "never changes"), ("lost channel", lost, "rounds to one value")):
        if bool(which.any()) and len(which) > 1:
            channels = [int(index) for index in which.nonzero().flatten()]
            text = f"{_listed(channels)} of its result {what}"
            yield {"kind": kind, "where": "result", "channels": channels, "text": text}


def _listed(channels: list[int]) -> str:
    if len(channels) == 1:
        return f"channel {channels[0]}"
    more = f" and {len(channels) - NAMED} more" if len(channels) > NAMED else ""
    return f"each of channels {', '.join(map(str, channels[:NAMED]))}{more}"
