"""docs/memory.md from the stored results of memory.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from _stored import Results


def text(stored: Mapping[str, Any]) -> str:
    lines = ["| network | calibration images of 224×224 | peak memory | largest while | libraries and weights alone |",
             "| --- " * 5 + "|"]  # fmt: skip
    for row in stored.get("peaks", []):
        pieces = row["pieces"]
        where = max(pieces, key=pieces.get)
        lines.append(f"| {row['network']} | {row['images']:,} | {row['peak_bytes'] / 2**30:.2f} GiB | {where} "
                     f"| {pieces['loading'] / 2**30:.2f} GiB |")  # fmt: skip
    facts = stored.get("facts", {})
    return (
        "# Memory of eight-bit compression\n\nWritten by `python benchmarks/memory.py` from "
        "`benchmarks/results/memory.json`; do not edit.\n\n`edgepack.compress` with `quantize` and its defaults, one "
        "fresh process per row: the highest resident memory, interpreter, libraries and weights included. Random "
        "weights; pictures are read from their files, batch by batch, and start again when they end.\n\n"
        + "\n".join(lines)
        + f"\n\nVersions: {', '.join(f'{k} {v}' for k, v in facts.get('versions', {}).items())}; "
        f"{facts.get('machine', '')}.\n"
    )


RESULTS = Results.of("memory", text, "network", "images")
