"""Data from folders of images: classes, geometry, and pairs of folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from _reading import GRAY, RGB, all_of, refuse
from edgepack.data import open_data
from edgepack.models import torchvision_schemas
from edgepack.task import Input


def picture(path: Path, size: tuple[int, int], value: int, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(path)
    return path


def photos(folder: Path) -> Path:
    for index in range(4):
        picture(folder / "cat" / f"{index}.png", (5, 6), index)
    for index in range(2):
        picture(folder / "ant" / f"{index}.JPG", (5, 6), 100 + 50 * index)
    return folder


def test_folder_of_classes_takes_turns(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    plain = Input("input", (1, 3, 6, 5))
    data = open_data({"data": "photos", "samples": 4}, (plain,), tmp_path)
    got = all_of(data)
    assert data.labels == ("ant", "cat")
    assert got.targets is not None
    assert got.targets.tolist() == [0, 1, 0, 1]
    assert got.raw["input"].shape == (4, 6, 5, 3)
    whole = [all_of(open_data({"data": "photos", "seed": seed}, (plain,), tmp_path)) for seed in (0, 0, 1, 2, 3)]
    reds = [batch.raw["input"][:, 0, 0, 0].tolist() for batch in whole]
    assert reds[0] == reds[1]
    assert len({tuple(order) for order in reds}) > 1
    assert len(set(reds[0])) == 6


def test_folder_labels_txt_and_numbers(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    (tmp_path / "photos" / "labels.txt").write_text("dog\ncat\nant\n")
    data = open_data("photos", (Input("input", (1, 3, 6, 5)),), tmp_path)
    assert data.labels == ("dog", "cat", "ant")
    (tmp_path / "photos" / "labels.txt").write_text("dog\ncats\n")
    refuse("photos", RGB, tmp_path, "class 'ant' is not in labels.txt")
    for number in (2, 10):
        picture(tmp_path / "digits" / str(number) / "a.png", (5, 6), number)
    assert open_data("digits", (RGB,), tmp_path).labels == ("2", "10")


def test_folder_without_classes(tmp_path: Path) -> None:
    picture(tmp_path / "flat" / "a.png", (5, 6), 7, "L")
    assert all_of(open_data("flat", (GRAY,), tmp_path)).targets is None


@pytest.mark.parametrize("column, classes", [("class_index", "7 2"), ("label", "dog cat"), ("class", "dog cat")])
def test_labels_csv(tmp_path: Path, column: str, classes: str) -> None:
    first, second = classes.split()
    for name in ("a", "b"):
        picture(tmp_path / "set" / f"{name}.png", (5, 6), ord(name))
    (tmp_path / "set" / "labels.csv").write_text(f"file,{column}\na.png,{first}\nb.png,{second}\n")
    data = open_data("set", (Input("input", (1, 3, 6, 5)),), tmp_path)
    got = all_of(data)
    assert got.targets is not None
    found = dict(zip(got.raw["input"][:, 0, 0, 0].tolist(), got.targets.tolist(), strict=True))
    assert found == ({97: 7, 98: 2} if column == "class_index" else {97: 1, 98: 0})
    assert data.labels == (() if column == "class_index" else ("cat", "dog"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,class_index\n", "holds no rows"),
        ("name,class_index\na.png,1\n", "needs the columns 'file'"),
        ("file,kind\na.png,1\n", "needs the columns 'file' and one of class_index, label, class"),
        ("file,label\na.png,\n", "line 2: 'file' or 'label' is empty"),
        ("file,label\na.png,x\ngone.png,y\n", "line 3: gone.png does not exist"),
    ],
)
def test_labels_csv_refused(tmp_path: Path, text: str, message: str) -> None:
    picture(tmp_path / "set" / "a.png", (5, 6), 1)
    (tmp_path / "set" / "labels.csv").write_text(text)
    refuse("set", RGB, tmp_path, "labels.csv", message)


@pytest.mark.parametrize("size", [(301, 256), (256, 257), (300, 200), (64, 91), (224, 224), (225, 224)])
@pytest.mark.parametrize("resize", [256, 224])
def test_geometry_equals_torchvision(tmp_path: Path, size: tuple[int, int], resize: int) -> None:
    pytest.importorskip("torch", reason="pip install torch")
    torchvision_schemas.define()
    transforms = pytest.importorskip("torchvision.transforms", reason="pip install torchvision", exc_type=ImportError)

    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    (tmp_path / "set").mkdir()
    Image.fromarray(pixels).save(tmp_path / "set" / "a.png")
    item = Input("input", (1, 3, 224, 224), resize=resize)
    got = all_of(open_data("set", (item,), tmp_path)).raw["input"][0]
    wanted = transforms.CenterCrop(224)(transforms.Resize(resize)(Image.fromarray(pixels)))
    assert (got == np.asarray(wanted)).all()


def test_images_just_cover_without_resize(tmp_path: Path) -> None:
    """Width decides: 40x10 becomes 20x5 high, then the middle 5 rows are kept."""
    stripes = np.zeros((40, 10, 3), np.uint8)
    stripes[15:25] = 200
    (tmp_path / "set").mkdir()
    Image.fromarray(stripes).save(tmp_path / "set" / "a.png")
    got = all_of(open_data("set", (Input("input", (1, 3, 5, 5)),), tmp_path)).raw["input"][0]
    assert got.shape == (5, 5, 3)
    assert got[1:4, :, 0].min() > 150


def test_sizes_never_mix(tmp_path: Path) -> None:
    for index, size in enumerate([(8, 6), (8, 6), (4, 4), (8, 6)]):
        picture(tmp_path / "set" / f"{index}.png", size, index)
    free = Input("input", (1, 3, 8, 8), dynamic=("batch", "height", "width"))
    found = list(open_data("set", (free,), tmp_path).batches(9))
    assert sum(len(batch) for batch in found) == 4
    assert {batch.inputs["input"].shape[1:] for batch in found} == {(3, 6, 8), (3, 4, 4)}


def test_unreadable_images(tmp_path: Path) -> None:
    good = picture(tmp_path / "set" / "a.png", (5, 6), 1)
    (tmp_path / "set" / "b.png").write_bytes(good.read_bytes()[:40])
    refuse("set", RGB, tmp_path, "b.png: cannot be read as an image", read=True)
    (tmp_path / "set" / "b.png").unlink()
    Image.fromarray(np.full((6, 5), 40000, np.uint16)).save(tmp_path / "set" / "c.png")
    refuse("set", GRAY, tmp_path, "c.png", "only 8-bit", read=True)
    (tmp_path / "empty").mkdir()
    refuse("empty", RGB, tmp_path, "empty: holds no images")


def test_folders_need_one_image_input(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png", (5, 6), 1)
    refuse("set", Input("input", (1, 12)), tmp_path, "one image input")
    refuse("set", (RGB, GRAY), tmp_path, "one image input")
    refuse("set", Input("x", (1, 5, 6, 5), layout="NCHW"), tmp_path, "1, 3 or 4 channels")


def test_pairs_of_pictures_and_masks(tmp_path: Path) -> None:
    for name, size in (("a", (4, 3)), ("b", (6, 5))):
        picture(tmp_path / "low" / f"{name}.png", size, ord(name))
        picture(tmp_path / "high" / f"{name}.bmp", (2 * size[0], 2 * size[1]), 255)
        picture(tmp_path / "mask" / f"{name}.png", size, 7, "L")
    free = Input("input", (1, 3, 8, 8), dynamic=("batch", "height", "width"), scale=255)
    found = list(open_data({"inputs": "low", "targets": "high"}, (free,), tmp_path).batches(4))
    assert [batch.inputs["input"].shape for batch in found] == [(1, 3, 3, 4), (1, 3, 5, 6)]
    target = found[0].targets
    assert target is not None
    assert (target.shape, target.dtype) == ((1, 3, 6, 8), np.float32)
    assert (target[:, 0].min(), target[:, 1].max()) == (1, 0)
    masks = open_data({"inputs": "low", "targets": "mask", "masks": True, "samples": 1}, (free,), tmp_path)
    mask = next(masks.batches(4)).targets
    assert len(masks) == 1
    assert mask is not None
    assert (mask.shape, mask.dtype, mask.max()) == ((1, 3, 4), np.int64, 7)
    refuse({"inputs": "low", "targets": "mask"}, RGB, tmp_path, "a.png is 3x4, input 'input' is 6x5", read=True)
    refuse({"inputs": "low", "targets": "high", "masks": True}, free, tmp_path, "palette or gray", read=True)


def test_pairs_without_partner(tmp_path: Path) -> None:
    picture(tmp_path / "low" / "a.png", (4, 3), 1)
    picture(tmp_path / "high" / "b.png", (4, 3), 1)
    refuse({"inputs": "low", "targets": "high"}, RGB, tmp_path, "high: no partner for 'a' (2 files stand alone)")
    refuse({"inputs": "low", "targets": "gone"}, RGB, tmp_path, "gone: no such folder")
    picture(tmp_path / "low" / "a.bmp", (4, 3), 1)
    refuse({"inputs": "low", "targets": "high"}, RGB, tmp_path, "differ only in the suffix")
