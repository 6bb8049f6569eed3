"""``activations = "auto"``: of the forms that a format has, the fastest that is close enough to the original.

Both forms are written, proved, compared with the original on the golden samples and timed in one interleaved run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgepack import parts
from edgepack.artifact import Artifact
from edgepack.contracts import INTEGERS, Device, Settings
from edgepack.errors import DeviceError, MissingExtra, Unsupported
from edgepack.parity import beside_original
from edgepack.profiling import profile
from edgepack.progress import Progress

if TYPE_CHECKING:
    from edgepack.measurement import Ratio
    from edgepack.plan import Plan

AUTO = "auto"
FORMS = ("static", "dynamic")  # where nothing can be measured, the first that is close enough
CLOSE_DB = 1.0  # a form is close enough if its SQNR is at most this much below the best …
ENOUGH_DB = 30.0  # … or this high: noise of a thousandth of the signal's power
MAX_SECONDS = 10.0


@dataclass(frozen=True)
class Choice:
    """How activations are rounded in one artifact.

    Attributes:
        form: ``static`` or ``dynamic``.
        note: what was chosen and why, with the figures.
    """

    form: str
    note: str


def undecided(plan: Plan) -> bool:
    """Whether the plan leaves it to the export how activations are rounded."""
    return any(entry.get("activations") == AUTO for entry in plan.nodes.values())


def decided(plan: Plan, form: str) -> Plan:
    """The plan with one form in place of ``auto``."""
    return replace(
        plan,
        nodes={
            name: {**entry, "activations": form} if entry.get("activations") == AUTO else entry
            for name, entry in plan.nodes.items()
        },
    )


def choose(write: Callable[[str], Artifact], progress: Progress) -> Choice:
    """Choose a form for one format and network.

    Args:
        write: writes and proves the artifact of one form.

    Raises:
        Unsupported: the format has none of the forms; says why for the first.
        ParityError: an artifact is not what it was made from.
    """
    found, lacking = _candidates(write)
    if len(found) == 1:
        form = next(iter(found))
        return Choice(form, f"activations = {form!r}, the only form this file can have: {'; '.join(lacking)}")
    levels = {form: _sqnr_db(artifact) for form, artifact in found.items()}
    close = [form for form, level in levels.items() if level >= min(max(levels.values()) - CLOSE_DB, ENOUGH_DB)]
    try:
        ratio = _ratio(list(found.values()), progress)
    except (DeviceError, MissingExtra, Unsupported) as error:
        return Choice(close[0], f"{_chosen(close[0], close, levels)}; by rule, nothing was timed: {error.message}")
    form = _fastest(close, ratio, levels)
    timed = (
        f"dynamic takes {ratio.value:.3f} × the time of static (95 % {ratio.low:.3f} … {ratio.high:.3f}) on this "
        f"machine: {ratio.verdict}"
    )
    return Choice(form, f"{_chosen(form, close, levels)}; {timed}")


def _candidates(write: Callable[[str], Artifact]) -> tuple[dict[str, Artifact], list[str]]:
    """Form → artifact, and why a form is missing."""
    found: dict[str, Artifact] = {}
    reasons: list[Unsupported] = []
    for form in FORMS:
        try:
            artifact = write(form)
        except Unsupported as error:
            reasons.append(error)
            continue
        dialect = artifact.manifest.dialect
        if found and (not dialect.startswith(INTEGERS) or any(dialect == it.manifest.dialect for it in found.values())):
            return found, [f"no layer is computed in another way with activations = {form!r}"]
        found[form] = artifact
    if not found:
        raise reasons[0]
    return found, [error.message for error in reasons]


def _sqnr_db(artifact: Artifact) -> float:
    found = beside_original(artifact.manifest.outputs, artifact.golden()).sqnr_original_db
    return math.inf if found is None else found


def _ratio(artifacts: Sequence[Artifact], progress: Progress) -> Ratio:
    """Latency of the second artifact over the first."""
    device = parts.find(Device, "host")()
    settings = Settings(max_seconds=MAX_SECONDS, cold=False)
    ratio = profile(artifacts, device, None, settings, progress)[1].ratio
    assert ratio is not None  # the second of two contenders always has one
    return ratio


def _fastest(close: Sequence[str], ratio: Ratio, levels: Mapping[str, float]) -> str:
    """Of two forms that are equally fast, or might be, the one closer to the original."""
    if len(close) == 1:
        return close[0]
    static, dynamic = FORMS
    return {"faster": dynamic, "slower": static}.get(ratio.verdict) or max(close, key=lambda form: levels[form])


def _chosen(form: str, close: Sequence[str], levels: Mapping[str, float]) -> str:
    figures = ", ".join(f"{name} {level:.1f} dB" for name, level in levels.items())
    far = [name for name in levels if name not in close]
    dropped = f", too far is {far[0]}" if far else ""
    return f"activations = {form!r}; to the original: {figures}{dropped}"
