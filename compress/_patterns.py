"""Which weights of a layer may be zero together: one by one, N of M, or N output channels sharing a column.

A weight is seen as a matrix per group of channels: output channels × (input channels · taps of the kernel). *Units* are
what is zero together: single weights, or N of them in one column.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

UNSTRUCTURED = "unstructured"
FORMS = f"{UNSTRUCTURED}, N:M such as 2:4, or 1xN such as 1x4"


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros.

    Attributes:
        rows: output channels that share their columns.
        kept, of: so many weights of so many neighbouring input channels may stay; 0 for no such rule.
    """

    rows: int = 1
    kept: int = 0
    of: int = 0

    @classmethod
    def read(cls, word: str) -> Pattern:
        """Raises ValueError for a word that is no pattern."""
        if word == UNSTRUCTURED:
            return cls()
        if (found := re.fullmatch(r"(\d+):(\d+)", word)) and 0 < int(found[1]) < int(found[2]):
            return cls(kept=int(found[1]), of=int(found[2]))
        if (found := re.fullmatch(r"1x(\d+)", word)) and int(found[1]) > 1:
            return cls(rows=int(found[1]))
        raise ValueError(f"pattern is {FORMS}, not {word!r}")

    @property
    def sparsity(self) -> float | None:
        """Share of zeros where the pattern fixes it."""
        return 1 - self.kept / self.of if self.of else None

    def obstacle(self, weight: Tensor, groups: int) -> str | None:
        """Why a weight (outputs, inputs / groups, …) cannot have this pattern; None where it can."""
        if self.of and weight.shape[1] % self.of:
            return f"its {weight.shape[1]} input channels are no multiple of {self.of}"
        if weight.shape[0] // groups % self.rows:
            return f"its {weight.shape[0] // groups} output channels are no multiple of {self.rows}"
        return None

    def columns(self, weight: Tensor) -> Tensor:
        """Order of the columns in which what belongs together stands together: M input channels of one tap."""
        inputs, taps = weight.shape[1], weight[0, 0].numel()
        order = torch.arange(inputs * taps).view(inputs, taps)
        return order.T.flatten() if self.of else order.flatten()

    def units(self, scores: Tensor) -> Tensor:
        """Scores (…, rows, columns) added up over what is zero together: (…, rows / N, columns)."""
        *around, rows, columns = scores.shape
        return scores.reshape(*around, rows // self.rows, self.rows, columns).sum(-2)

    def spread(self, units: Tensor) -> Tensor:
        """A decision for each unit as one for each weight."""
        return units.repeat_interleave(self.rows, -2)

    def lowest(self, scores: Tensor, zeros: int) -> Tensor:
        """Mask of what stays (…, rows, columns) when so many weights with the lowest scores go.

        With N:M the number follows from the pattern, and the columns are in the order of ``columns``.
        """
        if self.of:
            grouped = scores.reshape(*scores.shape[:-1], -1, self.of)
            best = grouped.topk(self.kept, -1).indices
            return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)
        units = self.units(scores)
        order = units.flatten().argsort(stable=True)
        kept = torch.ones(units.numel(), dtype=torch.bool)
        kept[order[: zeros // self.rows]] = False
        return self.spread(kept.view(units.shape))
