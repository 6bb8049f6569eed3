"""The command line as a function, for every test that calls it; nothing stored on this machine changes a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgepack import _console, cli

pytest.register_assert_rewrite("_folding", "_lifting", "_reading", "_tflite_files")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder: exporters would follow what a probe of this machine stored in the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


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
