"""Crops and flips, and samples taken in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgepack.augment import augmented, words_of
from edgepack.data import Arrays, Batch, open_data
from edgepack.errors import InputError
from edgepack.task import Input, Task

ITEM = Input("x", (1, 3, 16, 24), scale=255)


def batch(item: Input, count: int = 6, size: tuple[int, int] = (16, 24), targets: Any = None, seed: int = 0) -> Batch:
    raw = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    arrays = Arrays((item,), {"x": raw}, targets)
    return next(arrays.batches(count))


def is_window(part: np.ndarray, whole: np.ndarray) -> bool:
    """Whether a (C, h, w) array occurs in another."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, part.shape)[0]
    return bool((windows == part).all(axis=(2, 3, 4)).any())


@given(st.integers(0, 1000), st.sampled_from(["NCHW", "NHWC"]))
def test_crops_are_windows_of_the_mirrored_image(seed: int, layout: str) -> None:
    item = ITEM if layout == "NCHW" else Input("x", (1, 16, 24, 3), scale=255, layout="NHWC")
    given_ = batch(item, count=2)
    found = augmented(given_, ("crop", "flip"), (item,), np.random.default_rng(seed)).inputs["x"]
    before = given_.inputs["x"]
    assert found.shape == before.shape
    if layout == "NHWC":
        found, before = found.transpose(0, 3, 1, 2), before.transpose(0, 3, 1, 2)
    for part, image in zip(found, before, strict=True):
        wide = np.pad(image, ((0, 0), (2, 2), (3, 3)), mode="symmetric")
        assert is_window(part, wide) or is_window(part[..., ::-1], wide)


@given(st.integers(0, 1000), st.sampled_from(["NCHW", "NHWC"]))
def test_padded_images_are_windows_of_the_raw_image_with_black_borders(seed: int, layout: str) -> None:
    facts = {"scale": 255, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    item = Input("x", (1, 3, 16, 24) if layout == "NCHW" else (1, 16, 24, 3), layout=layout, **facts)
    raw = np.random.default_rng(seed).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    (plain,) = Arrays((item,), {"x": raw}, None).batches(2)
    (wide,) = Arrays((item,), {"x": np.pad(raw, ((0, 0), (2, 2), (3, 3), (0, 0)))}, None).batches(2)
    found = augmented(plain, ("pad", "flip"), (item,), np.random.default_rng(seed)).inputs["x"]
    assert found.dtype == np.float32
    whole = wide.inputs["x"]
    if layout == "NHWC":
        found, whole = found.transpose(0, 3, 1, 2), whole.transpose(0, 3, 1, 2)
    for part, image in zip(found, whole, strict=True):
        assert is_window(part, image) or is_window(part[..., ::-1], image)


def test_padded_images_are_all_the_crops_of_a_padded_image() -> None:
    item = Input("x", (1, 1, 8, 8))
    image = np.arange(1, 65, dtype=np.float32).reshape(1, 1, 8, 8).repeat(200, 0)
    found = augmented(Batch({"x": image}, {"x": image}, None), ("pad",), (item,), np.random.default_rng(0)).inputs["x"]
    wide = np.pad(image[0, 0], 1)
    expected = {wide[top : top + 8, left : left + 8].tobytes() for top in range(3) for left in range(3)}
    assert {one.tobytes() for one in found} == expected


def test_all_places_and_both_directions_occur() -> None:
    given_ = batch(ITEM, count=600)
    flipped = augmented(given_, ("flip",), (ITEM,), np.random.default_rng(0)).inputs["x"]
    same = (flipped == given_.inputs["x"]).all(axis=(1, 2, 3))
    mirrored = (flipped == given_.inputs["x"][..., ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 240 < same.sum() < 360
    ramp = Batch({"x": np.tile(np.arange(24, dtype=np.float32), (600, 3, 16, 1))}, {"x": np.zeros(600)}, None)
    moved = augmented(ramp, ("crop",), (ITEM,), np.random.default_rng(0)).inputs["x"]
    assert len(np.unique(moved[:, 0, 0, 12])) == 7  # 3 to each side, and the middle


def test_nothing_asked_is_nothing_done() -> None:
    given_ = batch(ITEM)
    assert augmented(given_, (), (ITEM,), np.random.default_rng(0)) is given_
    assert words_of("") == ()
    assert words_of("crop-flip") == ("crop", "flip")


@pytest.mark.parametrize("masks", [False, True])
def test_targets_that_are_images_move_along(masks: bool) -> None:
    item = Input("x", (1, 3, 8, 8), dynamic=("batch", "height", "width"))
    image = np.random.default_rng(0).random((4, 3, 20, 30), dtype=np.float32)
    fine = image.repeat(2, 2).repeat(2, 3)
    targets = (1000 * fine[:, 0]).astype(np.int64) if masks else fine
    found = augmented(Batch({"x": image}, {"x": image}, targets), ("crop", "flip"), (item,), np.random.default_rng(1))
    assert found.inputs["x"].shape == (4, 3, 8, 8)
    wide = found.inputs["x"].repeat(2, 2).repeat(2, 3)
    np.testing.assert_array_equal(found.targets, (1000 * wide[:, 0]).astype(np.int64) if masks else wide)


@pytest.mark.parametrize(
    ("item", "size", "targets", "message"),
    [
        (Input("x", (1, 7)), None, None, r"input 'x' \[1, 7\] is no image"),
        (
            Input("x", (1, 3, 40, 40), dynamic=("height", "width")),
            (16, 24),
            None,
            "16x24 is smaller than the input, 40x40",
        ),
        (ITEM, (16, 24), np.zeros((6, 3, 16, 24)), "'pad' leaves open what targets that are images show"),
        (ITEM, (16, 24), np.zeros((6, 3, 40, 24)), r"targets of shape \(6, 3, 40, 24\) do not lie on images of 16x24"),
    ],
)
def test_refusals(item: Input, size: Any, targets: Any, message: str) -> None:
    word = "pad" if "'pad'" in message else "crop"
    values = np.zeros((6, 7) if size is None else (6, 3, *size), np.float32)
    with pytest.raises(InputError, match=message):
        augmented(Batch({"x": values}, {"x": values}, targets), (word,), (item,), np.random.default_rng(0))


def test_a_task_refuses_words_that_are_none() -> None:
    with pytest.raises(ValueError, match="'rotate' is none of them"):
        Task((ITEM,), augment="crop-rotate")
    with pytest.raises(ValueError, match="'pad' black ones: take one of them"):
        Task((ITEM,), augment="crop-pad-flip")


def test_samples_in_any_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8), np.arange(10)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    for number in range(10):
        Image.fromarray(x[number]).save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\n\ndef samples():\n"
        "    return [(np.full((3, 6, 5), i, np.float32), i) for i in range(10)]\n"
    )
    item = Input("input", (1, 3, 6, 5))
    for source in ("data.npz", "photos", "mine.py:samples"):
        data = open_data(source, (item,), tmp_path)
        (whole,) = data.batches(100)
        (part,) = data.take([7, 0, 7])
        np.testing.assert_array_equal(part.inputs["input"], whole.inputs["input"][[7, 0, 7]])
        np.testing.assert_array_equal(part.targets, whole.targets[[7, 0, 7]])


def test_neighbours_of_one_size_come_together(tmp_path: Path) -> None:
    for number, side in enumerate((8, 8, 6, 8)):
        Image.new("RGB", (side, side), (number, 0, 0)).save(tmp_path / f"{number}.png")
    item = Input("input", (1, 3, 4, 4), dynamic=("batch", "height", "width"))
    data = open_data({"data": "."}, (item,), tmp_path)
    order = sorted(range(4), key=lambda row: float(next(data.take([row])).inputs["input"][0, 0, 0, 0]))
    sizes = [part.inputs["input"].shape for part in data.take(order)]
    assert sizes == [(2, 3, 8, 8), (1, 3, 6, 6), (1, 3, 8, 8)]
