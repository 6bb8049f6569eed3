"""Data from .npz files: layouts, several inputs, and archives that are refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from _reading import GRAY, RGB, all_of, refuse
from edgepack.data import DataSpec, open_data
from edgepack.task import Input, Task

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(7) % 3


def save(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder


@pytest.mark.parametrize("stored", ["NHWC", "NCHW"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_npz_layouts(tmp_path: Path, stored: str, layout: str) -> None:
    x = PIXELS if stored == "NHWC" else PIXELS.transpose(0, 3, 1, 2)
    shape = (1, 3, 6, 5) if layout == "NCHW" else (1, 6, 5, 3)
    item = Input("input", shape, layout=layout, scale=255, mean=RGB.mean, std=RGB.std)
    got = all_of(open_data("data.npz", (item,), save(tmp_path, x=x, y=LABELS)))
    wanted = (PIXELS / 255 - RGB.mean) / RGB.std
    np.testing.assert_allclose(
        got.inputs["input"], wanted if layout == "NHWC" else wanted.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5
    )
    assert (got.raw["input"] == PIXELS).all()
    assert got.targets is not None
    assert (got.targets == LABELS).all()


def test_npz_gray_without_channel_axis(tmp_path: Path) -> None:
    got = all_of(open_data("data.npz", (GRAY,), save(tmp_path, x=PIXELS[..., 0])))
    assert got.inputs["input"].shape == (7, 1, 6, 5)
    assert got.raw["input"].shape == (7, 6, 5, 1)
    assert got.raw["input"].dtype == np.uint8
    assert got.targets is None


def test_npz_first_samples_prefix_and_any_size(tmp_path: Path) -> None:
    free = Input("input", (1, 3, 8, 8), dynamic=("batch", "height", "width"))
    save(tmp_path, test_x=PIXELS, test_y=LABELS)
    data = open_data({"data": "data.npz", "prefix": "test_", "samples": 4, "inputs": None}, (free,), tmp_path)
    assert len(data) == 4
    assert (all_of(data).raw["input"] == PIXELS[:4]).all()
    refuse("data.npz", free, tmp_path, "no array 'x' or 'input'", "choose prefix = 'test_'")


def test_npz_ambiguous_layout(tmp_path: Path) -> None:
    cube = Input("input", (1, 3, 3, 3))
    save(tmp_path, x=np.arange(27.0).reshape(1, 3, 3, 3))
    refuse("data.npz", cube, tmp_path, "channels may be first or last", "layout = 'NCHW'")
    last = all_of(open_data({"data": "data.npz", "layout": "NHWC"}, (cube,), tmp_path))
    assert last.inputs["input"][0, :, 0, 0].tolist() == [0, 1, 2]


def test_npz_several_inputs_and_state(tmp_path: Path) -> None:
    inputs = (
        Input("image", (1, 3, 6, 5)),
        Input("ids", (1, 4), dtype="int64"),
        Input("state", (2, 1, 8), dynamic={"batch": 1}),
        Input("points", (3, 2), dynamic=()),
    )
    state = np.random.default_rng(1).standard_normal((7, 2, 8))
    save(tmp_path, image=PIXELS, ids=np.ones((7, 4), np.int32), state=state, points=np.ones((7, 3, 2)), y=LABELS)
    data = open_data("data.npz", inputs, tmp_path)
    batch = next(data.batches(5))
    assert {name: array.shape for name, array in batch.inputs.items()} == {
        "image": (5, 3, 6, 5), "ids": (5, 4), "state": (2, 5, 8), "points": (15, 2),
    }  # fmt: skip
    assert batch.inputs["ids"].dtype == np.int64
    np.testing.assert_allclose(batch.inputs["state"].transpose(1, 0, 2), state[:5], rtol=1e-6)
    found = Task(inputs, calibration=data).samples(6)
    assert found["state"].shape == (2, 6, 8)
    assert found["points"].shape == (18, 2)


@pytest.mark.parametrize(
    "arrays, texts",
    [
        ({"y": LABELS}, ["no array 'x' or 'input'", "it holds: y"]),
        ({"x": PIXELS[:0]}, ["holds no samples"]),
        ({"x": PIXELS[:, :4]}, ["data.npz: x has shape (7, 4, 5, 3)", "expected (N, 3, 6, 5) or (N, 6, 5, 3)"]),
        ({"x": PIXELS, "y": LABELS[:5]}, ["lengths differ: input 7, y 5"]),
        ({"x": PIXELS, "y": np.int64(3)}, ["lengths differ"]),
        ({"x": np.where(PIXELS > 128, np.nan, 1.0)}, ["NaN or infinity, first in sample"]),
        ({"x": PIXELS, "y": np.full(7, np.inf)}, ["y holds NaN or infinity"]),
        ({"x": PIXELS.astype(complex)}, ["complex128, expected numbers"]),
        ({"x": PIXELS, "y": np.array(list("abcdefg"))}, ["y is <U1, expected numbers"]),
        ({"x": np.array([{}, {}], dtype=object)}, ["pickled objects, which are never loaded"]),
    ],
)
def test_npz_refused(tmp_path: Path, arrays: dict[str, Any], texts: list[str]) -> None:
    refuse("data.npz", RGB, save(tmp_path, **arrays), "data.npz", *texts)


def test_nan_names_the_sample(tmp_path: Path) -> None:
    x = PIXELS.astype(np.float32)
    x[4, 0, 0, 0] = np.nan
    refuse("data.npz", RGB, save(tmp_path, x=x), "first in sample 4")


def test_npz_dtype_must_fit(tmp_path: Path) -> None:
    save(tmp_path, x=np.ones((2, 4)))
    refuse("data.npz", Input("input", (1, 4), dtype="int64"), tmp_path, "float64, which does not fit int64")


def test_damaged_files(tmp_path: Path) -> None:
    refuse("gone.npz", RGB, tmp_path, "gone.npz: no such file")
    refuse("gone", RGB, tmp_path, "gone: no such file or folder")
    (tmp_path / "notes.txt").write_text("hello")
    refuse("notes.txt", RGB, tmp_path, "data are a .npz, a folder of images, or file.py:callable")
    (tmp_path / "bad.npz").write_text("hello")
    refuse("bad.npz", RGB, tmp_path, "bad.npz: ")
    np.savez(tmp_path / "cut.npz", x=PIXELS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    refuse("cut.npz", RGB, tmp_path, "cut.npz: not a .npz, or damaged")
    np.savez_compressed(tmp_path / "flip.npz", x=PIXELS)
    flipped = bytearray((tmp_path / "flip.npz").read_bytes())
    flipped[200] ^= 255
    (tmp_path / "flip.npz").write_bytes(flipped)
    refuse("flip.npz", RGB, tmp_path, "flip.npz: not a .npz, or damaged")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, PIXELS)
    refuse("single.npz", RGB, tmp_path, "single array")


@pytest.mark.parametrize(
    "local, central, byte, reason",
    [
        (8, 10, 99, "That compression method is not supported"),
        (6, 8, 1, "File 'x.npy' is encrypted"),
        (4, 6, 99, "zip file version 9.9"),
    ],
)
def test_archives_that_zipfile_does_not_open(tmp_path: Path, local: int, central: int, byte: int, reason: str) -> None:
    """zipfile answers a compression, a password or a version it does not know with RuntimeErrors."""
    np.savez(tmp_path / "data.npz", x=PIXELS)
    content = bytearray((tmp_path / "data.npz").read_bytes())
    content[content.index(b"PK\x03\x04") + local] = byte
    content[content.index(b"PK\x01\x02") + central] = byte
    (tmp_path / "data.npz").write_bytes(content)
    refuse("data.npz", RGB, tmp_path, f"data.npz: not a .npz, or damaged: {reason}")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_pickle_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Bomb()))
    refuse("plain.npz", RGB, tmp_path, "never loaded")
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "inside.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    refuse("inside.npz", RGB, tmp_path, "never loaded")
    assert not (tmp_path / "exploded").exists()


def test_spec_mistakes(tmp_path: Path) -> None:
    refuse({"dat": "x.npz"}, RGB, tmp_path, "unknown key 'dat'", "did you mean 'data'")
    refuse({"inputs": "a"}, RGB, tmp_path, "both inputs and targets")
    refuse({"data": "x.npz", "samples": 0}, RGB, tmp_path, "at least 1")
    with pytest.raises(ValueError, match="'NCHW' or 'NHWC'"):
        DataSpec(data="x.npz", layout="HWC")
