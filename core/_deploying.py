"""The deploy command: what its command line names, into packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import _tables, parts, pipeline
from edgepack.artifact import MANIFEST
from edgepack.contracts import Packager
from edgepack.errors import InputError
from edgepack.recipe import build_with

if TYPE_CHECKING:
    from edgepack._verbs import Call
    from edgepack.packaging import PackageResult

SECTION = "deploy"


def deploy(call: Call, paths: Sequence[Path], to: str, only: Sequence[str]) -> dict[str, Any]:
    """Package a recipe's artifacts, or artifact folders; returns the JSON document."""
    own = [item for item in call.overrides or () if item.startswith(f"{SECTION}.")]
    call = dataclasses.replace(call, overrides=[item for item in call.overrides or () if item not in own])
    packager = build_with(Packager, to, SECTION, own)
    lone = [path for path in paths if (path / MANIFEST).exists()]
    if len(lone) < len(paths) and len(paths) > 1:
        wrong = next(path for path in paths if path not in lone)
        raise InputError(f"{wrong} is not an artifact folder", "give one recipe, or artifact folders only")
    if lone and (only or call.overrides):
        raise InputError(f"{lone[0]} is an artifact folder; --only, and --set of anything but deploy, need a recipe")
    recipe = None if lone else call.recipe(paths[0])
    if call.dry_run:
        return _plan(call, packager, paths)
    if recipe is None:
        return _told(call, pipeline.deploy_folders(paths, packager, call.options()))
    return _told(call, pipeline.deploy_recipe(recipe, packager, call.options(), only))


def _plan(call: Call, packager: Packager, paths: Sequence[Path]) -> dict[str, Any]:
    facts = {"part": parts.name_of(packager), "options": parts.options_of(packager)}
    steps = [{"stage": f"{SECTION} {path}", **facts} for path in paths]
    call.screen.show(_tables.planned(steps))
    return {"plan": steps}


def _told(call: Call, results: Sequence[PackageResult]) -> dict[str, Any]:
    for result in results:
        for note in result.notes:
            call.screen.say(f"warning: {note}")
        size = f"{len(result.files)} files, {result.size_bytes / 1e6:.1f} MB"
        call.screen.say(f"{result.folder} written in {result.seconds:.1f} s ({size})")
    return {"packages": [result.to_json() for result in results]}
