"""``activations = "auto"``: of the forms that a format has, the fastest that is close enough to the original.

Both forms are written, proved, compared with the original on the golden samples and timed in interleaved runs, until
it is certain which is faster or the time is over.
"""

from __future__ import annotations

import math
import time
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
from edgepack.statistics import Interval, verdict

if TYPE_CHECKING:
    from edgepack.plan import Plan

AUTO = "auto"
FORMS = ("static", "dynamic")  # where nothing can be measured, the first that is close enough
CLOSE_DB = 1.0  # a form is close enough if its SQNR is at most this much below the best …
ENOUGH_DB = 30.0  # … or this high: noise of a thousandth of the signal's power
RUN_SECONDS = 6.0  # longer than most slow spells of a shared machine
LEAST_RUNS = 3
MAX_SECONDS = 60.0


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


def choose(write: Callable[[str], Artifact], progress: Progress, clock: Callable[[], float] = time.monotonic) -> Choice:
    """Choose a form for one format and network.

    Args:
        write: writes and proves the artifact of one form.
        clock: seconds, only rising.

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
        race = _race(list(found.values()), progress, clock)
    except (DeviceError, MissingExtra, Unsupported) as error:
        return Choice(close[0], f"{_chosen(close[0], close, levels)}; by rule, nothing was timed: {error.message}")
    form = _fastest(close, race.verdict, levels)
    return Choice(form, f"{_chosen(form, close, levels)}; {race}")


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


@dataclass(frozen=True)
class _Race:
    """What repeated runs say of two forms.

    Interference only slows, for a while and one form more than another. The lowest floor of a form is what it takes
    undisturbed as soon as another run has come as low; until then its second lowest says by how much that may be off.

    Attributes:
        static_ms, dynamic_ms: floors of each run.
    """

    static_ms: Sequence[float]
    dynamic_ms: Sequence[float]

    @property
    def ratio(self) -> Interval:
        """Latency of dynamic over static."""
        (static, other), (dynamic, another) = (
            sorted([*row, math.inf])[:2] for row in (self.static_ms, self.dynamic_ms)
        )
        return Interval(dynamic / static, dynamic / other, another / static)

    @property
    def verdict(self) -> str:
        if len(self.static_ms) < LEAST_RUNS:
            return "cannot tell"
        return verdict(self.ratio, Settings.tolerance)

    def __str__(self) -> str:
        runs = f"{len(self.static_ms)} runs" if len(self.static_ms) > 1 else "one run"
        value, low, high = self.ratio
        figures = f"{value:.3f} × the time of static (floors of {runs}: {low:.3f} … {high:.3f})"
        ended = f"{self.verdict}, so the one closer to the original" if self.verdict == "cannot tell" else self.verdict
        return f"dynamic takes {figures} on this machine: {ended}"


def _race(artifacts: Sequence[Artifact], progress: Progress, clock: Callable[[], float]) -> _Race:
    """Time two forms beside each other until runs agree which is faster, or the time is over."""
    device = parts.find(Device, "host")()
    floors_ms: list[list[float]] = []
    began = clock()
    while True:
        settings = Settings(instances=3, max_seconds=RUN_SECONDS, cold=False, seed=len(floors_ms))
        profiles = profile(artifacts, device, None, settings, progress)
        floors_ms.append([float(one.conditions["floor_ms"]) for one in profiles])
        race = _Race(*zip(*floors_ms, strict=True))
        if race.verdict != "cannot tell" or clock() - began >= MAX_SECONDS:
            return race


def _fastest(close: Sequence[str], verdict: str, levels: Mapping[str, float]) -> str:
    """Of two forms that are equally fast, or might be, the one closer to the original."""
    if len(close) == 1:
        return close[0]
    static, dynamic = FORMS
    return {"faster": dynamic, "slower": static}.get(verdict) or max(close, key=lambda form: levels[form])


def _chosen(form: str, close: Sequence[str], levels: Mapping[str, float]) -> str:
    figures = ", ".join(f"{name} {level:.1f} dB" for name, level in levels.items())
    far = [name for name in levels if name not in close]
    dropped = f", too far is {far[0]}" if far else ""
    return f"activations = {form!r}; to the original: {figures}{dropped}"
