"""Energy of processor packages, as Intel and AMD processors count it themselves (RAPL through Linux powercap)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgepack.contracts import Meter
from edgepack.errors import MeasurementError

MICRO = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rapl(Meter):
    """Joules of all processor packages, the vendor's own counter.

    It sees the whole package: other programs and idle power are in it. On many processors it is a model inside the
    chip rather than a measurement; use it for ratios on one machine (Desrochers et al., MEMSYS 2016).

    Attributes:
        root: powercap folder.
    """

    scope: ClassVar[str] = "cpu-package"

    root: str = "/sys/class/powercap"

    def __post_init__(self) -> None:
        if not self.root:
            raise ValueError("root is the powercap folder, not empty")
        object.__setattr__(self, "_seen", {})

    def check(self) -> str | None:
        """None when every package counter can be read, else why not."""
        if not Path(self.root).is_dir():
            return f"{self.root} does not exist (no RAPL here; virtual machines rarely have it)"
        packages = self._packages()
        if not packages:
            return f"{self.root} holds no processor package"
        for package in packages:
            try:
                _number(package / "energy_uj")
            except PermissionError:
                return f"{package / 'energy_uj'} is readable by root only"
            except (OSError, ValueError) as error:
                return f"{package / 'energy_uj'} cannot be read: {error}"
        return None

    def joules(self) -> float:
        """The counters of all packages together, unwrapped since this object's first reading.

        A counter wraps after minutes to an hour; a single wrap between two readings is seen, more are not.

        Raises:
            MeasurementError: a counter is gone or cannot be read.
        """
        seen: dict[Path, tuple[int, int]] = vars(self)["_seen"]
        packages = self._packages()
        if not packages:
            raise MeasurementError(f"the RAPL counters under {self.root} are gone")
        for package in packages:
            try:
                now = _number(package / "energy_uj")
                last, total = seen.get(package, (now, now))
                wrap = _number(package / "max_energy_range_uj") + 1 if now < last else 0
            except (OSError, ValueError) as error:
                raise MeasurementError(f"{package}: the RAPL counter cannot be read: {error}") from error
            seen[package] = (now, total + now - last + wrap)
        return MICRO * sum(seen[package][1] for package in packages)

    def _packages(self) -> list[Path]:
        """Top-level package domains; cores and DRAM below them would be counted twice or mean something else."""
        found = []
        for zone in sorted(Path(self.root).glob("*-rapl:*")):
            name = zone / "name"
            if zone.name.count(":") == 1 and name.is_file() and name.read_text(encoding="ascii").startswith("package"):
                found.append(zone)
        return found


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
