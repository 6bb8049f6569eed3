"""Artifact folders: model files, ``artifact.json`` and ``golden.npz``, written atomically and hashed.

A folder appears whole or not at all: it is written beside its place and exchanged with the old one in a single
system call where the kernel has it, so a killed process leaves the old artifact in place.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.contracts import Preprocessing, TensorSpec
from edgepack.errors import InputError, IntegrityError, StorageError

MANIFEST = "artifact.json"
GOLDEN = "golden.npz"
SCHEMA = 1
DTYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {
    "float16", "float32", "float64", "bfloat16", "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """How an artifact compares with its golden answers on one runtime.

    Attributes:
        status: ``checked`` or ``not run: <why>``.
        max_rel: max|a−b| / max|b| against the simulation, worst output.
        sqnr_db: against the simulation, worst output.
        agreement: share of samples with the original's arg-max, None for outputs that are not class scores.
        sqnr_original_db: against the original module.
        output: the worst output.
        least_db: the SQNR against the simulation that an integer artifact must keep, None for float ones.
        rounded: rounded values compared one by one, each computed from what the file holds before it.
        rounded_otherwise: the largest share of one such value's elements that is a step apart; None for float ones.
        margin: the smallest margin of a choice (top-k) on the golden samples, of the last score that was kept; None
            for networks that choose nothing.
        tied: numbers of the golden samples on which the artifact chose otherwise and differs, their margins being
            within what its numbers may differ by; the figures are of the others.
    """

    status: str
    runtime: str | None = None
    max_rel: float | None = None
    sqnr_db: float | None = None
    sqnr_original_db: float | None = None
    agreement: float | None = None
    samples: int = 0
    output: str | None = None
    least_db: float | None = None
    rounded: int = 0
    rounded_otherwise: float | None = None
    margin: float | None = None
    tied: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says about one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of ``artifact.json``; see the architecture's list of fields."""

    format: str
    name: str
    dialect: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    preprocessing: Mapping[str, Preprocessing] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    parity: Parity = Parity("not run: just written")
    census: Mapping[str, Any] | None = None
    score: Mapping[str, Any] | None = None
    float_size_bytes: int | None = None
    compiled_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    built_for: str | None = None
    budget_missed: tuple[str, ...] = ()
    fingerprint: str = ""
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: Path) -> Manifest:
        """Parse a manifest. Raises InputError when it is not one."""
        from pydantic import TypeAdapter, ValidationError

        try:
            found: Manifest = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(word) for word in first["loc"])
            raise InputError(f"{source}: not an edgepack artifact manifest: {where}: {first['msg']}") from error
        if found.schema != SCHEMA:
            raise InputError(f"{source}: not a manifest of this edgepack: schema {found.schema} is not {SCHEMA}")
        for spec in (*found.inputs, *found.outputs):
            if spec.dtype not in DTYPES:
                raise InputError(f"{source}: {spec.name!r} has an unknown dtype {spec.dtype!r}")
        return found


@dataclass(frozen=True)
class Golden:
    """Real samples with the answers an artifact must give.

    Attributes:
        inputs: as the artifact takes them, stacked on the first axis.
        original: the original module's outputs by name.
        simulation: what this artifact must compute.
        margins: per sample, how near its choices come to a tie (``edgepack.ties``); None where nothing is chosen.
    """

    inputs: Mapping[str, np.ndarray[Any, Any]]
    original: Mapping[str, np.ndarray[Any, Any]]
    simulation: Mapping[str, np.ndarray[Any, Any]]
    margins: np.ndarray[Any, Any] | None = None

    def save(self, path: Path) -> None:
        groups = {"input": self.inputs, "original": self.original, "simulation": self.simulation}
        arrays = {f"{group}/{name}": array for group, items in groups.items() for name, array in items.items()}
        if self.margins is not None:
            arrays["choice/margins"] = self.margins
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read golden samples; no pickle. Raises InputError."""
        groups: dict[str, dict[str, np.ndarray[Any, Any]]] = {
            "input": {}, "original": {}, "simulation": {}, "choice": {},
        }  # fmt: skip
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                for key in arrays.files:
                    group, _, name = key.partition("/")
                    groups[group][name] = arrays[key]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path}: not a golden file: {error}") from error
        return cls(groups["input"], groups["original"], groups["simulation"], groups["choice"].get("margins"))


@dataclass(frozen=True)
class Artifact:
    """One artifact folder on disk.

    Attributes:
        folder: where it lies.
        manifest: parsed ``artifact.json``.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str) -> Artifact:
        """Open a folder and check each file's presence and size (``check_hashes`` reads them whole).

        Raises:
            InputError: there is no artifact there.
            IntegrityError: a file is missing or has another size.
        """
        folder = Path(folder)
        recover(folder)
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            what = "is not an artifact folder" if folder.is_dir() else "does not exist"
            raise InputError(f"{folder} {what} (no {MANIFEST})", "edgepack export writes one") from error
        except (UnicodeDecodeError, NotADirectoryError) as error:
            raise InputError(f"{folder} is not an artifact folder: {error}") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        artifact = cls(folder, Manifest.from_json(text, path))
        for name, facts in artifact.manifest.files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{path}: file name {name!r} leaves the folder")
            file = folder / name
            if not file.is_file():
                raise IntegrityError(f"{file} is missing", "export again")
            if file.stat().st_size != facts.size_bytes:
                raise IntegrityError(f"{file} has {file.stat().st_size} bytes, its manifest says {facts.size_bytes}")
        return artifact

    def check_hashes(self) -> None:
        """Read every file. Raises IntegrityError for the first whose SHA-256 differs."""
        for name, facts in self.manifest.files.items():
            if sha256(self.folder / name) != facts.sha256:
                raise IntegrityError(f"{self.folder / name} was changed: its SHA-256 does not match", "export again")

    def file(self, suffix: str) -> Path:
        """The one model file with this suffix. Raises InputError."""
        found = [name for name in self.manifest.files if name.endswith(suffix)]
        if len(found) != 1:
            raise InputError(f"{self.folder} holds {len(found)} files *{suffix}, expected one")
        return self.folder / found[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of the model files (without golden samples and manifest); of source text, once it is compiled."""
        return self.manifest.compiled_bytes or self.files_bytes

    @property
    def files_bytes(self) -> int:
        """Bytes of the model files as they are stored."""
        return sum(facts.size_bytes for name, facts in self.manifest.files.items() if name != GOLDEN)

    def golden(self) -> Golden:
        """The samples with their answers. Raises IntegrityError when no hash vouches for them."""
        if GOLDEN not in self.manifest.files:
            raise IntegrityError(f"{self.folder / MANIFEST} does not list {GOLDEN}: it was changed", "export again")
        return Golden.load(self.folder / GOLDEN)


def describe_files(folder: Path) -> dict[str, FileFacts]:
    """Size and SHA-256 of every file in a folder but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): FileFacts(sha256(path), path.stat().st_size) for path in files}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes ``folder``'s place when the block ends without an error.

    Raises:
        StorageError: the disk is full, or writing is not permitted; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    try:
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            recover(folder)
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                _sync(path)
            _take_place(temporary, folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's write failures into StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise StorageError(f"cannot write {target}: {os.strerror(error.errno)}") from error


def reserve(folder: Path, size_bytes: int) -> None:
    """Fail now, with OSError, if ``folder`` cannot take this many bytes.

    For writers that are not ours and hide a full disk.
    """
    path = folder / ".reserve"
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size_bytes, 1))
            elif shutil.disk_usage(folder).free < size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write one file atomically. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Clean up after a killed writer: restore a set-aside folder, remove abandoned temporary ones."""
    aside = _aside(folder)
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    for left in folder.parent.glob(f".{folder.name}.new-*"):
        owner = left.name.rpartition("-")[2]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _take_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
    elif not _exchange(temporary, folder):
        folder.rename(_aside(folder))
        temporary.rename(folder)
        shutil.rmtree(_aside(folder), ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one system call (Linux 3.15+); False where that cannot be done."""
    if sys.platform != "linux":
        return False
    at_fdcwd, rename_exchange = -100, 2
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(call(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0)


def _sync(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
