"""The contract file of a package: what the model takes, gives and must answer, and the files that prove it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepack.artifact import GOLDEN, Artifact, Manifest, describe_files
from edgepack.contracts import FLOAT_LIMIT, INTEGERS, Preprocessing, TensorSpec
from edgepack.deploy._golden import write_golden, write_pixels
from edgepack.packaging import CONTRACT
from edgepack.parity import INTEGER_DB
from edgepack.versions import installed

SCHEMA = 1
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
PEAK = 2.0  # the largest error over the largest value, in units of root mean squares of both
COLOURS: dict[int | str, str] = {1: ", gray", 3: ", RGB", 4: ", RGBA"}  # by number of channels

Contract = dict[str, Any]


def build(artifact: Artifact, folder: Path, samples: int) -> Contract:
    """Copy the model files, write the golden samples as raw values, and describe both."""
    manifest = artifact.manifest
    for name in manifest.files:
        if name != GOLDEN:
            target = folder / "model" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.folder / name, target)
    golden = artifact.golden()
    how = {spec.name: manifest.preprocessing.get(spec.name, Preprocessing()) for spec in manifest.inputs}
    inputs = [_input(spec, how[spec.name]) for spec in manifest.inputs]
    pictured = [spec for spec, item in zip(manifest.inputs, inputs, strict=True) if item["image"]]
    return {
        "schema": SCHEMA,
        "edgepack": installed("edgepack"),
        "name": manifest.name,
        "format": manifest.format,
        "model": f"model/{artifact.file(SUFFIXES[manifest.format]).relative_to(artifact.folder).as_posix()}",
        "engine": {"package": ENGINES[manifest.format], "tested": manifest.parity.runtime},
        "inputs": inputs,
        "outputs": [_tensor(spec) for spec in manifest.outputs],
        "labels": list(manifest.labels),
        "golden": {
            "rule": "max|a-b| / max|b| per output, over all samples; a: what the engine answers, b: the file",
            "limit": _limit(manifest),
            "samples": write_golden(manifest, golden, samples, folder),
        },
        "pixels": [write_pixels(spec, how[spec.name], golden.inputs[spec.name], folder) for spec in pictured],
        "parity": asdict(manifest.parity),
        "score": manifest.score,
        "artifact": manifest.fingerprint,
        "files": {},
    }


def _limit(manifest: Manifest) -> float:
    """Integer engines round single values the other way: what the artifact itself must keep, in the rule's terms."""
    if not manifest.dialect.startswith(INTEGERS):
        return FLOAT_LIMIT
    return float(PEAK * 10 ** (-(manifest.parity.least_db or INTEGER_DB) / 20))


def save(contract: Contract, folder: Path) -> None:
    """Write ``contract.json``, the last file: it has the hash of every other."""
    contract["files"] = {name: asdict(facts) for name, facts in describe_files(folder).items()}
    (folder / CONTRACT).write_text(json.dumps(contract, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _tensor(spec: TensorSpec) -> Contract:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "layout": spec.layout}


def _input(spec: TensorSpec, how: Preprocessing) -> Contract:
    image = _is_image(spec)
    crop = image and how.crop and all(isinstance(spec.shape[_axis(spec, letter)], int) for letter in "HW")
    preprocessing = {**asdict(how), "crop": crop}
    return {**_tensor(spec), "takes": _takes(spec, how, image), "image": image, "preprocessing": preprocessing}


def _is_image(spec: TensorSpec) -> bool:
    """Whether the samples can make this input of one image file."""
    if spec.layout not in ("NCHW", "NHWC") or spec.dtype not in ("float32", "float16", "uint8"):
        return False
    one = isinstance(spec.shape[0], str) or spec.shape[0] == 1
    return one and spec.shape[_axis(spec, "C")] in COLOURS


def _axis(spec: TensorSpec, letter: str) -> int:
    return (spec.layout or "").index(letter)


def _takes(spec: TensorSpec, how: Preprocessing, image: bool) -> str:
    """What the caller must put in, in one sentence; the golden inputs are in this form."""
    colours = COLOURS[spec.shape[_axis(spec, "C")]] if image else ""
    if spec.dtype == "uint8" and image:
        return f"raw 8-bit pixels{colours}; the model does the rest"
    if how.identity:
        return f"the raw values as {spec.dtype}{colours}"
    return f"preprocessed values, (raw / scale - mean) / std{colours}; not raw pixels"
