"""C files → a shared library, once per content, compiler and flags."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgepack.errors import InputError, MissingExtra

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=c99", "-O3", "-fPIC", "-ffunction-sections", "-fdata-sections")
SELF_TEST = "selftest.c"


def compiler() -> str:
    """The system's C compiler, or that which ``CC`` names.

    Raises:
        MissingExtra: there is none.
    """
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise MissingExtra(
        f"there is no C compiler here ({wanted or ', '.join(COMPILERS)})",
        "apt-get install gcc, or name one in the environment variable CC",
    )


@functools.cache
def compiler_version(path: str) -> str:
    """First line of what a compiler says of itself."""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() or path


def library(folder: Path, names: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """The compiled files of a folder. Each file is compiled once per content: networks share their kernels.

    Raises:
        MissingExtra: there is no compiler.
        InputError: it refuses the files.
    """
    objects = _objects(folder, names, flags)
    return _made(_joined(objects, ".so"), [compiler(), "-shared", *map(str, objects), "-lm"], folder)


def reachable_bytes(folder: Path, names: Sequence[str], entry: str) -> int | None:
    """Code and constants of a program that calls ``entry`` alone; None where this system's linker cannot tell.

    What it never reaches is left out, as ``-Wl,--gc-sections`` does for applications. Memory is not in it.
    """
    if shutil.which("size") is None:
        return None
    objects = _objects(folder, names)
    words = [compiler(), "-r", "-nostdlib", f"-Wl,--gc-sections,-e,{entry}", *map(str, objects)]
    try:
        part = _made(_joined(objects, ".o"), words, folder)
    except InputError:
        return None
    done = subprocess.run(["size", str(part)], capture_output=True, text=True, check=True)
    text, data = done.stdout.splitlines()[1].split()[:2]
    return int(text) + int(data)


def _objects(folder: Path, names: Sequence[str], flags: Sequence[str] = ()) -> list[Path]:
    command = (compiler(), *FLAGS, *flags)
    common = hashlib.sha256("\0".join((*command, compiler_version(command[0]))).encode())
    for name in sorted(name for name in names if name.endswith(".h")):
        common.update(name.encode() + (folder / name).read_bytes())
    return [_object(command, folder / name, common.copy()) for name in sorted(names) if _compiled(name)]


def _joined(objects: Sequence[Path], suffix: str) -> Path:
    """Where something made of these objects is kept."""
    key = hashlib.sha256((suffix + "".join(path.name for path in objects)).encode()).hexdigest()[:32]
    return _cache() / f"{key}{suffix}"


def _compiled(name: str) -> bool:
    return name.endswith(".c") and name != SELF_TEST


def _object(command: Sequence[str], source: Path, key: hashlib._Hash) -> Path:
    key.update(source.name.encode() + source.read_bytes())
    return _made(_cache() / f"{key.hexdigest()[:32]}.o", [*command, "-c", str(source)], source.parent)


def _made(path: Path, words: Sequence[str], folder: Path) -> Path:
    """What a command writes, from the cache where it is there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        made = Path(place) / path.name
        done = subprocess.run([*words, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            line = next((text for text in done.stderr.splitlines() if "error" in text), done.stderr.strip())
            raise InputError(f"{words[0]} cannot compile {folder}: {line}", "export again")
        made.replace(path)
    return path


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(root).expanduser() / "edgepack" / "c"
