"""Which formats are measured where their engine cannot run."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgepack import profiling
from edgepack.contracts import Runtime, Settings
from edgepack.errors import DeviceError, MissingExtra
from edgepack.progress import Silent


class Engine:
    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason

    def untimed(self) -> str | None:
        return self.reason


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Formats of each measurement; ``onnx`` runs, ``coreml`` is interpreted, ``tensorrt`` lacks its package."""
    seen: list[list[str]] = []

    def open_(folder: Path) -> Any:
        return SimpleNamespace(folder=folder, manifest=SimpleNamespace(format=folder.name))

    def runtime_for(name: str, proof: bool = True) -> Any:
        assert not proof
        if name == "tensorrt":
            raise MissingExtra("the package 'tensorrt' is not installed")
        return Engine("it is interpreted" if name == "coreml" else None)

    def profile(artifacts: list[Any], *rest: Any) -> list[str]:
        seen.append([artifact.manifest.format for artifact in artifacts])
        return seen[-1]

    monkeypatch.setattr(profiling, "Artifact", SimpleNamespace(open=open_))
    monkeypatch.setattr(profiling, "runtime_for", runtime_for)
    monkeypatch.setattr(profiling, "profile", profile)
    return seen


def run(out: Path, *names: str, runtime: Runtime | None = None) -> None:
    device: Any = None
    profiling.profile_out(out, names, device, runtime, Settings(), Silent())


def test_formats_without_an_engine_here_are_left_out_aloud(
    measured: list[list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(tmp_path, "onnx", "coreml", "tensorrt")
    assert measured == [["onnx"]]
    assert "coreml is not measured: it is interpreted" in caplog.text
    assert "tensorrt is not measured: the package 'tensorrt' is not installed" in caplog.text


@pytest.mark.parametrize("name, kind", [("coreml", DeviceError), ("tensorrt", MissingExtra)])
def test_with_nothing_left_to_measure_the_reason_is_an_error(
    measured: list[list[str]], tmp_path: Path, name: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        run(tmp_path, name)
    assert measured == []
