"""What is installed and what works here: packages and extras, the machine, energy meters, known mismatches."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from edgepack import parts
from edgepack.contracts import Device, Exporter, Meter, Packager, Part, Pass, Runtime
from edgepack.errors import DeviceError, EdgepackError, MissingExtra
from edgepack.versions import installed

KINDS: Mapping[str, type[Part]] = {
    "passes": Pass,
    "exporters": Exporter,
    "runtimes": Runtime,
    "devices": Device,
    "meters": Meter,
    "packagers": Packager,
}
PEOPLE_EXTRAS = ("all", "dev")


@dataclass(frozen=True)
class Extra:
    """One optional set of packages.

    Attributes:
        packages: version by package name, None where it is not installed.
        install: the command that installs what is missing, None when all is there.
    """

    name: str
    packages: Mapping[str, str | None]
    install: str | None


@dataclass(frozen=True)
class MeterState:
    """One energy meter.

    Attributes:
        reason: why it does not work here, None when it does.
    """

    name: str
    scope: str
    reason: str | None


@dataclass(frozen=True)
class PartState:
    """One part as ``edgepack list`` shows it.

    Attributes:
        missing: what must be installed before it works here, None when it works.
    """

    kind: str
    name: str
    summary: str
    missing: str | None


@dataclass(frozen=True)
class Checkup:
    """Everything ``edgepack doctor`` tells.

    Attributes:
        core: version by package that edgepack cannot do without.
        machine: facts of this machine, by name.
        problems: known mismatches between installed packages, one sentence each, with what to do.
    """

    core: Mapping[str, str | None]
    extras: tuple[Extra, ...]
    machine: Mapping[str, str]
    meters: tuple[MeterState, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def checkup() -> Checkup:
    """Look at this environment; imports no optional package, takes a second at most."""
    needs = requirements()
    core = {name: installed(name) for name in ("edgepack", *needs.get("", ()))}
    extras = tuple(_extra(name, packages) for name, packages in needs.items() if name and name not in PEOPLE_EXTRAS)
    return Checkup(core, extras, _machine(), _meters(), tuple(_problems()))


def requirements() -> dict[str, tuple[str, ...]]:
    """Package names by extra, ``""`` for those always needed, as the installed edgepack declares them."""
    try:
        lines = requires("edgepack") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {"": []}
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        marker = re.search(r"""extra == ['"]([^'"]+)['"]""", line)
        packages = found.setdefault(marker.group(1) if marker else "", [])
        if name and name.group() != "edgepack":
            packages.append(name.group())
    return {extra: tuple(packages) for extra, packages in found.items()}


def part_states(kinds: Sequence[str] = tuple(KINDS)) -> list[PartState]:
    """Every part of these kinds that edgepack ships, and whether it works here."""
    return [_state(kind, name) for kind in kinds for name in parts.names(KINDS[kind])]


def _state(kind: str, name: str) -> PartState:
    cls = parts.find(KINDS[kind], name)
    return PartState(kind, name, parts.summary(cls), _missing(cls, name))


def _missing(cls: type[Part], name: str) -> str | None:
    if issubclass(cls, Runtime):
        return _engine_missing(cls)
    if issubclass(cls, Meter):
        return cls().check()
    extra = "compress" if issubclass(cls, Pass) else name
    return _extra(extra, requirements().get(extra, ())).install


def _engine_missing(cls: type[Runtime]) -> str | None:
    try:
        cls().version()
    except MissingExtra as error:
        return error.hint or error.message
    except DeviceError as error:
        return error.message
    return None


def _extra(name: str, packages: Sequence[str]) -> Extra:
    found = {package: installed(package) for package in packages}
    return Extra(name, found, None if all(found.values()) else f"pip install 'edgepack[{name}]'")


def _machine() -> dict[str, str]:
    facts = {"python": f"{platform.python_version()} ({sys.executable})"}
    try:
        return facts | parts.find(Device, "host")().facts()
    except EdgepackError as error:
        return facts | {"system": platform.platform(), "host": error.message}


def _meters() -> tuple[MeterState, ...]:
    classes = [(name, parts.find(Meter, name)) for name in parts.names(Meter)]
    return tuple(MeterState(name, cls.scope, cls().check()) for name, cls in classes)


def _problems() -> list[str]:
    torch, vision = installed("torch"), installed("torchvision")
    if vision and not torch:
        return ["torchvision is installed without torch: pip install 'edgepack[compress]'"]
    if vision and torch and "+cpu" in torch and "+cpu" not in vision:
        return [
            f"torchvision {vision} is built for CUDA and torch {torch} is not: networks of torchvision and timm load "
            "(edgepack defines the missing operators), torchvision's own operators such as NMS do not run; "
            "nothing to do unless you need them"
        ]
    return []
