"""What coremltools leaves in a package, made small and the same every time, with the interface's names."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepack.contracts import Graph, TensorSpec
from edgepack.errors import require
from edgepack.versions import installed

INNER = "com.apple.CoreML"
RESERVED = re.compile(r"(any|bool|program|func|tensor|list|dict|tuple|true|false|string|bf16|fp\d+|u?int\d*)$")
NAMESPACE = uuid.UUID("5c9c3c3e-6f0a-5d0e-9f43-0f6a1f0e7a11")


def finish(package: Path, graph: Graph, largest: int, describe: bool) -> None:
    """Rewrite ``model.mlmodel`` and ``Manifest.json`` in place.

    Equal constants (strides, padding words) are stored once, inner names are numbered by kind, dates and random
    identifiers go.

    Args:
        largest: upper bound of dynamic axes.
        describe: put labels and preprocessing into the metadata.
    """
    path = package / "Data" / INNER / "model.mlmodel"
    spec = require("coremltools.models.utils", "coreml").load_spec(str(package))
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    spec.mlProgram.attributes.clear()
    _merge_constants(block)
    inputs = feature_names(graph.inputs)
    outputs = feature_names(graph.outputs, taken=inputs)
    _rename(function, block, inputs, outputs)
    _bound(spec.description, largest)
    _describe_interface(spec.description, graph, inputs, outputs)
    _describe_model(spec.description.metadata, graph, describe)
    data = spec.SerializeToString(deterministic=True)
    path.write_bytes(data)
    _write_manifest(package, data)


def feature_names(specs: Sequence[TensorSpec], taken: Sequence[str] = ()) -> list[str]:
    """Names that Core ML allows for these tensors, unique, in order."""
    names: list[str] = []
    for spec in specs:
        name = re.sub(r"\W", "_", spec.name, flags=re.ASCII) or "_"
        name = f"_{name}" if name[0].isdigit() or RESERVED.match(name) else name
        while name in names or name in taken:
            name += "_"
        names.append(name)
    return names


def _merge_constants(block: Any) -> None:
    """One constant for each value; operators of a block are in order, so the first one comes early enough."""
    first: dict[tuple[bytes, bytes], str] = {}
    same: dict[str, str] = {}
    kept = []
    for operator in block.operations:
        if operator.type == "const":
            output = operator.outputs[0]
            key = (output.type.SerializeToString(), operator.attributes["val"].SerializeToString(deterministic=True))
            name = first.setdefault(key, output.name)
            if name != output.name and output.name not in block.outputs:
                same[output.name] = name
                continue
        kept.append(operator)
    for operator in kept:
        _replace_inputs(operator, same)
    operations = [operator.SerializeToString(deterministic=True) for operator in kept]
    del block.operations[:]
    for data in operations:
        block.operations.add().ParseFromString(data)


def _rename(function: Any, block: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    names = dict(zip((item.name for item in function.inputs), inputs, strict=True))
    names |= dict(zip(block.outputs, outputs, strict=True))
    interface, counts = {*inputs, *outputs}, Counter[str]()
    for operator in block.operations:
        number = counts[operator.type]
        counts[operator.type] += 1
        label = f"{operator.type}_{number}"
        label = f"{label}_" if label in interface else label
        for place, output in enumerate(operator.outputs):
            names.setdefault(output.name, label if place == 0 else f"{label}_{place}")
        if "name" in operator.attributes:
            operator.attributes["name"].immediateValue.tensor.strings.values[0] = label
    for item in function.inputs:
        item.name = names[item.name]
    for operator in block.operations:
        _replace_inputs(operator, names)
        for output in operator.outputs:
            output.name = names[output.name]
    block.outputs[:] = [names[name] for name in block.outputs]


def _replace_inputs(operator: Any, names: Mapping[str, str]) -> None:
    for argument in operator.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "name":
                binding.name = names.get(binding.name, binding.name)


def _describe_interface(description: Any, graph: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    for feature, name in zip(description.input, inputs, strict=True):
        feature.name = name
    for feature, name in zip(description.output, outputs, strict=True):
        feature.name = name
    for feature, spec in zip(description.input, graph.inputs, strict=True):
        if spec.dtype == "uint8":
            _make_image(feature.type)


def _bound(description: Any, largest: int) -> None:
    """Dynamic axes up to ``largest``, and by default as large as a small image."""
    for feature in description.input:
        array = feature.type.multiArrayType
        for place, limits in enumerate(array.shapeRange.sizeRanges):
            if limits.upperBound != limits.lowerBound:
                limits.upperBound = max(min(limits.upperBound, largest), limits.lowerBound)
                array.shape[place] = min(max(64, limits.lowerBound), limits.upperBound)


def _make_image(kind: Any) -> None:
    """A float (1, C, H, W) array becomes an image of the same sizes."""
    _, channels, height, width = kind.multiArrayType.shape
    limits = list(kind.multiArrayType.shapeRange.sizeRanges)[2:]
    kind.ClearField("multiArrayType")
    image = kind.imageType
    image.height, image.width = height, width
    image.colorSpace = image.ColorSpace.Value("GRAYSCALE" if channels == 1 else "RGB")
    for ours, theirs in zip((image.imageSizeRange.heightRange, image.imageSizeRange.widthRange), limits, strict=False):
        ours.lowerBound, ours.upperBound = theirs.lowerBound, theirs.upperBound


def _describe_model(metadata: Any, graph: Graph, describe: bool) -> None:
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    metadata.author = f"edgepack {installed('edgepack') or ''}".strip()
    if describe:
        facts = {
            "edgepack.labels": list(graph.labels),
            "edgepack.preprocessing": {name: asdict(how) for name, how in graph.preprocessing.items()},
        }
        for key, value in facts.items():
            metadata.userDefined[key] = json.dumps(value, ensure_ascii=False)


def _write_manifest(package: Path, data: bytes) -> None:
    """Core ML wants an identifier per item; these depend on the model alone."""
    for path in package.iterdir():
        if path.name not in ("Data", "Manifest.json"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    items = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}
    digest = uuid.uuid5(NAMESPACE, data.hex())
    entries = {
        str(uuid.uuid5(digest, name)): {
            "author": INNER, "description": text, "name": name, "path": f"{INNER}/{name}",
        }
        for name, text in items.items() if (package / "Data" / INNER / name).exists()
    }  # fmt: skip
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": str(uuid.uuid5(digest, "model.mlmodel")),
    }
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
