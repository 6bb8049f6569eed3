"""What a compressed network was made from, as one hash: the recipe, the files it names, and code beside them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgepack import parts, usercode
from edgepack.artifact import sha256
from edgepack.recipe import Recipe
from edgepack.versions import versions

INSTALLED = {"site-packages", "node_modules", "edgepack-out"}


def of(recipe: Recipe) -> str:
    """Changes when the recipe's model, task or passes change, a file they name, or a module their code may import."""
    sheet = recipe.sheet
    named = sorted(recipe.folder / name for name in recipe.files)
    files = {path for item in named for path in _with_neighbours(item)} | set(_code(recipe))
    facts: Mapping[str, Any] = {
        "model": sheet.model.model_dump(),
        "task": sheet.task.model_dump(),
        "passes": [[parts.name_of(item), parts.options_of(item)] for item in recipe.passes],
        "files": {str(path): _digest(path) for path in sorted(files)},
        "versions": versions("torch", "timm", "torchvision", "transformers"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _with_neighbours(path: Path) -> Iterator[Path]:
    """A file with the code beside it that it may import, or the external data beside an ``.onnx``."""
    yield path
    if path.suffix == ".py":
        yield from _sources(path.parent)
    if path.suffix == ".onnx":
        yield from (item for item in path.parent.iterdir() if item.is_file() and "data" in item.suffix)


def _code(recipe: Recipe) -> Iterator[Path]:
    """The sources of ``package.module:callable``, if the package is the user's own rather than an installed one."""
    source = recipe.sheet.model.module
    package = source.partition(":")[0].partition(".")[0]
    if not usercode.is_source(source) or source.partition(":")[0].endswith(".py"):
        return
    beside = recipe.folder / package
    if beside.is_dir():
        yield from _sources(beside)
    elif beside.with_suffix(".py").is_file():
        yield from _sources(recipe.folder)
    else:
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or []) if found is not None else []:
            if not INSTALLED & set(Path(place).parts):
                yield from _sources(Path(place))


def _sources(folder: Path) -> Iterator[Path]:
    """Python files below a folder, without environments, results and hidden folders."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix == ".py":
            yield path
        elif path.is_dir() and not _foreign(path):
            yield from _sources(path)


def _foreign(folder: Path) -> bool:
    return folder.name.startswith((".", "__")) or folder.name in INSTALLED or (folder / "pyvenv.cfg").exists()


def _digest(path: Path) -> str:
    if path.is_dir():
        listing = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(path.rglob("*"))]
        return hashlib.sha256(repr(listing).encode()).hexdigest()
    return sha256(path)
