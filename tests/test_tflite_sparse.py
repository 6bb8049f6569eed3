"""Sparse weights in TFLite files: what is stored, that engines compute the same, and which kernels take it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from _tflite_files import Written, worst, write
from edgepack import contents
from edgepack.export._tflite_chw import block_of
from edgepack.graph import capture
from edgepack.task import Input, Task

pytest.importorskip("litert_torch", reason="pip install edgepack[tflite]")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")


class Mobile(nn.Module):
    """As MobileNetV1: a first convolution of stride 2, depthwise and 1×1 ones, a mean, a linear layer."""

    def __init__(self, width: int = 16, outputs: int = 4) -> None:
        super().__init__()

        def separable(inputs: int, made: int, stride: int) -> list[nn.Module]:
            depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs)
            return [depthwise, nn.ReLU6(), nn.Conv2d(inputs, made, 1), nn.ReLU6()]

        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU6(), *separable(width, 2 * width, 1),
            *separable(2 * width, 4 * width, 2), *separable(4 * width, 4 * width, 1),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        result: torch.Tensor = self.head(pooled.flatten(1))
        return result


def with_zeros(module: nn.Module, share: float, kinds: Callable[[nn.Module], bool]) -> nn.Module:
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in module.modules():
            if kinds(layer):
                layer.weight *= torch.rand(layer.weight.shape, generator=random) >= share  # type: ignore[operator, union-attr]
    return module.eval()


def pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)


def heavy(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.Conv2d)) and getattr(layer, "groups", 1) == 1


def file_of(module: nn.Module, folder: Path, **options: object) -> Written:
    return write(capture(module, Task((Input("x", (1, 3, 32, 32)),))), folder, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    torch.manual_seed(0)
    return file_of(with_zeros(Mobile(), 0.8, pointwise), tmp_path_factory.mktemp("a") / "sparse")


def model_of(artifact: object) -> object:
    return schema.ModelT.InitFromPackedBuf(artifact.file(".tflite").read_bytes(), 0)  # type: ignore[attr-defined]


def test_zeros_are_not_stored_and_answers_stay(written: Written) -> None:
    artifact, simulation, census = written
    assert census.operators["DENSIFY"] == 3
    sparse = [tensor for tensor in model_of(artifact).subgraphs[0].tensors if tensor.sparsity is not None]  # type: ignore[attr-defined]
    stored = sum(len(model_of(artifact).buffers[tensor.buffer].data) for tensor in sparse)  # type: ignore[attr-defined]
    layers = [p for p in simulation.program.state_dict.values() if p.dim() == 4 and p.shape[2:] == (1, 1)]
    assert stored == 4 * sum(int((weight != 0).sum()) for weight in layers)
    for options in ({}, {"xnnpack": False}):
        assert worst(artifact, simulation, **options) < 1e-5


def test_contents_are_those_of_the_dense_weights(written: Written) -> None:
    _, simulation, census = written
    for weight in simulation.program.state_dict.values():
        if weight.dim() == 4 and weight.shape[2:] == (1, 1):
            assert contents.key(weight.detach().movedim(1, -1).numpy()) in census.contents or (
                contents.key(weight.detach().numpy()) in census.contents
            )


def test_the_mean_keeps_its_axes_for_the_engine_s_sake(written: Written) -> None:
    main = model_of(written[0]).subgraphs[0]  # type: ignore[attr-defined]
    (mean,) = [one for one in main.operators if isinstance(one.builtinOptions, schema.ReducerOptionsT)]
    assert mean.builtinOptions.keepDims
    assert list(main.tensors[mean.outputs[0]].shape) == [1, 1, 1, 64]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_every_kind_of_layer(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 300, 3), nn.ReLU(), nn.Conv2d(300, 12, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 40),
    )  # fmt: skip
    artifact, simulation, census = file_of(with_zeros(module, 0.9, heavy), tmp_path / "a", precision=precision)
    assert census.operators["DENSIFY"] == 4
    limit = 1e-5 if precision == "float32" else 2e-3
    assert worst(artifact, simulation) < limit
    assert worst(artifact, simulation, xnnpack=False) < limit
    dense, _, _ = file_of(module, tmp_path / "b", precision=precision)  # with zeros too, by now
    assert artifact.file(".tflite").stat().st_size == dense.file(".tflite").stat().st_size


def test_few_zeros_stay_dense(tmp_path: Path) -> None:
    torch.manual_seed(2)
    _, _, census = file_of(with_zeros(Mobile(), 0.2, pointwise), tmp_path / "a")
    assert "DENSIFY" not in census.operators


def test_a_layer_of_nothing_but_zeros(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = with_zeros(Mobile(), 0.8, pointwise)
    with torch.no_grad():
        module.features[4].weight.zero_()  # type: ignore[index, union-attr, operator]
    artifact, simulation, census = file_of(module, tmp_path / "a")
    assert census.operators["DENSIFY"] == 2
    assert np.isfinite(worst(artifact, simulation))


def said(census: object) -> str:
    (note,) = [note for note in census.notes if note.startswith(("XNNPACK computes", "no 1×1"))]  # type: ignore[attr-defined]
    return str(note)


def test_the_rules_name_what_starts_the_sparse_kernels(written: Written) -> None:
    assert said(written[2]).startswith(
        "XNNPACK computes 3 of 3 1×1 convolutions from their non-zero weights alone on ARM"
    )
    assert "on x86 with AVX" in said(written[2])


def test_every_layer_has_its_verdict(written: Written) -> None:
    by_layer = [note for note in written[2].notes if note.endswith("(zeros in brackets)")]
    assert len(by_layer) == 4
    first, sparse, depthwise, linear = (next(note for note in by_layer if word in note) for word in
                                        ("features.0 ", "non-zero weights", "depthwise", "linear layers"))  # fmt: skip
    assert "features.0 (0%) is computed densely: only 1×1 convolutions of stride 1 have a sparse kernel" in first
    assert all(f"features.{index} (" in sparse for index in (4, 8, 12))
    assert all(f"features.{index} (0%)" in depthwise for index in (2, 6, 10))
    assert linear.startswith("head (0%) is computed densely: linear layers have no sparse kernel")


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (2, 2), (4, 4)])
def test_channels_whose_zeros_are_shared_are_computed_together(rows: int, block: int) -> None:
    random = np.random.default_rng(rows)
    weight = random.standard_normal((32, 64)) * (random.random((32 // rows, 64)) < 0.2).repeat(rows, 0)
    assert block_of(weight) == block
    weight[:rows] = 1  # a few in whole blocks change nothing
    assert block_of(weight) == block
    assert block_of(weight[:1]) == 1


def changed(change: str) -> nn.Module:
    torch.manual_seed(4)
    module = Mobile()
    features = module.features
    if change == "first":
        features[0] = nn.Conv2d(3, 16, 3, 1, 1)
    elif change == "stranger":
        features[3] = nn.MaxPool2d(3, 1, 1)
    elif change == "padding":
        features[6] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(32, 32, 3, 2, groups=32))
    elif change == "kernel":
        features[2] = nn.Conv2d(16, 16, 3, padding=1)
    elif change == "outputs":
        module.head = nn.Linear(64, 500)
    return with_zeros(module, 0.8, pointwise)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("first", "no 3×3 convolution of stride 2 with padding 1 reads an input of three channels"),
        ("stranger", "MAX_POOL_2D"),
        ("padding", "a depthwise convolution that does not pad all sides alike"),
        ("kernel", "a convolution that is neither 1×1 nor the first"),
        ("outputs", "weights are zero"),
    ],
)
def test_the_rules_name_what_keeps_them_from_starting(tmp_path: Path, change: str, text: str) -> None:
    artifact, simulation, census = file_of(changed(change), tmp_path / "a")
    assert said(census).startswith("XNNPACK computes the 1×1 convolutions densely on every processor: ")
    assert text in said(census)
    by_layer = [note for note in census.notes if note.endswith("(zeros in brackets)")]
    assert any("features.4 (8" in note and "computed densely: " in note for note in by_layer)
    assert worst(artifact, simulation) < 1e-5
