"""Means of integers that fall halfway between two: either is right, nothing else is, in every engine."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.exporting import export, simulation_of  # noqa: E402
from edgepack.halves import apart, exact_steps  # noqa: E402
from edgepack.parity import runtime_for  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.stepwise import stepwise  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
WINDOWS = ((2, 2), (2, 4), (8, 8))
CHANNELS = 32


class Pools(nn.Module):
    """A linear layer on means over each window, one on the global mean, and one on mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(5, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        sizes = [CHANNELS * (8 // high) * (8 // wide) for high, wide in WINDOWS]
        self.join = nn.Linear(2 * CHANNELS, 4)
        self.heads = nn.ModuleList(nn.Linear(size, 4) for size in (*sizes, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(torch.relu(self.conv(x))))
        pools = [torch.flatten(nn.functional.avg_pool2d(x, window), 1) for window in WINDOWS]
        both = torch.cat([nn.functional.max_pool2d(x, 8), x.mean((2, 3), keepdim=True)], 1)  # all in the grid of x
        joined = self.join(torch.flatten(both, 1))
        return joined + sum(head(pool) for head, pool in zip(self.heads, (*pools, x.mean((2, 3))), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("pools")
    values = np.random.default_rng(0).standard_normal((24, 5, 8, 8)).astype(np.float32)
    task = Task((Input("x", (1, 5, 8, 8), layout="NCHW"),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(Pools().eval(), task, [Quantize(explain=False)], made, Silent())
    shutil.rmtree(made / "baseline")  # spares each export one more file
    return made


def exported(folder: Path, name: str) -> Artifact:
    from edgepack import parts
    from edgepack.contracts import Exporter

    return export(folder, [parts.find(Exporter, name)()], Silent())[0].artifact


@pytest.mark.parametrize(
    ("name", "engine"), [("onnx", "onnxruntime"), ("openvino", "openvino"), ("tflite", "ai_edge_litert")]
)
def test_every_window_in_every_engine(folder: Path, name: str, engine: str) -> None:
    pytest.importorskip(engine)
    parity = exported(folder, name).manifest.parity
    assert parity.status == "checked"
    assert parity.rounded is not None
    assert parity.rounded >= 6
    assert parity.rounded_otherwise is not None
    assert parity.rounded_otherwise <= 1e-3


def test_a_wrong_mean_is_found_all_the_same(folder: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    artifact = exported(folder, "tflite")
    inputs, simulation = artifact.golden().inputs, simulation_of(artifact)
    one = {name: array[:1] for name, array in inputs.items()}
    steps = runtime_for("tflite").trace(artifact, one)
    assert stepwise(simulation, one, steps).fault is None
    size = CHANNELS * 16  # windows of 2×2
    floored = [
        replace(step, outputs={k: v - (v.size == size) for k, v in step.outputs.items()}) for step in steps
    ]  # fmt: skip
    fault = stepwise(simulation, one, floored).fault
    assert fault is not None
    assert fault.operator == "avg_pool2d"


class Means(nn.Module):
    def __init__(self, scale: float, zero: int, window: tuple[int, int], whole: bool) -> None:
        super().__init__()
        self.how, self.window, self.whole = (scale, zero, -128, 127, torch.int8), window, whole

    def forward(self, stored: Tensor) -> Tensor:
        x = torch.ops.quantized_decomposed.dequantize_per_tensor(stored, *self.how)
        pool = x.mean((2, 3)) if self.whole else nn.functional.avg_pool2d(x, self.window)
        return torch.flatten(pool, 1)


def traced(module: nn.Module, stored: Tensor) -> tuple[Any, dict[Any, Any]]:
    """The result's node, and the values of inputs."""
    graph = torch.export.export(module, (stored,)).graph
    (given,) = graph.find_nodes(op="placeholder")
    (last,) = graph.find_nodes(op="output")
    return last.all_input_nodes[0], {given: stored}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31), zero=st.integers(-128, 127), scale=st.floats(2**-20, 2**10, width=32),
    window=st.sampled_from([(2, 2), (1, 3), (2, 3), (4, 4), (6, 6)]), whole=st.booleans(),
)  # fmt: skip
def test_halves_are_those_of_rational_numbers(
    seed: int, zero: int, scale: float, window: tuple[int, int], whole: bool
) -> None:
    stored = torch.from_numpy(np.random.default_rng(seed).integers(-128, 128, (1, 64, *window)).astype(np.int8))
    node, known = traced(Means(scale, zero, window, whole), stored)
    steps = exact_steps(node, known, scale)
    assert steps is not None
    sums = stored.numpy().astype(int).sum((2, 3)).reshape(-1) - zero * window[0] * window[1]
    exact = [Fraction(int(value), window[0] * window[1]) for value in sums]
    assert np.abs(steps.reshape(-1) - np.array([float(value) for value in exact])).max() < 1e-10
    down, up = (np.array([value.__floor__() + zero + by for value in exact]) for by in (0, 1))
    halves = np.array([value.denominator == 2 for value in exact])
    np.testing.assert_array_equal(apart(down, up, steps.reshape(-1), zero) == 0, halves)


def test_only_the_two_neighbours_of_a_half_are_right() -> None:
    steps = np.array([2.5, 2.5, 2.5, 2.5, 2.49])
    whole, wanted = np.array([12, 13, 14, 11, 13]), np.array([13, 12, 13, 12, 12])
    np.testing.assert_array_equal(apart(whole, wanted, steps, 10.0), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(apart(whole, wanted, None, 10.0), [1, 1, 1, 1, 1])


class Sigmoid(nn.Module):
    def forward(self, stored: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_tensor(stored, 0.1, 0, -128, 127, torch.int8).sigmoid()


def test_other_functions_have_no_exact_value() -> None:
    node, known = traced(Sigmoid(), torch.zeros(4, dtype=torch.int8))
    assert exact_steps(node, known, 0.1) is None
