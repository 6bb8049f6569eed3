"""Sparse 1×1 convolutions as C: small integers as floats, so that every sum is exact in any order."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _c_files import captured, engine, write  # noqa: E402
from _networks import Network  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.contracts import Graph  # noqa: E402
from edgepack.export import _c_planes  # noqa: E402
from edgepack.export._c_sparse import SPAN, best_block, columns, cost  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


# --- weights -------------------------------------------------------------------------------------------------------


def rebuilt(stored: object, outputs: int, inputs: int) -> np.ndarray:
    """The matrix that values and increments stand for, read as the kernel reads them."""
    block = stored.block  # type: ignore[attr-defined]
    found = np.zeros((-(-outputs // block) * block, inputs), np.float32)
    behind, values = iter(stored.behind), iter(stored.weights.reshape(-1, block))  # type: ignore[attr-defined]
    counts = iter(stored.counts)  # type: ignore[attr-defined]
    for part in range(stored.parts):  # type: ignore[attr-defined]
        for row in range(0, len(found), block):
            place = part * SPAN
            for _ in range(next(counts)):
                place += int(next(behind))
                found[row : row + block, place] = next(values)
    assert next(behind, None) is next(values, None) is next(counts, None) is None
    return found


@given(st.integers(1, 9), st.integers(1, 700), st.floats(0, 0.3), st.sampled_from((1, 2, 4)), st.integers(0, 99))
def test_values_and_increments_stand_for_the_weights(
    outputs: int, inputs: int, density: float, block: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((outputs, inputs)) * (random.random((outputs, inputs)) < density)).astype("f4")
    found = rebuilt(columns(weight, block), outputs, inputs)
    np.testing.assert_array_equal(found[:outputs], weight)
    assert not found[outputs:].any()


def test_blocks_store_what_their_outputs_share() -> None:
    weight = np.zeros((8, 16), np.float32)
    weight[:4, 3] = weight[4:, 9] = 1.0
    assert [columns(weight, block).weights.size for block in (1, 2, 4)] == [8, 8, 8]
    assert [columns(weight, block).behind.tolist() for block in (2, 4)] == [[3, 3, 9, 9], [3, 9]]
    assert best_block(weight, 64) == 4
    assert best_block(np.eye(16, dtype=np.float32), 64) == 1


def test_the_cost_falls_with_zeros_and_passes_that_of_the_dense_kernel() -> None:
    random = np.random.default_rng(0)
    dense, places = np.ones((64, 64), np.float32), random.random((64, 64))
    costs = [cost(dense * (places >= sparsity), 64, 1) for sparsity in (0.0, 0.5, 0.9)]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < 64 * 64 * 64 < costs[0]


# --- networks ------------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    """Weights and biases of −2 to 2."""
    made = nn.Conv2d(inputs, outputs, size, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return made


def point(inputs: int, outputs: int, density: float = 0.1, block: int = 1) -> nn.Conv2d:
    """A 1×1 convolution whose zeros are shared by ``block`` outputs."""
    made = conv(inputs, outputs)
    kept = torch.rand(-(-outputs // block), inputs) < density
    with torch.no_grad():
        made.weight.mul_(kept.repeat_interleave(block, 0)[:outputs, :, None, None])
    return made


def only(inputs: int, outputs: int, *places: tuple[int, int]) -> nn.Conv2d:
    """A 1×1 convolution with these weights alone."""
    made = point(inputs, outputs, 0.0)
    with torch.no_grad():
        for place in places:
            made.weight[place] = 3.0
    return made


def depth(channels: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return conv(channels, channels, size, groups=channels, **options)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(depth(inputs, stride=stride, padding=1), nn.ReLU6(), point(inputs, outputs), nn.ReLU6())


Case = tuple[Callable[..., Tensor], tuple[nn.Module, ...], tuple[int, ...]]


def straight(layer: nn.Module, *shape: int) -> Case:
    return (lambda layer, x: layer(x)), (layer,), (1, *shape)


torch.manual_seed(0)
CASES: dict[str, Case] = {
    **{f"{height}x{width} pixels": straight(point(24, 12), 24, height, width)
       for height, width in ((1, 2), (2, 1), (3, 5), (4, 4), (1, 17), (7, 7), (9, 7), (8, 8), (5, 13), (14, 14))},
    "no weight": straight(only(24, 9), 24, 5, 5),
    "one weight": straight(only(24, 9, (4, 20)), 24, 5, 5),
    "first and last": straight(only(24, 9, (0, 0), (8, 23)), 24, 5, 5),
    "one output": straight(point(40, 1), 40, 5, 5),
    "pairs": straight(point(32, 18, block=2), 32, 7, 7),
    "pairs, one left": straight(point(32, 17, block=2), 32, 7, 7),
    "fours": straight(point(32, 20, block=4), 32, 7, 7),
    "fours, three left": straight(point(32, 19, block=4), 32, 9, 5),
    "parts": straight(point(SPAN + 40, 20), SPAN + 40, 6, 5),
    "parts of fours": straight(point(2 * SPAN + 1, 20, block=4), 2 * SPAN + 1, 3, 6),
    "far apart": straight(only(3 * SPAN, 4, (0, 0), (0, 255), (0, 256), (0, 767), (3, 511)), 3 * SPAN, 3, 3),
    "batch": (lambda a, b, x: b(a(x)), (point(24, 16), point(16, 8)), (3, 24, 5, 3)),
    "leaky": (lambda a, x: F.leaky_relu(a(x), 0.5), (point(24, 16),), (1, 24, 7, 5)),
    "clipped": (lambda a, x: a(x).clamp(-3, 9), (point(24, 16),), (1, 24, 7, 5)),
    "not fused": (lambda a, x: a(x).abs() * 2 - 1, (point(24, 16),), (1, 24, 7, 5)),
    "sum": (lambda a, x: F.relu(a(x) + x), (point(24, 24),), (1, 24, 7, 5)),
    "sum in parts": (lambda a, b, x: F.relu(b(a(x)) + x), (point(48, SPAN + 9), point(SPAN + 9, 48)), (1, 48, 5, 5)),
    "sums": (lambda a, b, x: (y := F.relu(a(x))) + F.relu(b(y) + y), (point(24, 32), point(32, 32)), (1, 24, 5, 7)),
    "two readers": (lambda a, b, c, x: b(y := a(x)) * c(y), (point(24, 32), point(32, 8), point(32, 8)), (1, 24, 6, 6)),
    "part of the image": (lambda a, x: a(x[:, 4:28]), (point(24, 16),), (1, 32, 5, 5)),
    "rows of the image": (lambda a, x: a(x[:, :, 1:6]), (point(24, 16),), (1, 24, 8, 5)),
    "turned": (lambda a, x: a(x.transpose(2, 3)), (point(24, 16),), (1, 24, 8, 5)),
    "joined": (lambda a, b, x: b(torch.cat([a(x), x], 1)), (point(24, 16), point(40, 24)), (1, 24, 5, 5)),
    "pooled": (lambda a, b, x: b(F.max_pool2d(a(x), 3, 2, 1)), (point(24, 48), point(48, 24)), (1, 24, 9, 9)),
    "block": straight(block(24, 48), 24, 9, 9),
    "block, narrow": straight(block(24, 48), 24, 3, 2),
    "block, stride": straight(block(24, 48, 2), 24, 9, 11),
    "block, stride, even": straight(block(24, 48, 2), 24, 8, 18),
    "block, wide": straight(block(24, 48), 24, 5, 37),
    "block, tall": straight(block(24, 48), 24, 41, 3),
    "block, tall, stride": straight(block(24, 48, 2), 24, 71, 5),
    "residual": (lambda a, d, b, x: F.relu(b(F.relu(d(F.relu(a(x))))) + x),
                 (point(24, 48), depth(48, padding=1), point(48, 24)), (1, 24, 7, 6)),
    "summed window": (lambda a, d, b, x: b(F.relu(d(y := a(x)) + y)),
                      (point(24, 48), depth(48, padding=1), point(48, 24)), (1, 24, 7, 6)),
    "first layer": (lambda f, b, x: b(F.relu(f(x))), (conv(3, 9, 3, stride=2, padding=1), block(9, 16)),
                    (1, 3, 23, 37)),
    "first layer, uneven": (lambda f, b, x: b(F.relu(f(F.pad(x, (0, 1, 0, 1))))),
                            (conv(3, 8, 3, stride=2), block(8, 16)), (1, 3, 16, 16)),
    "five": (lambda a, d, b, x: b(d(a(x))), (point(24, 32), depth(32, 5, padding=2), point(32, 24)), (1, 24, 9, 7)),
    "dilated": (lambda a, d, b, x: b(d(a(x))), (point(24, 32), depth(32, 3, padding=2, dilation=2), point(32, 24)),
                (1, 24, 9, 7)),
    "dilated, stride 3": (lambda a, d, b, x: b(d(a(x))),
                          (point(24, 32), depth(32, 3, padding=2, dilation=2, stride=3), point(32, 24)),
                          (1, 24, 11, 13)),
    "strides beyond the kernel": (lambda a, d, b, x: b(d(a(x))),
                                  (point(24, 32), depth(32, 2, stride=(4, 3)), point(32, 24)), (1, 24, 15, 14)),
    "grouped": (lambda a, d, b, x: b(d(a(x))), (point(24, 32), conv(32, 48, 3, groups=16), point(48, 24)),
                (1, 24, 7, 7)),
    "mean": (lambda a, x: a(x).mean((2, 3)) * 64, (point(24, 32),), (1, 24, 8, 8)),
    "gate": (lambda a, b, x: b((y := a(x)) * y.mean((2, 3), keepdim=True) * 64), (point(24, 32), point(32, 9)),
             (1, 24, 8, 8)),
}  # fmt: skip


def whole(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {spec.name: random.integers(-3, 4, spec.shape).astype(np.float32) for spec in graph.inputs}


class All(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cases = nn.ModuleList(Network(function, *layers) for function, layers, _ in CASES.values())

    def forward(self, x: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(case(one) for case, one in zip(self.cases, x, strict=True))


def all_cases() -> Graph:
    """All cases in one network with an output for each: one capture, one compilation."""
    inputs = tuple(Input(f"x{place}", shape, dynamic=()) for place, (_, _, shape) in enumerate(CASES.values()))
    names = ", ".join(item.name for item in inputs)
    scope: dict = {}
    exec(f"def forward(self, {names}): return self.all([{names}])", scope)
    outer = type("Outer", (nn.Module,), {"forward": scope["forward"]})()
    outer.all = All()
    return capture(outer.eval(), Task(inputs, output_names=tuple(f"y{place}" for place in range(len(CASES)))))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Graph]:
    with pytest.MonkeyPatch.context() as patch:  # whatever it costs
        patch.setattr(_c_planes, "cost", lambda *_: 0.0)
        return write(all_cases(), tmp_path_factory.mktemp("sparse") / "c")


@pytest.fixture(scope="module")
def answers(everything: tuple[Artifact, Graph]) -> tuple[dict, dict]:
    artifact, simulation = everything
    given = whole(simulation)
    return run_graph(simulation, given), {level: engine(level).load(artifact).run(given) for level in (0, 1, 2)}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_pytorch(name: str, answers: tuple[dict, dict]) -> None:
    wanted, found = answers
    key = f"y{list(CASES).index(name)}"
    for level, outputs in found.items():
        np.testing.assert_array_equal(outputs[key], wanted[key], err_msg=f"level {level}")


def test_nearly_every_convolution_of_pixels_is_sparse_there(everything: tuple[Artifact, Graph]) -> None:
    counted = everything[0].manifest.census["operators"]  # type: ignore[index]
    points = sum(conv.kernel_size == (1, 1) for conv in All().modules() if isinstance(conv, nn.Conv2d))
    assert counted["sparse_f32"] > 0.9 * points  # not those that are worth no transposition even at no cost


def operators(module: nn.Module, *shape: int, folder: Path) -> dict[str, int]:
    artifact, simulation = write(captured(module, *shape), folder / "c")
    given = whole(simulation)
    (wanted,), (found,) = run_graph(simulation, given).values(), engine().load(artifact).run(given).values()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    return dict(artifact.manifest.census["operators"])  # type: ignore[index]


def test_a_mobile_network_is_computed_without_a_transposition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = (conv(3, 24, 3, stride=2, padding=1), nn.ReLU6())
    layers = (*first, block(24, 48), block(48, 64, 2), block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = operators(nn.Sequential(*layers, nn.Linear(64, 5)), 1, 3, 32, 32, folder=tmp_path)
    assert found == {"window_f32": 4, "sparse_f32": 3, "reduce_f32": 1, "conv_f32": 1}


def test_inverted_residuals_stay_in_planes(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def inverted() -> nn.Module:
        return Residual(point(24, 96), nn.ReLU6(), depth(96, padding=1), nn.ReLU6(), point(96, 24))

    layers = (conv(3, 24, 3, stride=2, padding=1), inverted(), inverted(), nn.AdaptiveAvgPool2d(1))
    found = operators(nn.Sequential(*layers), 1, 3, 32, 32, folder=tmp_path)
    assert found == {"window_f32": 3, "sparse_f32": 4, "reduce_f32": 1}


def test_dense_weights_stay_with_channels_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (point(24, 64, 1.0), nn.ReLU(), depth(64, padding=1), point(64, 64, 0.9))
    found = operators(nn.Sequential(*layers), 1, 24, 12, 12, folder=tmp_path)
    assert "sparse_f32" not in found
    assert found["conv_f32"] == 2


def test_one_sparse_layer_among_dense_ones_is_worth_no_transposition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (conv(8, 16, 3), nn.ReLU(), point(16, 16, 0.1), nn.ReLU(), conv(16, 16, 3))
    found = operators(nn.Sequential(*layers), 1, 8, 12, 12, folder=tmp_path)
    assert "sparse_f32" not in found


def test_a_sparse_layer_between_dense_ones_is_worth_it_when_it_is_large(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (conv(8, 400, 3), nn.ReLU(), point(400, 400, 0.1), nn.ReLU(), conv(400, 8, 3))
    found = operators(nn.Sequential(*layers), 1, 8, 12, 12, folder=tmp_path)
    assert (found["sparse_f32"], found["conv_f32"], found["copy"]) == (1, 2, 4)


def test_the_census_says_what_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(point(24, 48), nn.ReLU())
    zeros = int((module[0].weight == 0).sum())
    artifact, _ = write(captured(module, 1, 24, 12, 12), tmp_path / "c")
    notes = artifact.manifest.census["notes"]  # type: ignore[index]
    assert notes[-1] == f"1 1×1 convolutions leave zeros out: {zeros} of {24 * 48} weights"


# --- other processors ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arm64, plain C", "arm64, NEON", "Cortex-M4F"])
def test_other_processors_give_the_same(name: str, everything: tuple[Artifact, Graph], tmp_path: Path) -> None:
    benchmarks = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, benchmarks)
    emulated = importlib.import_module("_emulated")
    sys.path.remove(benchmarks)
    processor = next(found for found in emulated.PROCESSORS if found.name == name)
    if (lacking := processor.missing()) is not None:
        pytest.skip(lacking)
    artifact, simulation = everything
    program, given = processor.build(artifact.folder, tmp_path), whole(simulation)
    with (tmp_path / "in").open("wb") as file:
        for values in given.values():
            values.tofile(file)
    done = processor.run(program, "run", str(tmp_path / "in"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = np.concatenate([values.ravel() for values in run_graph(simulation, given).values()])
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.float32), wanted)


@pytest.mark.slow
def test_no_kernel_reaches_outside_its_memory(everything: tuple[Artifact, Graph], tmp_path: Path) -> None:
    programs = importlib.import_module("test_c_programs")
    program = programs.build(everything[0].folder, tmp_path / "program", "-O1", "-g", "-fsanitize=address,undefined")
    done = programs.subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
