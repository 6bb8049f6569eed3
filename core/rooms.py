"""Rooms that share their name with a verb can be called: ``edgepack.compress`` is a package and a function."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallableRoom(ModuleType):
    """A package whose call is the verb of the same name in ``edgepack.api``."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from edgepack import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(package: str) -> None:
    """Turn an imported package into a CallableRoom."""
    sys.modules[package].__class__ = CallableRoom
