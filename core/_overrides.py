"""``--set KEY=VALUE``: a change of one place of a recipe's table."""

from __future__ import annotations

import tomllib
from typing import Any

from edgepack.errors import InputError, nearest
from edgepack.sheet import Table


def override_in(table: Table, override: str) -> None:
    """Change the table as ``compress.quantize.bits=4`` says; list entries go by index, ``use`` or ``name``."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise InputError(f"--set {override!r} is not key=value", "for example --set compress.fold.leave='[\"head\"]'")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    place: Any = table
    for word in path:
        place = _step(place, word, override)
    if isinstance(place, list):
        raise InputError(
            f"--set {override!r}: {'.'.join(path)!r} is a list; what can be set is an option of an entry",
            f"--set {key}.OPTION=VALUE",
        )
    if not isinstance(place, dict):
        raise InputError(f"--set {override!r}: {'.'.join(path)!r} is not a table")
    place[last] = value


def _step(place: Any, word: str, override: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(word, {})
    if isinstance(place, list):
        named = [e for i, e in enumerate(place) if word in (str(i), e.get("name") or e.get("use"))]
        entries = named if len(named) == 1 else [e for e in place if e.get("use") == word]
        if len(entries) == 1:
            return entries[0]
        words = sorted({str(e.get("name") or e.get("use")) for e in place} | {str(i) for i in range(len(place))})
        if not entries:
            raise InputError(f"--set {override!r}: no entry {word!r}", nearest(word, words))
        raise InputError(f"--set {override!r}: {len(entries)} entries {word!r}", f"say which: {', '.join(words)}")
    raise InputError(f"--set {override!r}: {word!r} is not a table")
