"""Artifact folders: whole or absent, hashed, never half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepack import artifact as artifacts
from edgepack.artifact import Artifact, Golden, Manifest, describe_files, recover, replacing
from edgepack.contracts import Preprocessing, TensorSpec
from edgepack.errors import InputError, IntegrityError, StorageError

SPEC = TensorSpec("x", "float32", ("batch", 3), None)


def write(folder: Path, text: str = "weights") -> Artifact:
    with replacing(folder) as temporary:
        (temporary / "model.bin").write_text(text)
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        Golden({"x": x}, {"y": x}, {"y": x}).save(temporary / "golden.npz")
        manifest = Manifest("test", "a", "float32", (SPEC,), (SPEC,), describe_files(temporary))
        manifest = replace(manifest, preprocessing={"x": Preprocessing(255.0, (0.5,), (0.25,))}, labels=("cat", "dog"))
        (temporary / "artifact.json").write_text(manifest.to_json())
    return Artifact.open(folder)


def test_a_manifest_survives_the_round_trip(tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    assert Artifact.open(tmp_path / "a").manifest == artifact.manifest
    assert artifact.manifest.preprocessing["x"].mean == (0.5,)
    assert artifact.size_bytes == len("weights")
    np.testing.assert_array_equal(artifact.golden().inputs["x"], np.arange(6, dtype=np.float32).reshape(2, 3))


def test_a_second_write_replaces_the_first_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    assert write(tmp_path / "a", "new").file(".bin").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_inside_keeps_the_old_artifact(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")

    def fail() -> None:
        with replacing(tmp_path / "a") as temporary:
            (temporary / "model.bin").write_text("half")
            raise RuntimeError("converter died")

    with pytest.raises(RuntimeError, match="converter died"):
        fail()
    assert Artifact.open(tmp_path / "a").file(".bin").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_the_exchange_call_the_old_one_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_exchange", lambda one, other: False)
    write(tmp_path / "a", "old")
    assert write(tmp_path / "a", "new").file(".bin").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_set_aside_artifact_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / ".a.old")
    assert Artifact.open(tmp_path / "a").file(".bin").read_text() == "old"


def test_kill_in_the_middle_keeps_the_old_artifact(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    program = f"""
        import os, signal
        from pathlib import Path
        from edgepack.artifact import replacing
        with replacing(Path({str(tmp_path / "a")!r})) as temporary:
            (temporary / "model.bin").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert Artifact.open(tmp_path / "a").file(".bin").read_text() == "old"
    recover(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    path = artifact.file(".bin")
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"model\.bin was changed: its SHA-256"):
        Artifact.open(tmp_path / "a").check_hashes()


def test_a_missing_or_truncated_file_is_found_on_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "a").file(".bin")
    path.write_text("w")
    with pytest.raises(IntegrityError, match="has 1 bytes, its manifest says 7"):
        Artifact.open(tmp_path / "a")
    path.unlink()
    with pytest.raises(IntegrityError, match=r"model\.bin is missing"):
        Artifact.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not an edgepack artifact manifest"),
        ("[]", "not an edgepack"),
        ("5", "not an edgepack"),
        ("[" * 100000, "not an edgepack"),
    ],
)
def test_a_damaged_manifest_is_wrong_input(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "artifact.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Artifact.open(tmp_path)


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a" / "artifact.json"
    data = json.loads(path.read_text())
    data["files"]["../../secret"] = {"sha256": "0", "size_bytes": 1}
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="leaves the folder"):
        Artifact.open(tmp_path / "a")


def test_no_artifact_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="is not an artifact folder"):
        Artifact.open(tmp_path)


def test_golden_files_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", **{"input/x": np.array([object()], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a golden file"):
        Golden.load(tmp_path / "golden.npz")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_write_failures_are_storage_errors(tmp_path: Path, code: int) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a"):
            raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError, match=os.strerror(code)) as caught:
        fail()
    assert caught.value.exit_status == 9
    assert list(tmp_path.iterdir()) == []


def test_reserving_more_than_the_limit_fails_and_cleans_up(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"\[Errno"):
            artifacts.reserve(tmp_path, 2 << 20)
        artifacts.reserve(tmp_path, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_golden_samples_that_the_manifest_does_not_list_are_found(tmp_path: Path) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a" / "artifact.json"
    data = json.loads(path.read_text())
    del data["files"]["golden.npz"]
    path.write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=r"does not list golden\.npz"):
        Artifact.open(tmp_path / "a").golden()


@pytest.mark.parametrize(
    ("key", "value"),
    [("files", []), ("files", {"model.bin": 5}), ("parity", {"status": 5}), ("name", None), ("float_size_bytes", "x")],
)
def test_wrong_types_in_a_manifest_are_wrong_input(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a" / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=f"not an edgepack artifact manifest: {key}"):
        Artifact.open(tmp_path / "a")


def test_an_unknown_dtype_in_a_manifest_is_wrong_input(tmp_path: Path) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a" / "artifact.json"
    data = json.loads(path.read_text())
    data["inputs"][0]["dtype"] = "foo"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="'x' has an unknown dtype 'foo'"):
        Artifact.open(tmp_path / "a")
