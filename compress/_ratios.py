"""Budgets as shares of what the network cost before: what options may say."""

from __future__ import annotations

from collections.abc import Collection, Mapping

Ratio = float | Mapping[str, float] | None
LATENCY = "latency_ratio"


def check_ratios(given: Mapping[str, Ratio], targets: Collection[str]) -> None:
    """Raises ValueError for a share that is none, and for a latency budget that nothing measures."""
    for name, ratio in given.items():
        for value in ratio.values() if isinstance(ratio, Mapping) else [ratio]:
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is above 0 and at most 1, not {value!r}")
    latency = given[LATENCY]
    if isinstance(latency, Mapping) and (strange := set(latency) - set(targets)):
        raise ValueError(f"{LATENCY} names {', '.join(sorted(strange))}, which is not among targets")
    if latency is not None and not targets:
        raise ValueError(f"{LATENCY} is measured: name a format in targets")


def by_target(ratio: Ratio, targets: Collection[str]) -> dict[str, float]:
    """The budget of each target that has one."""
    if ratio is None:
        return {}
    return dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(targets, ratio)
