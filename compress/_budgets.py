"""Budgets of a whole network, and the forms that keep them with the least error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgepack.compress._knapsack import choose
from edgepack.compress._spots import Option, Spot
from edgepack.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """A limit on what the network may cost.

    Attributes:
        ratio: largest cost over that of the network before.
        whole: that cost, layers that cannot be factored included.
        costs: of each form of each layer, the dense one first.
    """

    name: str
    ratio: float
    whole: float
    costs: Sequence[Sequence[float]]

    @property
    def limit(self) -> float:
        """What the layers may cost together."""
        return sum(layer[0] for layer in self.costs) - (1 - self.ratio) * self.whole

    def predicted(self, indices: Sequence[int]) -> float:
        """The network's cost over that before, with these forms."""
        saved = sum(layer[0] - layer[index] for layer, index in zip(self.costs, indices, strict=True))
        return 1 - saved / self.whole


def meet(spots: Sequence[Spot], budgets: Sequence[Budget]) -> list[Option]:
    """The form of each layer. Raises BudgetError where no choice keeps every budget."""
    errors = [[option.error for option in spot.options] for spot in spots]
    found = choose(errors, [budget.costs for budget in budgets], [budget.limit for budget in budgets])
    if found is None:
        raise BudgetError(f"factorize: {_missed(budgets)}", "a larger ratio, method = 'auto' or a smaller multiple")
    for spot, index in zip(spots, found, strict=True):
        if index == 0 and not spot.why:
            spot.why = "the budget is kept without it"
    return [spot.options[index] for spot, index in zip(spots, found, strict=True)]


def _missed(budgets: Sequence[Budget]) -> str:
    least = [(budget, budget.predicted([layer.index(min(layer)) for layer in budget.costs])) for budget in budgets]
    missed = [f"{budget.name} {budget.ratio:g} cannot be reached: the cheapest forms give {ratio:.3f}"
              for budget, ratio in least if ratio > budget.ratio]  # fmt: skip
    return "; ".join(missed) or f"no choice keeps {' and '.join(budget.name for budget in budgets)} together"
