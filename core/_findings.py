"""What passes found out, as the report shows it: one function for each finding that has a section of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgepack._axes import axis, place, ticks

LAYERS = 40  # of a table that is longer in the JSON document
Values = Mapping[str, Any]


def findings(compressed: Values | None) -> dict[str, dict[str, Any] | None]:
    """By name, what the template shows of each finding; None where no pass recorded it."""
    steps = [] if compressed is None else compressed["manifest"]["history"]
    recorded = {name: values for step in steps for name, values in step.get("findings", {}).items()}
    return {name: show(recorded[name]) if name in recorded else None for name, show in SHOWN.items()}


def _sensitivity(found: Values) -> dict[str, Any]:
    """Where rounding loses, worst layer first; bars of what each layer costs the outputs."""
    scale = ticks(0.0, max([row["gain_db"] or 0.0 for row in found["layers"]] + [1.0]), count=3)
    rows = [{**row, "to": place(row["gain_db"] or 0.0, 0, scale[-1])} for row in found["layers"][:LAYERS]]
    return {**found, "rows": rows, "more": len(found["layers"]) - len(rows), "axis": axis(scale)}


def _mixed(found: Values) -> dict[str, Any]:
    """The best mixtures of widths by size, and which one the layers have."""
    rows = [{**row, "chosen": row["layers"] == found["chosen"]["layers"]} for row in found["table"]]
    if not any(row["chosen"] for row in rows):
        rows = sorted([*rows, {**found["chosen"], "chosen": True}], key=lambda row: float(row["size_ratio"]))
    return {**found, "table": rows, "widths": list(found["chosen"]["layers"])}


def _tokens(found: Values) -> dict[str, Any]:
    """What a cut in the number of tokens keeps, block by block; bars of the attention that the kept ones hold."""
    rows = [{**row, "to": place(row["attentiveness"], 0, 1)} for row in found["blocks"]]
    if isinstance(found["keep_rate"], list):  # one for each cut
        found = {**found, "keep_rate": ", ".join(map(str, found["keep_rate"]))}
    return {**found, "rows": rows, "axis": axis([0.0, 0.25, 0.5, 0.75, 1.0])}


def _factors(found: Values) -> dict[str, Any]:
    """Layers as chains: rank, error, and times where the forms were timed; the choice by energy beside them."""
    rivals = found.get("by_energy", {}).get("layers", {})
    rows = [
        {**row, "ranks": "×".join(map(str, row["ranks"])), "energy": rivals.get(row["layer"]),
         "times": [row["ms"].get(target) for target in found["targets"]]}
        for row in found["layers"]
    ]  # fmt: skip
    return {**found, "rows": rows[:LAYERS], "more": len(rows) - len(rows[:LAYERS])}


def _products(found: Values) -> dict[str, Any]:
    """Convolutions that were trained as products, and how each is written."""
    rows = [{**row, "ranks": "×".join(map(str, row["ranks"]))} for row in found["layers"]]
    return {**found, "rows": rows[:LAYERS], "more": len(rows) - len(rows[:LAYERS])}


def _binary(found: Values) -> dict[str, Any]:
    """Binary layers and their trees."""
    rows = [{"layer": path, **row} for path, row in found["layers"].items()]
    return {**found, "rows": rows[:LAYERS], "more": len(rows) - len(rows[:LAYERS])}


def _filters(found: Values) -> dict[str, Any]:
    """What the filters of 3 × 3 convolutions are like; bars of how varied they are beside random ones."""
    rows = [{**row, "to": place(min(row["against_random"], 1.0), 0, 1)} for row in found["rows"]]
    return {"rows": rows, "axis": axis([0.0, 0.25, 0.5, 0.75, 1.0])}


SHOWN: Mapping[str, Callable[[Values], dict[str, Any]]] = {
    "sensitivity": _sensitivity, "mixed": _mixed, "tokens": _tokens, "factors": _factors, "products": _products,
    "binarize": _binary, "filters": _filters,
}  # fmt: skip
