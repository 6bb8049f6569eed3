"""Rounding up or down learned for all weights of a layer at once.

After M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv:2004.10568): every weight
is ``scale · (floor + h)`` with h between 0 and 1, moved so that the layer's result stays, while a term that grows
pulls each h to one of its ends. What the layer reads is known by its second moments H alone:

    ‖(W − W')·x‖² summed over all x  =  Σ over rows of δ·H·δᵀ,    δ = a row of W − W'

so a step costs one product with H, however many samples there were. Rows do not depend on each other: each takes the
best of what was learned, of columns in turn and of the nearest values, and then single steps of its weights, the one
that gains most first, until none gains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgepack.compress._gptq import round_in_turn
from edgepack.compress._grid import laid_out, round_to, spread
from edgepack.errors import counted

STEPS = 1000
RATE = 0.02
STRETCH, BELOW = 1.1, -0.1  # ends of the sigmoid before it is clipped to 0 … 1
PULL = 4.0  # of the ends, beside an error of the result that is 1 for the nearest values
FREE = 0.2  # of all steps, without a pull
ROUNDS = 4  # steps per weight of a row, at most
LEAST_GAIN = 1e-9  # of what a step costs by itself; less is rounding
STEEPEST, FLATTEST = 20.0, 2.0  # exponents of the pull, first and last


@dataclass(eq=False)
class AdaRound:
    """Learns layer after layer within a time.

    Attributes:
        seconds: for all layers.
        layers: how many there will be.
        step: told of each.
        cut: layers for which the time did not suffice.
        ratios: of each layer's error to that of columns in turn.
    """

    seconds: float
    layers: int
    step: Callable[[int], None]
    cut: int = 0
    ratios: list[float] = field(default_factory=list)
    _left: float = field(init=False)

    def __post_init__(self) -> None:
        self._left = self.seconds

    def round(self, weight: Tensor, scale: Tensor, moments: Tensor, top: int | Tensor) -> Tensor:
        """Values on the grid, as ``round_in_turn`` gives them, each row with at most the error that has there."""
        began = time.monotonic()
        share = self._left / max(self.layers - len(self.ratios), 1)
        tries = [round_to(weight, scale, top), round_in_turn(weight, scale, moments, top)]
        found, whole = _learned(weight, scale, moments, top, began + share)
        tries.append(found)
        errors = torch.stack([row_errors(weight, one, moments) for one in tries])
        best = errors.argmin(0)
        chosen = settled(weight, torch.stack(tries)[best, torch.arange(len(weight))], scale, moments, top)
        before, after = errors[1].sum(), row_errors(weight, chosen, moments).sum()
        self.ratios.append(float(after / before) if before > 0 else 1.0)
        self.cut += not whole
        self._left -= time.monotonic() - began
        self.step(1)
        return chosen

    def sentence(self) -> str:
        """What was gained, for the report."""
        gained = sum(self.ratios) / max(len(self.ratios), 1)
        cut = f"; {self.seconds:g} s did not suffice for {self.cut} of them" if self.cut else ""
        layers = counted(len(self.ratios), "layer")
        return f"learned to round {layers}: {gained:.2f} of the error that columns in turn have{cut}"


def row_errors(weight: Tensor, rounded: Tensor, moments: Tensor) -> Tensor:
    """δ·H·δᵀ of every row, float64."""
    groups, columns = moments.shape[:2]
    apart = (rounded - weight).detach().double().reshape(groups, -1, columns)
    return ((apart @ moments) * apart).sum(2).flatten()


def settled(weight: Tensor, rounded: Tensor, scale: Tensor, moments: Tensor, top: int | Tensor) -> Tensor:
    """Where no step of a single weight to the next value on its grid lowers the error of its row any more."""
    groups, columns = moments.shape[:2]
    steps = spread(scale, weight).double().expand_as(weight).reshape(groups, -1, columns)
    exact = weight.detach().double().reshape(groups, -1, columns)
    whole = (rounded.double().reshape(groups, -1, columns) / steps).round()
    most = laid_out(top, weight, moments)
    slope = 2 * steps * ((whole * steps - exact) @ moments)
    bend = steps.square() * moments.diagonal(dim1=1, dim2=2)[:, None]
    group = torch.arange(groups)[:, None]
    for _ in range(ROUNDS * columns):
        changes = torch.where(whole.abs() < most, bend - slope.abs(), torch.inf)
        inward = (whole.abs() == most) & (slope * whole > 0)
        changes = torch.where(inward, bend - slope.abs(), changes)
        gain, column = changes.min(2)
        moving = gain < -LEAST_GAIN * bend.gather(2, column[..., None])[..., 0]
        if not bool(moving.any()):
            break
        place = column[..., None]
        step = -slope.gather(2, place).sign() * moving[..., None]
        whole.scatter_add_(2, place, step)
        slope += 2 * steps * step * steps.gather(2, place) * moments[group, column]
    return (whole.reshape(weight.shape)).to(weight.dtype) * spread(scale, weight)


def _learned(weight: Tensor, scale: Tensor, moments: Tensor, top: int | Tensor, deadline: float) -> tuple[Tensor, bool]:
    """What is learned until the deadline, and whether that was all."""
    groups, columns = moments.shape[:2]
    steps = spread(scale, weight).expand_as(weight).reshape(groups, -1, columns).float()
    exact = weight.detach().float().reshape(groups, -1, columns) / steps
    floor, most = exact.floor(), laid_out(top, weight, moments)
    nearest = row_errors(weight, round_to(weight, scale, top), moments).view(groups, -1, 1).clamp_min(1e-300)
    scaled = moments.float(), (steps.double().square() * columns / nearest).float()  # rows are of one size then
    hidden = torch.logit((exact - floor - BELOW) / (STRETCH - BELOW)).requires_grad_()
    optimizer = torch.optim.Adam([hidden], RATE)
    whole = True
    with torch.enable_grad():
        for number in range(STEPS):
            if time.monotonic() > deadline:
                whole = False
                break
            up = (torch.sigmoid(hidden) * (STRETCH - BELOW) + BELOW).clamp(0, 1)
            error = (floor + up).clamp(-most, most) - exact
            optimizer.zero_grad()
            (_moved(error, *scaled) + _pull(up, number / STEPS)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    up = (torch.sigmoid(hidden.detach()) > 0.5).float()
    integers = (floor + up).clamp(-most, most).reshape(weight.shape)
    return integers.to(weight.dtype) * spread(scale, weight), whole


def _moved(error: Tensor, moments: Tensor, factor: Tensor) -> Tensor:
    """Something whose gradient is that of Σ factor · error·H·errorᵀ, without a second product."""
    return 2 * (error * ((error.detach() @ moments) * factor)).sum()


def _pull(up: Tensor, share: float) -> Tensor:
    """λ · Σ (1 − |2h − 1|^β), β falling; nothing in the first steps."""
    if share < FREE:
        return up.new_zeros(())
    exponent = FLATTEST + 0.5 * (STEEPEST - FLATTEST) * (1 + _cosine((share - FREE) / (1 - FREE)))
    return PULL * (1 - (2 * up - 1).abs().pow(exponent)).sum()


def _cosine(share: float) -> float:
    return float(torch.cos(torch.tensor(share * torch.pi)))
