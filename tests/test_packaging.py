"""What is installed and who may import whom: read from the files, so that it holds for parts added later."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgepack

ROOT = Path(__file__).parent.parent
ROOMS = ("compress", "export", "runtimes", "devices", "deploy")
CORE = sorted(path for path in (ROOT / "core").rglob("*.py") if "examples" not in path.parts)
IN_ROOMS = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
HEAVY = {
    "torch", "torchvision", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "scipy", "sklearn",
}  # fmt: skip
SPINE_WITH_TORCH = ("core/models/", "core/graph.py")
PUBLIC = {
    "compress", "export", "deploy", "profile", "verify", "compare", "report", "Task", "Input", "Artifact",
    "Settings", "EdgepackError", "__version__",
}  # fmt: skip
WORDS_NOT_FOR_FILES = {"utils", "helpers", "common", "base", "manager", "handler", "config"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, everywhere: bool) -> Iterator[str]:
    """Modules that a file imports: at its top only, or anywhere; type checkers' imports do not run and do not count."""
    pending: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: imports are absolute, so that the rule can be read"
            yield from (f"{node.module}.{item.name}" for item in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def packages_on_disk() -> set[str]:
    found = {"edgepack"} | {f"edgepack.{room}" for room in ROOMS}
    for folder, package in [(ROOT / "core", "edgepack"), *((ROOT / room, f"edgepack.{room}") for room in ROOMS)]:
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            found.add(".".join([package, *parts]))
    return found


def test_every_folder_is_listed_as_a_package() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk()
    assert len(listed) == len(set(listed))


def test_data_files_are_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["edgepack"]
    data = {path for path in (ROOT / "core").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    examples = set((ROOT / "core" / "examples").rglob("*.py"))
    packaged = {path for pattern in patterns for path in (ROOT / "core").glob(pattern)}
    assert sorted(map(name, (data | examples) - packaged)) == []


def test_extras_are_named_as_the_parts_that_need_them() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"compress", "all", "dev"} <= set(extras)
    every = re.search(r"edgepack\[(.*)\]", extras["all"][0])
    assert every is not None
    # TensorRT needs a GPU; pip finds no versions of brevitas and of the others that go together
    assert set(every.group(1).split(",")) == set(extras) - {"all", "dev", "zoo", "tensorrt-run", "qat"}


@pytest.mark.parametrize("path", IN_ROOMS, ids=name)
def test_a_room_imports_the_spine_and_its_own_private_files_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for module in imports(path, everywhere=True):
        parts = module.split(".")
        if parts[0] != "edgepack" or len(parts) < 2 or parts[1] not in ROOMS:
            assert parts[0] not in ROOMS, f"{name(path)}: import edgepack.{module}, never {module}"
            continue
        assert parts[1] == room, f"{name(path)} imports another room: {module}"
        assert any(part.startswith("_") for part in parts[2:]), f"{name(path)} imports a sibling part: {module}"


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_spine_names_no_room(path: Path) -> None:
    for module in imports(path, everywhere=True):
        parts = module.split(".")
        assert parts[0] not in ROOMS, f"{name(path)}: {module}"
        if len(parts) > 2 and parts[0] == "edgepack":
            assert parts[1] not in ROOMS, f"{name(path)} must find parts by name, not import {module}"


@pytest.mark.parametrize("path", [*CORE, *IN_ROOMS], ids=name)
def test_heavy_packages_are_not_imported_at_the_top(path: Path) -> None:
    private = path.stem.startswith("_") and path.stem != "__init__"
    if (private and path in IN_ROOMS) or (name(path).startswith(SPINE_WITH_TORCH) and path.stem != "__init__"):
        return
    found = {module.split(".")[0] for module in imports(path, everywhere=False)} & HEAVY
    assert not found, f"{name(path)}: import {', '.join(found)} inside the method that needs it"


@pytest.mark.parametrize("path", [*CORE, *IN_ROOMS], ids=name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 350
    assert not set(path.stem.strip("_").split("_")) & WORDS_NOT_FOR_FILES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < 40, f"{name(path)}: {node.name} is longer than 40 lines"


def test_public_surface_is_exact() -> None:
    assert set(edgepack.__all__) == PUBLIC
    assert set(dir(edgepack)) == PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        _ = edgepack.shrink


def test_every_public_name_is_there_whatever_was_imported_before() -> None:
    lines = [
        "import edgepack",
        "import edgepack.pipeline, edgepack.reporting, edgepack.doctor, edgepack.parity, edgepack.recipe",
        f"values = [getattr(edgepack, name) for name in {sorted(PUBLIC)}]",
        "verbs = ('compress', 'export', 'deploy', 'profile', 'verify', 'compare', 'report')",
        "assert all(callable(getattr(edgepack, verb)) for verb in verbs)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_import_loads_nothing_heavy() -> None:
    rooms = ", ".join(f"edgepack.{room}" for room in ROOMS)
    lines = [
        f"import sys, edgepack, {rooms}, edgepack.cli, edgepack.parts, edgepack.contracts, edgepack.api",
        "from edgepack.parts import ROOMS, find, names",
        "parts = [find(kind, name) for kind in ROOMS for name in names(kind)]",
        "assert len(parts) > 7",
        f"loaded = set({sorted(HEAVY)}) & sys.modules.keys()",
        "assert not loaded, loaded",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_the_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert len(text) == 11358
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_links_and_commands_in_the_docs_exist() -> None:
    for file in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{file}: {target}"
        made = set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE))
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert made <= targets, f"{file}: {made - targets}"
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_ci_calls_make_test_in_a_fresh_environment() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash")
    assert "set -euo pipefail" in text
    assert "make test" in text
    subprocess.run(["bash", "-n", str(script)], check=True)
