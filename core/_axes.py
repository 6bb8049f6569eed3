"""Positions on the axes of the report's charts, in per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

TICKS = 5


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers that cover ``low`` to ``high``.

    Example: 0.31 and 0.87 give 0.2, 0.4, 0.6, 0.8, 1.0.
    """
    span = high - low if high > low else max(abs(high), 1.0) * 0.1
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def place(value: float, low: float, high: float) -> float:
    """Position in per cent, two decimals, kept inside the strip."""
    return round(min(max(100 * (value - low) / (high - low), 0.0), 100.0), 2)


def axis(values: Sequence[float]) -> list[dict[str, Any]]:
    """Marks at round numbers, the first and the last at the ends."""
    return [{"at": place(value, values[0], values[-1]), "text": f"{value:g}"} for value in values]
