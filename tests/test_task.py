"""Inputs, preprocessing, specs and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import samples
from edgepack.data import Arrays, Batch
from edgepack.errors import InputError
from edgepack.task import Input, Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_image_defaults() -> None:
    item = Input("image", (1, 3, 32, 24))
    assert item.layout == "NCHW"
    assert item.crop_size == (32, 24)
    assert item.channels == 3
    assert item.spec.shape == ("batch", 3, 32, 24)
    assert Input("tokens", (1, 77), dtype="int64").layout is None
    assert Input("features", (1, 64, 8, 8)).layout is None


@pytest.mark.parametrize(
    "dynamic, shape",
    [
        ((), (2, 3, 8, 8)),
        (("batch", "height", "width"), ("batch", 3, "height", "width")),
        ({"batch": 0, "columns": -1}, ("batch", 3, 8, "columns")),
    ],
)
def test_dynamic_axes(dynamic: Any, shape: tuple[int | str, ...]) -> None:
    assert Input("x", (2, 3, 8, 8), dynamic=dynamic).spec.shape == shape


def test_no_crop_where_size_is_free() -> None:
    item = Input("x", (1, 3, 8, 8), dynamic=("height", "width"))
    assert item.crop_size is None
    assert not item.preprocessing.crop


@given(st.integers(1, 4), st.sampled_from(["NCHW", "NHWC"]), st.floats(1, 300), st.integers(0, 9))
def test_preprocessing_is_the_formula(count: int, layout: str, scale: float, seed: int) -> None:
    shape = (1, 3, 4, 5) if layout == "NCHW" else (1, 4, 5, 3)
    raw = np.random.default_rng(seed).integers(0, 256, (count, *shape[1:]), dtype=np.uint8)
    item = Input("x", shape, layout=layout, mean=MEAN, std=STD, scale=scale)
    channel = np.moveaxis(raw.astype(np.float64), layout.index("C"), -1)
    wanted = np.moveaxis((channel / scale - np.array(MEAN)) / np.array(STD), -1, layout.index("C"))
    got = item.apply(raw)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_one_mean_for_all_channels_and_identity() -> None:
    raw = np.full((1, 3, 2, 2), 8, dtype=np.uint8)
    np.testing.assert_allclose(Input("x", (1, 3, 2, 2), mean=(0.5,), std=(0.5,), scale=16).apply(raw), 0)
    assert (Input("x", (1, 3, 2, 2), dtype="uint8").apply(raw) == raw).all()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"name": ""}, "needs a name"),
        ({"shape": (1, 0)}, "sizes from 1"),
        ({"shape": ()}, "sizes from 1"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"layout": "NCH"}, "3 axes"),
        ({"layout": "NCHH"}, "repeats"),
        ({"layout": "CNHW"}, "N not first"),
        ({"mean": (1.0, 2.0)}, "2 values, expected 1 or one per channel"),
        ({"std": (0.0,)}, "above 0"),
        ({"scale": float("nan")}, "finite"),
        ({"dtype": "uint8", "scale": 255}, "for float inputs"),
        ({"resize": 16}, "smaller than the input"),
        ({"dynamic": ("hight",)}, "did you mean 'height'"),
        ({"shape": (1, 5), "dynamic": ("height",)}, "needs a layout"),
        ({"dynamic": {"rows": 7}}, "distinct axes"),
        ({"dynamic": {"rows": 2, "more": -2}}, "distinct axes"),
    ],
)
def test_bad_inputs(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Input(**{"name": "x", "shape": (1, 3, 32, 32), **options})


def test_task_needs_distinct_names() -> None:
    for inputs in ((), (Input("x", (1, 2)), Input("x", (1, 2)))):
        with pytest.raises(ValueError, match="distinct names"):
            Task(inputs)


def test_noise_is_seeded_and_typed() -> None:
    task = Task((Input("image", (1, 3, 8, 8)), Input("ids", (1, 7), dtype="int64")))
    one, again, other = task.samples(5), task.samples(5), task.samples(5, seed=1)
    assert not task.has_data
    assert {name: (array.shape, str(array.dtype)) for name, array in one.items()} == {
        "image": ((5, 3, 8, 8), "float32"),
        "ids": ((5, 7), "int64"),
    }
    assert (one["image"] == again["image"]).all()
    assert (one["image"] != other["image"]).any()


def test_noise_for_images_is_pixels_through_their_preprocessing() -> None:
    item = Input("image", (1, 3, 8, 8), scale=255, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    found = Task((item,)).samples(2)["image"].astype(np.float64)
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (item.mean, item.std))
    pixels = (found * std + mean) * 255
    assert np.abs(pixels - np.rint(pixels)).max() < 1e-3
    assert pixels.min() > -0.5
    assert pixels.max() > 200


def test_noise_follows_the_batch_axis() -> None:
    task = Task((Input("x", (1, 3, 8, 8)), Input("state", (2, 1, 16), dynamic={"batch": 1}), Input("p", (5, 2))))
    found = task.samples(4)
    assert found["state"].shape == (2, 4, 16)
    fixed = Task((Input("points", (5, 2), dynamic=()),))
    assert fixed.samples(3)["points"].shape == (15, 2)
    assert samples.count(fixed.specs, fixed.samples(3)) == 3


def images(count: int, item: Input) -> Arrays:
    raw = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1) * np.ones((1, 4, 4, 1), np.float32)
    return Arrays((item,), {"x": raw}, None)


def test_samples_are_the_first_calibration_samples() -> None:
    item = Input("x", (1, 1, 4, 4))
    task = Task((item,), calibration=images(5, item), evaluation=images(9, item))
    assert task.has_data
    assert task.samples(3)["x"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert len(task.samples(8)["x"]) == 5
    assert len(Task((item,), evaluation=images(9, item)).samples(8)["x"]) == 8


def test_fixed_batch_takes_whole_batches() -> None:
    item = Input("x", (4, 1, 4, 4), dynamic=())
    assert len(Task((item,), calibration=images(11, item)).samples(2)["x"]) == 8
    assert len(Task((item,), calibration=images(11, item)).samples(5)["x"]) == 8
    with pytest.raises(InputError, match="less than one batch of 4"):
        Task((item,), calibration=images(3, item)).samples(1)


@dataclass
class TwoSizes:
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 4

    def batches(self, size: int) -> Iterator[Batch]:
        for number, side in enumerate((4, 6, 4, 6)):
            array = np.full((1, 1, side, side), number, np.float32)
            yield Batch({"x": array}, {"x": array.transpose(0, 2, 3, 1)}, None)


def test_samples_have_one_size() -> None:
    item = Input("x", (1, 1, 4, 4), dynamic=("batch", "height", "width"))
    assert Task((item,), evaluation=TwoSizes()).samples(4)["x"][:, 0, 0, 0].tolist() == [0, 2]
