"""Operator by operator, a lifted ONNX file computes what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")

from _lifting import N, check, compare, ints, random, write
from edgepack.models.onnx import lift_onnx

W45, B5, B4 = random(4, 5), random(5), random(4)
CASES: dict[str, tuple[list[Any], tuple[int, ...], dict[str, np.ndarray[Any, Any]]]] = {
    "conv, uneven pads": (
        [N("Conv", ["x", "w", "b"], ["y"], pads=[0, 0, 1, 1], strides=[2, 2])],
        (3, 8, 8),
        {"w": random(4, 3, 3, 3), "b": random(4)},
    ),
    "conv, same upper": (
        [N("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])],
        (3, 9, 8),
        {"w": random(4, 3, 3, 3)},
    ),
    "depthwise, dilated": (
        [N("Conv", ["x", "w"], ["y"], group=4, dilations=[2, 2], pads=[2, 2, 2, 2])],
        (4, 8, 8),
        {"w": random(4, 1, 3, 3)},
    ),
    "transposed conv": (
        [N("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1, 1, 0, 0], group=2)],
        (4, 5, 6),
        {"w": random(4, 3, 3, 3), "b": random(6)},
    ),
    "batch norm": (
        [N("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], epsilon=1e-3)],
        (4, 5, 5),
        {"s": random(4), "b": random(4), "m": random(4), "v": np.abs(random(4)) + 0.5},
    ),
    "gemm": (
        [N("Flatten", ["x"], ["f"]), N("Gemm", ["f", "w", "b"], ["y"], alpha=0.5, beta=2.0)],
        (2, 3, 2),
        {"w": random(12, 5), "b": random(5)},
    ),
    "linear": ([N("MatMul", ["x", "w"], ["m"]), N("Add", ["b", "m"], ["y"])], (3, 4), {"w": W45, "b": B5}),
    "matmul of data": ([N("Transpose", ["x"], ["t"], perm=[0, 2, 1]), N("MatMul", ["x", "t"], ["y"])], (3, 4), {}),
    "layer norm": (
        [N("LayerNormalization", ["x", "s", "b"], ["y"], axis=-1, epsilon=1e-6)],
        (3, 8),
        {"s": random(8), "b": random(8)},
    ),
    "instance norm": ([N("InstanceNormalization", ["x", "s", "b"], ["y"])], (4, 5, 5), {"s": B4, "b": B4}),
    "prelu": ([N("PRelu", ["x", "s"], ["y"])], (4, 5, 5), {"s": random(4, 1, 1)}),
    "average pool, pads not counted": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
        (2, 8, 8),
        {},
    ),
    "average pool, pads counted": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        (2, 7, 7),
        {},
    ),
    "average pool, even pads": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        (2, 7, 7),
        {},
    ),
    "max pool": (
        [N("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)],
        (2, 8, 8),
        {},
    ),
    "max pool, uneven pads": (
        [N("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1])],
        (2, 7, 7),
        {},
    ),
    "global pools": (
        [N("GlobalAveragePool", ["x"], ["a"]), N("GlobalMaxPool", ["x"], ["b"]), N("Sub", ["a", "b"], ["y"])],
        (2, 5, 6),
        {},
    ),
    "activations": (
        [
            N("LeakyRelu", ["x"], ["a"], alpha=0.05),
            N("HardSigmoid", ["a"], ["b"], alpha=1 / 6, beta=0.5),
            N("HardSwish", ["b"], ["c"]),
            N("Elu", ["c"], ["d"]),
            N("Softmax", ["d"], ["e"], axis=1),
            N("HardSigmoid", ["e"], ["f"]),
            N("Clip", ["f", "lo", "hi"], ["g"]),
            N("Erf", ["g"], ["h"]),
            N("Pow", ["h", "three"], ["y"]),
        ],
        (3, 4),
        {"lo": np.float32(0.1), "hi": np.float32(0.9), "three": np.float32(3)},
    ),
    "gelu": ([N("Gelu", ["x"], ["a"]), N("Gelu", ["a"], ["y"], approximate="tanh")], (3, 4), {}),
    "reductions": (
        [
            N("ReduceMean", ["x", "axes"], ["a"], keepdims=1),
            N("ReduceMax", ["x", "axes"], ["b"], keepdims=1),
            N("ReduceL2", ["x", "axes"], ["c"], keepdims=1),
            N("ReduceSum", ["x", "axes"], ["d"], keepdims=1),
            N("Sum", ["a", "b", "c", "d"], ["e"]),
            N("ReduceProd", ["e", "last"], ["y"], keepdims=0),
        ],
        (3, 4, 5),
        {"axes": ints(2, 3), "last": ints(1)},
    ),
    "shapes that fold": (
        [
            N("Shape", ["x"], ["s"]),
            N("Gather", ["s", "zero"], ["n"], axis=0),
            N("Unsqueeze", ["n", "axis"], ["n1"]),
            N("Concat", ["n1", "rest"], ["target"], axis=0),
            N("Reshape", ["x", "target"], ["r"]),
            N("Slice", ["s", "axis", "two"], ["n2"]),
            N("Concat", ["n2", "ones"], ["wide"], axis=0),
            N("Equal", ["wide", "minus"], ["eq"]),
            N("Where", ["eq", "fill", "wide"], ["shape"]),
            N("Expand", ["token", "shape"], ["t"]),
            N("Concat", ["t", "r"], ["y"], axis=1),
        ],
        (4, 3, 2),
        {
            "zero": np.int64(0),
            "axis": ints(0),
            "two": ints(1),
            "rest": ints(-1, 4),
            "ones": ints(1, 4),
            "minus": ints(-1, -1, -1),
            "fill": ints(1, 1, 1),
            "token": random(1, 1, 4),
        },
    ),
    "slices and pieces": (
        [
            N("Slice", ["x", "starts", "ends", "axes", "steps"], ["a"]),
            N("Split", ["a", "parts"], ["b", "c"], axis=1),
            N("Pad", ["c", "pads", "value"], ["d"]),
            N("Pad", ["d", "reflect"], ["e"], mode="reflect"),
            N("Gather", ["e", "order"], ["y"], axis=2),
            N("Squeeze", ["b", "one"], ["unused"]),
        ],
        (4, 8, 6),
        {
            "starts": ints(1, 0),
            "ends": ints(2**62, 8),
            "axes": ints(1, 2),
            "steps": ints(1, 2),
            "parts": ints(1, 2),
            "pads": ints(0, 0, 1, 0, 0, 1, 0, 2),
            "reflect": ints(0, 0, 1, 1, 0, 0, 1, 1),
            "value": np.float32(0.5),
            "order": ints(2, 0, -1),
            "one": ints(1),
        },
    ),
    "depth to space, both orders": (
        [
            N("DepthToSpace", ["x"], ["a"], blocksize=2, mode="CRD"),
            N("SpaceToDepth", ["a"], ["b"], blocksize=2),
            N("DepthToSpace", ["b"], ["y"], blocksize=2),
        ],
        (8, 3, 4),
        {},
    ),
    "resize, nearest": (
        [N("Resize", ["x", "", "scales"], ["y"], coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 3], np.float32)},
    ),
    "resize, nearest half pixel": (
        [N("Resize", ["x", "", "scales"], ["y"])],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize, linear": (
        [N("Resize", ["x", "", "scales"], ["y"], mode="linear")],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 1.5], np.float32)},
    ),
    "resize, cubic": (
        [N("Resize", ["x", "", "scales"], ["y"], mode="cubic")],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "top k": ([N("TopK", ["x", "k"], ["y", "i"], axis=-1)], (3, 8), {"k": ints(3)}),
    "einsum and where": (
        [
            N("Einsum", ["x", "x"], ["a"], equation="bij,bkj->bik"),
            N("Greater", ["a", "zero"], ["c"]),
            N("Where", ["c", "a", "zero"], ["y"]),
        ],
        (3, 4),
        {"zero": np.float32(0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str, tmp_path: Path) -> None:
    nodes, shape, constants = CASES[name]
    check(write(tmp_path / "m.onnx", nodes, {"x": ("n", *shape)}, constants, opset=20), shape)


def test_lstm(tmp_path: Path) -> None:
    constants = {"w": random(2, 12, 4), "r": random(2, 12, 3), "b": random(2, 24)}
    node = N("LSTM", ["x", "w", "r", "b"], ["y", "h", "c"], hidden_size=3, direction="bidirectional")
    path = write(tmp_path / "m.onnx", [node], {"x": ("t", 2, 4)}, constants, ("y", "h", "c"))
    compare(path, lift_onnx(path), {"x": random(5, 2, 4)})
