"""Weights of 4 bits whose values come from tables of 16, found by k-means.

Steps of a grid are evenly spaced; weights are not: most are small. A table puts its values where the weights are, each
weight counting as much as what it multiplies varies. 0 is in every table, so that zeros stay zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgepack.compress._gptq import in_turn

ENTRIES = 16
ROUNDS = 60  # of k-means; it has settled by then
STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # from evenly spaced values to as many weights for each; the best end is taken


def sharing(rows: int, channels: int) -> int:
    """How many of a weight's output channels share a table: all of a few, else as many as divide them."""
    return rows if rows <= channels else math.gcd(rows, channels)


def tables_of(weight: Tensor, moments: Tensor | None, channels: int) -> Tensor:
    """Tables of ascending values, exact in 16 bits: (tables, 16).

    Args:
        moments: (groups, columns, columns) of what the layer reads; None: every weight counts the same.
        channels: that share a table.
    """
    count = len(weight) // sharing(len(weight), channels)
    values = weight.detach().double().reshape(count, -1)
    shares = _shares(weight, moments).reshape(count, -1)
    spaced = torch.linspace(0, 1, ENTRIES, dtype=torch.float64)
    low, high = (end[:, None].clamp(most, least) for end, most, least in
                 ((values.amin(1), None, 0.0), (values.amax(1), 0.0, None)))  # fmt: skip
    even, dense = low + (high - low) * spaced, values.quantile(spaced, 1).T
    tries = [_settled(values, shares, even + part * (dense - even)) for part in STARTS]
    errors = torch.stack([error for _, error in tries])
    return torch.stack([table for table, _ in tries])[errors.argmin(0), torch.arange(count)]


def look_up(weight: Tensor, tables: Tensor, moments: Tensor | None) -> Tensor:
    """The weight in values of its tables: the nearest, or with ``moments`` columns in turn; float32."""
    own = tables.double().repeat_interleave(len(weight) // len(tables), 0)  # (rows, 16)
    if moments is None:
        return _nearest(own, weight.detach().double().flatten(1)).view_as(weight).float()

    def nearest(_: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        found = _nearest(own, wanted.reshape(-1, 1)).view_as(wanted)
        return found, found

    return in_turn(weight, moments, nearest).float()


def tabled_words(tables: int, channels: int | None) -> str:
    """How many layers have tables, as part of a sentence."""
    return "" if channels is None else f", {tables} with a table of {ENTRIES} values per {channels} channels"


def _shares(weight: Tensor, moments: Tensor | None) -> Tensor:
    """How much each weight counts: the second moment of what it multiplies."""
    if moments is None:
        return torch.ones_like(weight, dtype=torch.float64)
    squares = moments.diagonal(dim1=1, dim2=2)
    squares = squares + 1e-3 * squares.mean() + 1e-30  # columns that read zeros still have weights
    return squares.repeat_interleave(len(weight) // len(moments), 0)


def _settled(values: Tensor, shares: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Tables after k-means from ``start``, and the error of each."""
    table, zero = start.clone(), start.abs().argmin(1, keepdim=True)
    for _ in range(ROUNDS):
        table.scatter_(1, zero, 0.0)
        places = _places(table, values)
        weights = torch.zeros_like(table).scatter_add_(1, places, shares)
        sums = torch.zeros_like(table).scatter_add_(1, places, shares * values)
        table = torch.where(weights > 0, sums / weights, table)
    half = table.scatter(1, zero, 0.0).half().double()
    table = torch.where(half.isfinite(), half, table).float()
    return table, (shares * (_nearest(table.double(), values) - values).square()).sum(1)


def _nearest(tables: Tensor, values: Tensor) -> Tensor:
    """Of each row of values, the nearest in its row of tables."""
    return tables.gather(1, _places(tables, values))


def _places(tables: Tensor, values: Tensor) -> Tensor:
    return torch.searchsorted((tables[:, 1:] + tables[:, :-1]) / 2, values.contiguous())
