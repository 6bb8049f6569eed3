"""The kernels of ±1 layers by themselves, on random layers and every instruction set: equal to a float convolution."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

import torch.nn.functional as F  # noqa: E402

from edgepack.export._c_bits import BLOCK, WORD, Layer, bits_of, packed_weight, rows_of  # noqa: E402
from edgepack.export._c_files import kernels  # noqa: E402
from edgepack.export._c_layers import Window  # noqa: E402
from edgepack.export._c_pack import pack  # noqa: E402
from edgepack.export._c_tree import Frame, tables  # noqa: E402
from edgepack.runtimes._c_build import library  # noqa: E402
from edgepack.trees import distances, spanning_tree  # noqa: E402

INT, POINTER = ctypes.c_int, ctypes.c_void_p
LEVELS = (0, 1, 2)


class Conv(ctypes.Structure):
    """nn_conv."""

    _fields_ = [
        *((name, INT) for name in ("batch", "height", "width", "groups", "inputs", "outputs")),
        *((name, INT) for name in ("rows", "columns", "length")),
        *((name, INT) for name in ("in_batch", "in_row", "in_pixel", "tap_row", "tap_column")),
        *((f"{side}_{step}", INT) for side in ("out", "add") for step in ("batch", "row", "pixel")),
        ("block", INT),
        *((name, ctypes.c_float) for name in ("slope", "low", "high")),
    ]  # fmt: skip


class Counts(ctypes.Structure):
    """nn_counts."""

    _fields_ = [
        (name, POINTER) for name in ("scale", "shift", "limit", "turn", "around", "row_class", "column_class")
    ] + [("column_classes", INT), ("places", INT)]  # fmt: skip


class TreeTables(ctypes.Structure):
    """nn_tree."""

    _fields_ = [
        *((name, INT) for name in ["variants", "words", "tile", "row_bytes", "rows", "band", "units"]),
        *((name, POINTER) for name in ("starts", "beyond")),
        *((name, INT) for name in ("step_row", "step_pixel", "counters", "outputs")),
        *((name, POINTER) for name in ("order", "places", "limits", "turn")),
    ]  # fmt: skip


class Drawn:
    """A layer with its input and what must come out.

    Attributes:
        bits: uint32 (batch, rows, columns, words), padded with zeros.
        reached: bool (batch, outputs, rows, columns).
    """

    def __init__(self, random: np.random.Generator, width: int | None = None) -> None:
        self.inputs, self.outputs = int(random.integers(1, 140)), int(random.integers(1, 70))
        size = tuple(int(random.integers(1, 4)) for _ in range(2))
        stride, dilation = (tuple(int(random.integers(1, 3)) for _ in range(2)) for _ in range(2))
        deep = [step * (side - 1) + 1 for step, side in zip(dilation, size, strict=True)]
        rows, columns = (least + int(random.integers(0, 40)) for least in deep)
        columns = columns if width is None else width
        self.said = (self.inputs, self.outputs, size, stride, dilation, rows, columns)
        image = random.random((int(random.integers(1, 3)), self.inputs, rows, columns)) < 0.5
        kept = random.random((1, self.inputs, *size)) < 0.5
        signs = kept ^ (random.random((self.outputs, self.inputs, *size)) < random.choice([0.02, 0.1, 0.4]))
        self.layer = Layer(signs, np.ones(self.outputs, np.float32), np.zeros(self.outputs, np.float32),
                           Window(size, stride, dilation), 1)  # fmt: skip
        self.bits = bits_of(image.transpose(0, 2, 3, 1))
        places = self.layer.places
        self.limit = random.integers(-1, 2 * places + 1, self.outputs).astype(np.int32)
        self.turn = random.random(self.outputs) < 0.5
        self.sums = F.conv2d(plus_minus(image), plus_minus(signs), None, stride, 0, dilation).numpy()
        self.reached = (places - self.sums <= self.limit[:, None, None]) ^ self.turn[:, None, None]

    def conv(self) -> Conv:
        (batch, rows, columns, words), slide = self.bits.shape, self.layer.window
        height, width = self.sums.shape[2:]
        out = -(-self.outputs // WORD)
        row = columns * words
        return Conv(
            batch=batch, height=height, width=width, groups=1, inputs=words, outputs=self.outputs, rows=slide.size[0],
            columns=slide.size[1], length=words, in_batch=rows * row, in_row=slide.stride[0] * row,
            in_pixel=slide.stride[1] * words, tap_row=slide.dilation[0] * row, tap_column=slide.dilation[1] * words,
            out_batch=height * width * out, out_row=width * out, out_pixel=out,
            block=BLOCK, slope=1.0, low=-np.inf, high=np.inf,
        )  # fmt: skip

    def wanted(self) -> np.ndarray[Any, Any]:
        return bits_of(self.reached.transpose(0, 2, 3, 1))


def plus_minus(flags: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.where(flags, 1.0, -1.0).astype(np.float32))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, ctypes.CDLL]:
    """The kernels, compiled for each instruction set."""
    folder = tmp_path_factory.mktemp("kernels")
    wanted = {name: text for name, text in kernels().items() if name.startswith("bits") or name in
              ("nn.h", "planes.h", "choose.h")}  # fmt: skip
    for name, text in wanted.items():
        (folder / name).write_text(text)
    return {level: ctypes.CDLL(str(library(folder, sorted(wanted), [f"-DNN_LEVEL={level}"]))) for level in LEVELS}


def pointers(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, int]:
    return {name: array.ctypes.data for name, array in arrays.items()}


def by_output(drawn: Drawn, engine: ctypes.CDLL) -> np.ndarray[Any, Any]:
    weights = pack(blocks(packed_weight(drawn.layer)), 1, drawn.layer.signs[0, 0].size)
    arrays = {"limit": rows_of(drawn.limit, 1, -1), "turn": np.append(bits_of(drawn.turn), np.uint32(0))}
    made, conv = np.zeros_like(drawn.wanted()), drawn.conv()
    counts = Counts(places=drawn.layer.places, **pointers(arrays))
    image = np.append(drawn.bits.ravel(), np.zeros(16, np.uint32))  # kernels read whole vectors
    engine.nn_sign_bits(ctypes.byref(conv), ctypes.byref(counts), *map(data, (image, weights, made)))
    return made


def along_tree(drawn: Drawn, engine: ctypes.CDLL) -> np.ndarray[Any, Any]:
    _, _, columns, words = drawn.bits.shape
    slide, (height, width) = drawn.layer.window, drawn.sums.shape[2:]
    frame = Frame(height, width, slide.stride, slide.dilation, columns * words, words)
    tree = spanning_tree(distances(drawn.layer.signs.reshape(drawn.outputs, -1)))
    found = tables(drawn.layer.signs, tree, drawn.limit, drawn.turn, frame)
    assert found is not None
    scratch = np.full(found.scratch_bytes + 64, 0xA5, np.uint8)
    start = scratch[-scratch.ctypes.data % 64 :]
    made, conv = np.zeros_like(drawn.wanted()), drawn.conv()
    table = TreeTables(**found.numbers, **pointers(found.arrays))
    image = np.append(drawn.bits.ravel(), np.zeros(16, np.uint32))
    engine.nn_tree_bits(ctypes.byref(conv), ctypes.byref(table), *map(data, (image, start, made)))
    assert (scratch[-64 + (-scratch.ctypes.data % 64) :] == 0xA5).all(), "written behind its memory"
    return made


def data(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def blocks(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    whole = np.zeros((-(-len(weight) // BLOCK) * BLOCK, *weight.shape[1:]), np.uint32)
    whole[: len(weight)] = weight
    return whole


def compare(drawn: Drawn, libraries: Mapping[int, ctypes.CDLL]) -> None:
    wanted = drawn.wanted()
    for level, engine in libraries.items():
        for kernel in (by_output, along_tree):
            if kernel is along_tree and drawn.outputs < 2:
                continue
            np.testing.assert_array_equal(
                kernel(drawn, engine), wanted, err_msg=f"{kernel.__name__} {level} {drawn.said}"
            )


def test_random_layers(libraries: Mapping[int, ctypes.CDLL]) -> None:
    random = np.random.default_rng(0)
    for _ in range(150):
        compare(Drawn(random), libraries)


@pytest.mark.slow
def test_a_thousand_random_layers(libraries: Mapping[int, ctypes.CDLL]) -> None:
    random = np.random.default_rng(1)
    for _ in range(1000):
        compare(Drawn(random), libraries)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 31, 33, 56, 64, 65, 120, 260, 300, 511, 512, 513, 700])
def test_widths_that_fill_units_and_that_do_not(width: int, libraries: Mapping[int, ctypes.CDLL]) -> None:
    random = np.random.default_rng(width)
    for _ in range(4):
        drawn = None
        while drawn is None or drawn.sums.size > 2_000_000:
            try:
                drawn = Drawn(random, width)
            except RuntimeError:  # a kernel wider than the image
                drawn = None
        compare(drawn, libraries)
