"""Golden samples as raw values: one little-endian file in C order per tensor, which any language can read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.artifact import Golden, Manifest
from edgepack.contracts import FLOAT_LIMIT, Arrays, Preprocessing, TensorSpec
from edgepack.errors import Unsupported
from edgepack.samples import Array, count, take
from edgepack.task import Input

Stored = dict[str, Any]


def write_golden(manifest: Manifest, golden: Golden, limit: int, folder: Path) -> list[dict[str, list[Stored]]]:
    """Each sample's inputs as the model takes them and the answers it must give, in the manifest's order."""
    written = []
    for index in _telling(manifest, golden)[:limit]:
        place = folder / "golden" / f"{index:02d}"
        sample = {
            "inputs": _sample(manifest.inputs, golden.inputs, index, place, "input"),
            "outputs": _sample(manifest.outputs, golden.simulation, index, place, "output"),
        }
        written.append(sample)
    return written


def _telling(manifest: Manifest, golden: Golden) -> list[int]:
    """Samples whose choices are no ties, on which another build of the engine must answer the same; all, if none is."""
    numbers = list(range(count(manifest.inputs, golden.inputs)))
    clear = [number for number in numbers if golden.margins is None or golden.margins[number] > FLOAT_LIMIT]
    return clear or numbers


def write_pixels(spec: TensorSpec, how: Preprocessing, golden: Array, folder: Path) -> Stored:
    """A picture of random pixels, what resize and crop leave of it, and the tensor: the reference for other code."""
    item = _item(spec, how, golden.shape)
    height, width = _picture_size(item, how)
    channels = item.channels or 3
    picture = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    fitted, tensor = _reference(item, picture)
    place = folder / "golden" / f"pixels-{_plain(spec.name)}"
    return {
        "input": spec.name,
        "picture": _store(picture, place / "picture.bin", "picture"),
        "fitted": _store(fitted, place / "fitted.bin", "fitted"),
        "tensor": _store(tensor, place / "tensor.bin", spec.name),
    }


def _sample(specs: Sequence[TensorSpec], arrays: Arrays, index: int, place: Path, word: str) -> list[Stored]:
    sample: Mapping[str, Array] = take(specs, arrays, index, index + 1)
    return [_store(sample[spec.name], place / f"{word}{n}.bin", spec.name) for n, spec in enumerate(specs)]


def _store(array: Array, path: Path, tensor: str) -> Stored:
    if array.dtype.kind not in "fiub":
        raise Unsupported(f"tensor {tensor!r} holds {array.dtype}, which has no plain form", "export as float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    file = path.relative_to(path.parents[2]).as_posix()
    return {"tensor": tensor, "file": file, "dtype": array.dtype.name, "shape": list(array.shape)}


def _item(spec: TensorSpec, how: Preprocessing, shape: tuple[int, ...]) -> Input:
    """The task's input that this interface came from."""
    sizes = (1, *shape[1:])
    dynamic = {axis: place for place, axis in enumerate(spec.shape) if isinstance(axis, str)}
    return Input(spec.name, sizes, spec.dtype, spec.layout, how.mean, how.std, how.scale, how.resize, dynamic)


def _picture_size(item: Input, how: Preprocessing) -> tuple[int, int]:
    """Larger than the input and of another aspect, so that resize and crop have work; as it is where they have none."""
    height, width = (item.shape[(item.layout or "").index(letter)] for letter in "HW")
    if item.crop_size is None and how.resize is None:
        return height, width
    side = how.resize or max(height, width)
    return side * 5 // 4 + 3, side * 3 // 2 + 1


def _reference(item: Input, picture: Array) -> tuple[Array, Array]:
    """Fitted pixels and the model's input, by the code that reads evaluation images."""
    from PIL import Image

    from edgepack.images import Folder

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "picture.png"
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path)
        batch = next(iter(Folder(item, (path,), None).batches(1)))
    return batch.raw[item.name][0], batch.inputs[item.name]


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name)
