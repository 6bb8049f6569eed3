"""Data sources: .npz, folders, pairs, callables; what they give and how they refuse."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgepack import usercode
from edgepack.data import Arrays, Batch, DataSpec, open_data
from edgepack.errors import InputError
from edgepack.metrics import find
from edgepack.models import torchvision_schemas
from edgepack.task import Input, Task

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
RGB = Input("input", (1, 3, 6, 5), scale=255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GRAY = Input("input", (1, 1, 6, 5))
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(7) % 3


def save(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder


def all_of(data: Any, size: int = 3) -> Batch:
    """Every sample in one batch."""
    found = list(data.batches(size))
    assert all(len(batch) <= size for batch in found)
    assert sum(len(batch) for batch in found) == len(data)
    names = found[0].inputs
    targets = None if found[0].targets is None else np.concatenate([batch.targets for batch in found])
    return Batch(
        {name: np.concatenate([batch.inputs[name] for batch in found]) for name in names},
        {name: np.concatenate([batch.raw[name] for batch in found]) for name in names},
        targets,
    )


def refuse(spec: Any, inputs: Any, folder: Path, *texts: str, read: bool = False) -> None:
    def attempt() -> None:
        data = open_data(spec, inputs if isinstance(inputs, tuple) else (inputs,), folder)
        if read:
            all_of(data)

    with pytest.raises(InputError) as caught:
        attempt()
    for text in texts:
        assert text in str(caught.value)


# --- npz ---


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


# --- image folders ---


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


# --- pairs ---


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


# --- callables ---

CODE = """
import numpy as np
X = np.arange(12, dtype=np.float32).reshape(4, 3)
def arrays(scale=1): return X * scale, np.arange(4)
def tables(): return {"a": X, "b": X[:, :2]}, None
def samples(): return [(row, index) for index, row in enumerate(X)]
def generator():
    for row in X: yield {"input": row}
class Lazy:
    def __len__(self): return 4
    def __getitem__(self, index): return X[index], X[index] * 2
def nan(): return [(row * np.nan, 0) for row in X]
def late(): return [(X[0], 0), (X[0][:2], 0)]
def crash(): return 1 / 0
def crash_late():
    yield X[0]
    raise RuntimeError("disk gone")
def empty(): return []
def number(): return 5
def named(): return [({"inptu": X[0]}, 0)]
value = 3
"""
VECTOR = Input("input", (1, 3), scale=9)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "data.py").write_text(CODE)
    return tmp_path


@pytest.mark.parametrize("name", ["arrays", "samples", "generator", "Lazy"])
def test_callable_forms(code: Path, name: str) -> None:
    """Already preprocessed: the input's scale is not applied."""
    data = open_data({"data": f"data.py:{name}", "samples": 3}, (VECTOR,), code)
    got = all_of(data, 2)
    assert got.inputs["input"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    wanted = {"generator": None, "Lazy": [[0, 2, 4], [6, 8, 10], [12, 14, 16]]}.get(name, [0, 1, 2])
    assert (None if got.targets is None else got.targets.tolist()) == wanted
    assert len(all_of(data)) == 3  # can be read again


def test_callable_options_and_tables(code: Path) -> None:
    scaled = open_data({"data": "data.py:arrays", "options": {"scale": 2}}, (VECTOR,), code)
    assert all_of(scaled).inputs["input"][1].tolist() == [6, 8, 10]
    both = open_data("data.py:tables", (Input("a", (1, 3)), Input("b", (1, 2))), code)
    assert isinstance(both, Arrays)
    assert all_of(both).inputs["b"].shape == (4, 2)


@pytest.mark.parametrize(
    "name, texts",
    [
        ("array", ["data.py has no 'array'", "did you mean 'arrays'"]),
        ("value", ["is not callable"]),
        ("crash", ["data.py:crash failed: ZeroDivisionError"]),
        ("crash_late", ["RuntimeError: disk gone"]),
        ("empty", ["gives no samples"]),
        ("number", ["data.py:number failed: TypeError"]),
        ("nan", ["sample 0 holds NaN"]),
        ("late", ["sample 1 has shape (2,), expected (3) for input 'input'"]),
        ("named", ["gives inputs ['inptu'], expected ['input']"]),
        ("tables", ["gives inputs ['a', 'b'], expected ['input']"]),
    ],
)
def test_callable_refused(code: Path, name: str, texts: list[str]) -> None:
    refuse(f"data.py:{name}", VECTOR, code, *texts, read=True)


def test_code_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(0)\n")
    refuse("bad.py:f", VECTOR, tmp_path, "bad.py failed: SystemExit")
    (tmp_path / "bad.py").write_text("def f(:\n")
    refuse("bad.py:f", VECTOR, tmp_path, "failed: SyntaxError")
    refuse("gone.py:f", VECTOR, tmp_path, "gone.py does not exist")
    refuse("no_such_package.sub:f", VECTOR, tmp_path, "there is no module 'no_such_package.sub'")


def test_neighbours_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "beside_this.py").write_text("import numpy as np\nX = np.ones((2, 3), np.float32)\n")
    (tmp_path / "data.py").write_text("from beside_this import X\ndef f(): return X, None\n")
    assert len(open_data("data.py:f", (VECTOR,), tmp_path)) == 2


# --- real data, where this checkout has them beside it ---

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")


@needs_shared
def test_real_sets_open() -> None:
    image = Input("input", (1, 3, 224, 224), resize=256)
    data = open_data({"data": "imagenet_sample", "samples": 5}, (image,), SHARED)
    assert next(data.batches(5)).inputs["input"].shape == (5, 3, 224, 224)
    free = Input("input", (1, 3, 64, 64), dynamic=("batch", "height", "width"), scale=255)
    pairs = open_data({"inputs": "set5/LR_x2", "targets": "set5/HR"}, (free,), SHARED)
    for batch in pairs.batches(1):
        assert batch.targets is not None
        assert [2 * side for side in batch.inputs["input"].shape[2:]] == list(batch.targets.shape[2:])


IMAGENET = {"scale": 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    "network, weights, item, spec, metric, wanted",
    [
        (
            "resnet20", "resnet20_cifar10", Input("input", (1, 3, 32, 32), **IMAGENET),
            {"data": "cifar10_test.npz", "samples": 1000}, "top1", "91.40 %",
        ),
        (  # 42.67 % where the crop of images of odd length starts one pixel earlier than torchvision's
            "mobilenet_v1_025", "mobilenet_v1_025_imagenet", Input("input", (1, 3, 224, 224), resize=256, **IMAGENET),
            "imagenet_sample", "top1", "42.00 %",
        ),
        (
            "imdn_x2", "imdn_x2", Input("input", (1, 3, 64, 64), scale=255, dynamic=("batch", "height", "width")),
            {"inputs": "set5/LR_x2", "targets": "set5/HR"}, "psnr_y", "37.91 dB",
        ),
    ],
)  # fmt: skip
def test_published_scores(network: str, weights: str, item: Input, spec: Any, metric: str, wanted: str) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    from safetensors.torch import load_file

    module = usercode.load(f"models.py:{network}", Path(__file__).parents[1] / "examples" / "zoo")().eval()
    module.load_state_dict(load_file(SHARED / f"{weights}.safetensors"))
    found = find(metric, SHARED)
    with torch.no_grad():
        rows = [
            found.statistics(module(torch.from_numpy(batch.inputs["input"])).numpy(), batch.targets)
            for batch in open_data(spec, (item,), SHARED).batches(50)
        ]
    assert found.format(found.reduce(np.concatenate(rows))) == wanted
