"""Versions of installed packages, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """Version by package name, for edgepack and those of ``packages`` that are installed."""
    found = {name: installed(name) for name in ("edgepack", *packages)}
    return {name: value for name, value in found.items() if value is not None}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
