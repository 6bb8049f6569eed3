"""Where values lie in one piece of memory: those that are needed at the same time beside each other.

Greedy by size (Pisarchyk and Lee, "Efficient memory management for deep neural net inference", arXiv:2001.03288): the
largest value first, each at the lowest place that is free all the while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgepack.export._c_graph import Buffer, Network

ALIGNMENT = 64  # bytes, one cache line and the widest vector
SLACK = 64  # bytes behind the last value: kernels read whole vectors


@dataclass(frozen=True)
class Life:
    """From the step that first writes a value to the last that touches it."""

    first: int
    last: int

    def meets(self, other: Life) -> bool:
        return self.first <= other.last and other.first <= self.last


def lives(network: Network) -> dict[Buffer, Life]:
    """Of every buffer in the arena."""
    found: dict[Buffer, Life] = {}
    for place, step in enumerate(network.steps):
        for buffer in step.buffers():
            if buffer.place == "arena" and buffer.constant is None:
                found[buffer] = Life(found[buffer].first if buffer in found else place, place)
    return found


def plan(network: Network) -> int:
    """Give every buffer its offset; returns the arena's size in bytes."""
    found = lives(network)
    placed: list[Buffer] = []
    order = sorted(found, key=lambda buffer: (-buffer.bytes, found[buffer].first))
    for buffer in order:
        buffer.offset = _lowest(buffer, placed, found)
        placed.append(buffer)
    return max((rounded(buffer.offset + buffer.bytes) for buffer in placed), default=0) + SLACK


def peak(network: Network) -> int:
    """Bytes alive at the busiest step: no plan needs less."""
    found = lives(network)
    steps = range(len(network.steps))
    return max((sum(b.bytes for b, life in found.items() if life.first <= s <= life.last) for s in steps), default=0)


def _lowest(buffer: Buffer, placed: list[Buffer], found: Mapping[Buffer, Life]) -> int:
    offset = 0
    for other in sorted(placed, key=lambda other: other.offset):
        if not found[other].meets(found[buffer]):
            continue
        if offset + buffer.bytes <= other.offset:
            break
        offset = max(offset, rounded(other.offset + other.bytes))
    return offset


def rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
