"""Tests that compile: left out, and said so, where there is no C compiler. ``make test`` does not start without one."""

from __future__ import annotations

import shutil

import pytest


def needs_compiler() -> None:
    """Skip the test that calls this, or the whole module."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt-get install gcc", allow_module_level=True)
