"""A layer's weight onto its grid: the nearest values, columns in turn, or learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from edgepack.compress._adaround import AdaRound
from edgepack.compress._codebook import look_up, tables_of
from edgepack.compress._gptq import round_in_turn, second_moments
from edgepack.compress._grid import round_to

NEAREST, LEARNED = "nearest", "adaround"


@dataclass(eq=False)
class Rounding:
    """Rounds layers in the order of computation.

    Attributes:
        method: ``nearest``, ``gptq`` or ``adaround``.
        seconds: longest time to learn.
        layers: how many there will be.
        progress: starts a line, given a text and that number.
    """

    method: str
    seconds: float
    layers: int
    progress: Callable[[str, int], Callable[[int], None]]
    learning: AdaRound | None = field(default=None, init=False)

    def round(self, node: fx.Node, reads: Sequence[Tensor], weight: Tensor, scale: Tensor, top: int | Tensor) -> Tensor:
        """The weight's values on the grid, for a layer that reads ``reads``, samples in several parts."""
        moments = None if self.method == NEAREST else second_moments(node, reads, weight)
        if moments is None:
            return round_to(weight, scale, top)
        if self.method != LEARNED:
            return round_in_turn(weight, scale, moments, top)
        if self.learning is None:
            self.learning = AdaRound(self.seconds, self.layers, self.progress("learning to round", self.layers))
        return self.learning.round(weight, scale, moments, top)

    def look_up(self, node: fx.Node, reads: Sequence[Tensor], weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """The weight in values of tables that so many output channels share, and the tables (tables, 16)."""
        moments = None if self.method == NEAREST else second_moments(node, reads, weight)
        tables = tables_of(weight, moments, channels)
        return look_up(weight, tables, moments), tables

    @property
    def notes(self) -> list[str]:
        """What there is to say of it."""
        return [] if self.learning is None else [self.learning.sentence()]
