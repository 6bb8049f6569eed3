"""Results of a benchmark: rows of its stages in one JSON file, and the page that is written from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.artifact import write_text

ROOT = Path(__file__).resolve().parent.parent
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """Where a benchmark keeps what it saw.

    Attributes:
        stored: JSON: stage → rows, and ``facts`` of the machine that gave them.
        page: Markdown, written anew with each row.
        text: the page, of what is stored.
        same: rows of a stage that have the same of these are one; the newest stays.
    """

    stored: Path
    page: Path
    text: Callable[[Row], str]
    same: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, text: Callable[[Row], str], *same: str) -> Results:
        return cls(ROOT / "benchmarks" / "results" / f"{name}.json", ROOT / "docs" / f"{name}.md", text, same)

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stored.read_text(encoding="utf-8")) if self.stored.exists() else {}
        return found

    def store(self, stage: str, row: Row, facts: Row) -> None:
        """Put a row in place of its like, and write the page."""
        same = [name for name in self.same if name in row]
        old = [item for item in self.read().get(stage, []) if any(item[name] != row[name] for name in same)]
        self.put(stage, sorted([*old, row], key=lambda item: [item[name] for name in same]), facts)

    def put(self, stage: str, rows: Sequence[Row], facts: Row) -> None:
        """All rows of a stage, and the page."""
        found = _plain({**self.read(), stage: rows, "facts": facts})
        write_text(self.stored, json.dumps(found, indent=1, allow_nan=False) + "\n")
        self.rewrite()

    def rewrite(self) -> None:
        write_text(self.page, self.text(self.read()))


def _plain(value: Any) -> Any:
    """Without what was not measured."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
