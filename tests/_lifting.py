"""Small ONNX files, and the comparison of a lifted one with what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import onnx
import onnxruntime as ort
from edgepack.models.onnx import lift_onnx
from onnx import TensorProto, helper, numpy_helper

DYNAMIC = torch.export.Dim.DYNAMIC
N = helper.make_node
Shape = Sequence[int | str]


def write(
    path: Path,
    nodes: Sequence[Any],
    inputs: dict[str, Shape],
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def reference(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    results: list[np.ndarray[Any, Any]] = session.run(None, arrays)
    return results


def compare(path: Path, module: nn.Module, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    with torch.no_grad():
        results = module(*(torch.from_numpy(array) for array in arrays.values()))
    results = results if isinstance(results, tuple) else (results,)
    for ours, theirs in zip(results, reference(path, arrays), strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1e-6)


def check(path: Path, shape: Sequence[int], batches: Sequence[int] = (1, 3)) -> Any:
    """Parity for several batch sizes, directly and after another capture with a dynamic batch."""
    lifted = lift_onnx(path)
    (name,) = lifted.meta["input_names"]
    example = (torch.rand(2, *shape),)
    again = torch.export.export(lifted, example, dynamic_shapes=({0: DYNAMIC},), strict=False).module()
    for batch in batches:
        array = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
        compare(path, lifted, {name: array})
        compare(path, again, {name: array})
    return lifted


def random(*shape: int) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(1).standard_normal(shape) * 0.5).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)
