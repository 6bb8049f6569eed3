from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

from torch import nn  # noqa: E402

from _c_files import Everything, answers, compressed, drawn, engine, write  # noqa: E402
from _networks import Network  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.contracts import Graph  # noqa: E402
from edgepack.errors import Unsupported  # noqa: E402
from edgepack.export._c_fixed import fixed, scaled, table  # noqa: E402
from edgepack.exporting import Source  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.stepwise import stepwise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Artifact, Graph]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("integer")
    source = compressed(folder, Everything())
    return source, *write(source.graph, folder / "c", source.plan)


def test_every_instruction_set_gives_the_integers_of_the_simulation(made: tuple[Source, Artifact, Graph]) -> None:
    _, artifact, simulation = made
    assert artifact.manifest.dialect == "s8s8-c"
    for seed in range(5):
        inputs = drawn(simulation, seed)
        (wanted,) = run_graph(simulation, inputs).values()
        for level in (0, 1, 2):
            (found,) = answers(artifact, inputs, level).values()
            np.testing.assert_array_equal(found, wanted, err_msg=f"level {level}")


def test_nothing_but_integers_is_computed(made: tuple[Source, Artifact, Graph]) -> None:
    counted = made[1].manifest.census["operators"]  # type: ignore[index]
    assert {name for name in counted if name.endswith("f32")} == set()
    assert counted["conv_s8"] == 6
    assert counted["depthwise_s8"] == 1
    # one pair at input and output, one around the slices of slices before the padding, which only move floats
    assert (counted["quantize"], counted["dequantize"]) == (2, 2)


def test_the_answers_stay_near_the_float_network(made: tuple[Source, Artifact, Graph]) -> None:
    source, _, simulation = made
    found = run_graph(simulation, source.golden.inputs)
    near = min(sqnr_db(found[name], source.golden.original[name]) or math.inf for name in found)
    assert near > 20


@pytest.mark.parametrize("channels", [3, 8])
def test_depthwise_layers_of_few_channels(channels: int, tmp_path: Path) -> None:
    """Pixels stand side by side, rows of the kernel in pairs, and what neighbours share is read once."""
    torch.manual_seed(channels)
    forms = [(3, 1, 1), (3, 2, 1), (2, 1, 1), (3, 1, 2), (1, 2, 1)]  # size, stride, dilation
    layers = [nn.Conv2d(channels, channels, size, step, 1, far, groups=channels) for size, step, far in forms]
    module = Network(lambda *given: torch.cat([layer(given[-1]).flatten(1) for layer in given[:-1]], 1), *layers)
    source = compressed(tmp_path, nn.Sequential(nn.Conv2d(5, channels, 1), nn.ReLU(), module))
    artifact, simulation = write(source.graph, tmp_path / "c", source.plan)
    assert artifact.manifest.census["operators"]["depthwise_s8"] == len(forms)  # type: ignore[index]
    assert f".groups = {12 if channels == 3 else 16}" in (artifact.folder / "model.c").read_text()
    inputs = drawn(simulation)
    (wanted,) = run_graph(simulation, inputs).values()
    for level in (0, 1, 2):
        (found,) = answers(artifact, inputs, level).values()
        np.testing.assert_array_equal(found, wanted, err_msg=f"level {level}")


def test_every_rounded_value_is_in_the_trace(made: tuple[Source, Artifact, Graph]) -> None:
    artifact, simulation = made[1:]
    inputs = drawn(simulation)
    found = stepwise(simulation, inputs, engine().trace(artifact, inputs))
    assert found.fault is None
    assert found.worst_share == 0
    assert found.compared > 8


def convolved(x: np.ndarray, weight: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """(C, H, W) and (O, C, rows, columns), int64, by definition."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    rows, columns = weight.shape[2:]
    height, width = ((size - side) // stride + 1 for size, side in zip(x.shape[1:], (rows, columns), strict=True))
    out = np.zeros((len(weight), height, width), np.int64)
    for r in range(rows):
        for c in range(columns):
            part = x[:, r : r + height * stride : stride, c : c + width * stride : stride][:, :height, :width]
            out += np.einsum("oc,chw->ohw", weight[:, :, r, c], part)
    return out


def test_a_convolution_is_that_of_int64_arithmetic(tmp_path: Path) -> None:
    """The reference shares nothing with simulation and kernels but the plan's grids and the rounding's definition."""
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Conv2d(5, 19, 3, 2, 1), nn.LeakyReLU(0.2))
    source = compressed(tmp_path, layer)
    artifact, simulation = write(source.graph, tmp_path / "c", source.plan)
    inputs = drawn(simulation)
    steps = {step.operator: next(iter(step.outputs.values())) for step in engine().trace(artifact, inputs)}
    plan = source.plan
    name = next(name for name in plan.nodes if name.startswith("conv"))
    scale = plan.tensors[f"{name}/weight_scale"].astype(np.float64)
    from edgepack.export._c_integer import DIALECT

    ends = [entry["range"] for entry in plan.nodes.values() if "range" in entry]
    grids = [DIALECT.grid(end["low"], end["high"]) for end in ends]
    read, written = grids[0], grids[-1]
    x = np.clip(np.rint(inputs["x"][0] * np.float32(1 / read.step)) + read.zero, -128, 127).astype(np.int64)
    module = source.graph.program.module(check_guards=False)
    weight, bias = (tensor.detach().numpy().astype(np.float64) for tensor in module.parameters())
    whole = np.rint(weight / scale[:, None, None, None]).astype(np.int64)
    steps32 = (scale.astype(np.float32) * np.float32(read.step)).astype(np.float32)
    total = convolved(x - read.zero, whole, 2, 1) + np.rint(bias / steps32).astype(np.int64)[:, None, None]
    multiplier, shift = (part[:, None, None] for part in fixed(scale * read.step / written.step))
    factor = np.where(total < 0, np.rint(multiplier * 0.2).astype(np.int64), multiplier)
    wanted = np.clip(scaled(total, factor, shift) + written.zero, -128, 127)
    np.testing.assert_array_equal(steps["conv_s8"][0], wanted)


@given(st.floats(1e-9, 1e4), st.integers(-(2**31), 2**31 - 1))
def test_rounding_is_exact_to_the_last_place(ratio: float, value: int) -> None:
    multiplier, shift = fixed(ratio)
    assert 1 <= shift[0] <= 62
    assert multiplier[0] < 2**31
    assert abs(Fraction(int(multiplier[0]), 1 << int(shift[0])) / Fraction(ratio) - 1) <= Fraction(1, 2**30)
    exact = math.floor(Fraction(value * int(multiplier[0]), 1 << int(shift[0])) + Fraction(1, 2))  # halves go up
    assert int(scaled(np.array([value]), multiplier, shift)[0]) == exact


@given(st.floats(1e-3, 10), st.integers(-128, 127), st.floats(1e-3, 10), st.integers(-128, 127))
def test_tables_hold_the_rounded_function(step: float, zero: int, out_step: float, out_zero: int) -> None:
    found = table(np.tanh, (step, zero), (out_step, out_zero)).astype(int)
    for stored in (-128, -1, 0, 77, 127):
        exact = math.tanh((stored - zero) * step) / out_step + out_zero
        assert abs(found[stored + 128] - min(max(exact, -128), 127)) <= 0.5 + 1e-9


def test_ranges_found_at_run_time_are_refused(tmp_path: Path) -> None:
    source = compressed(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(360, 8)), activations="dynamic")
    with pytest.raises(Unsupported, match="linear") as caught:
        write(source.graph, tmp_path / "c", source.plan)
    assert "static" in (caught.value.hint or "")
