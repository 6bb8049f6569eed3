"""A dialect as the stored probe of this machine wants it."""

from __future__ import annotations

from dataclasses import replace

from edgepack.export._integer_dialect import Dialect
from edgepack.probing import digest, known


def probed(dialect: Dialect, engine: str, form: str) -> tuple[Dialect, list[str]]:
    """The dialect without operators that the engine computes slower in integers, and the sentence that says so."""
    mark = digest(engine)
    if mark is None:
        return dialect, []
    found = {word: known(engine, word.removesuffix("_"), form) for word in sorted(dialect.integer)}
    slower = {word for word, probe in found.items() if probe is not None and probe.slower}
    left = f": slower in integers are {', '.join(sorted({word.removesuffix('_') for word in slower}))}"
    note = f"operators without weights were chosen by probe {mark} of this machine{left if slower else ''}"
    return replace(dialect, integer=dialect.integer - slower), [note]
