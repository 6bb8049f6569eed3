"""The command line as a function, for every test that calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgepack import _console, cli

pytest.register_assert_rewrite("_folding", "_lifting", "_reading", "_tflite_files")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edgepack(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process: exit status, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        _console.screen.cache_clear()
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        found = capfd.readouterr()
        return int(stop.value.code or 0), found.out, found.err

    return run
