"""Eight bits in Core ML packages: grids, places, stored integers, and what the interpreter makes of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.errors import ParityError, Unsupported  # noqa: E402
from edgepack.export._coreml_census import read  # noqa: E402
from edgepack.export._coreml_integer import COREML, hold_integers  # noqa: E402
from edgepack.export.coreml import MODEL, Coreml  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.parity import sqnr_db  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.runtimes.coreml import Coreml as Engine  # noqa: E402
from edgepack.stepwise import stepwise  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
VALUES = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)


class Small(nn.Module):
    """A residual sum, a depthwise and a transposed way to it, a leaky ReLU, a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point, self.last = nn.Conv2d(width, width, 1), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = self.point(F.leaky_relu(self.depthwise(x), 0.1)) + x
        return self.last(F.max_pool2d(F.relu(y), 2).mean((2, 3)))


LAYERS = ("first", "depthwise", "point", "last")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("coreml-integer")
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(VALUES))  # type: ignore[arg-type]
    compress(Small().eval(), task, [Quantize()], out, Silent())
    return out


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source.open(folder / "compressed")


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return export(folder, [Coreml()], Silent())[0].artifact


def census(artifact: Artifact) -> dict[str, Any]:
    assert artifact.manifest.census is not None
    return artifact.manifest.census


def form(plan: Plan, word: str, *operators: str) -> Plan:
    """The plan with this form of activations for these operators."""
    changed = {
        name: {**entry, "activations": word} if "weight" in entry and entry["operator"] in operators else entry
        for name, entry in plan.nodes.items()
    }
    return replace(plan, nodes=changed)


def test_a_quantized_recipe_needs_no_options(artifact: Artifact) -> None:
    manifest, operators = artifact.manifest, census(artifact)["operators"]
    assert (manifest.dialect, manifest.parity.status, manifest.parity.max_rel) == ("u8s8-coreml", "checked", 0.0)
    assert operators["constexpr_affine_dequantize"] == 4
    assert operators["quantize"] == 6  # what four layers read, the other way into the sum, the sum
    assert census(artifact)["weight_bytes"]["int8"] >= 8 * (27 + 9 + 8 + 6)
    assert "float32" not in census(artifact)["weight_bytes"]


def test_the_file_holds_the_integers_of_the_plan(artifact: Artifact, source: Source) -> None:
    """int8 data times 16-bit scales are the network's own weights, up to the rounding of the scale."""
    makers = [op for op in read(artifact.folder / MODEL).operations if op.op_type.startswith("constexpr_")]
    weights = [source.graph.program.state_dict[f"{name}.weight"].numpy() for name in LAYERS]
    for maker, weight in zip(makers, weights, strict=True):
        whole, scale = maker.inputs["quantized_data"].val, maker.inputs["scale"].val
        assert (whole.dtype, scale.dtype) == (np.int8, np.float16)
        dense = whole * scale.astype(np.float64).reshape(-1, *[1] * (whole.ndim - 1))
        np.testing.assert_allclose(dense, weight, rtol=2**-11, atol=127 * 2**-25)


def test_simulation_is_near_the_float_network(source: Source) -> None:
    x = {"x": np.random.default_rng(5).standard_normal((32, 3, 8, 8)).astype(np.float32)}
    exact = run_graph(source.graph, x)["output"]
    found = {}
    for activations in ("plan", "float"):
        simulation = Coreml(activations=activations).lower(source.graph, source.plan)
        found[activations] = sqnr_db(np.concatenate([run_graph(simulation, {"x": one[None]})["output"]
                                                     for one in x["x"]]), exact)  # fmt: skip
    assert found["plan"] is not None
    assert found["float"] is not None
    assert found["plan"] > 25
    assert found["float"] > found["plan"] + 20


def test_weights_only(folder: Path) -> None:
    exporter = Coreml(name="weights", activations="float", target="iOS16")
    found = export(folder, [exporter], Silent())[0].artifact
    assert (found.manifest.dialect, found.manifest.parity.status) == ("w8", "checked")
    assert found.manifest.parity.max_rel is not None
    assert found.manifest.parity.max_rel < 1e-5
    assert "quantize" not in census(found)["operators"]
    assert census(found)["operators"]["constexpr_affine_dequantize"] == 4


def test_ios18_stores_blocks(folder: Path) -> None:
    found = export(folder, [Coreml(name="eighteen", target="iOS18")], Silent())[0].artifact
    assert found.manifest.parity.max_rel == 0.0
    assert census(found)["operators"]["constexpr_blockwise_shift_scale"] == 4


@pytest.mark.parametrize(("precision", "dialect"), [("float16", "float16"), ("float32", "float32")])
def test_another_precision_writes_the_weights_as_they_are(folder: Path, precision: str, dialect: str) -> None:
    found = export(folder, [Coreml(name=precision, precision=precision)], Silent())[0].artifact
    assert found.manifest.dialect == dialect
    assert "int8" not in census(found)["weight_bytes"]


def test_an_operator_may_keep_float_activations(source: Source) -> None:
    """A layer without integer activations quantizes neither what it reads nor the sum behind it."""
    simulation = Coreml().lower(source.graph, form(source.plan, "float", "linear"))
    targets = [str(node.target) for node in simulation.program.graph.nodes]
    assert simulation.dialect == "u8s8-coreml"
    assert sum("dequantize_per_channel" in target for target in targets) == 4
    assert sum("quantize_per_tensor" in target for target in targets) == 2 * 5
    alone = Coreml().lower(source.graph, form(source.plan, "float", "linear", "conv2d"))
    assert alone.dialect == "w8"
    assert not any("quantize_per_tensor" in str(node.target) for node in alone.program.graph.nodes)


def test_what_core_ml_lacks_is_refused(source: Source) -> None:
    with pytest.raises(Unsupported, match=r"linear is to round its activations while it runs, which Core ML cannot"):
        Coreml().lower(source.graph, form(source.plan, "dynamic", "linear"))
    with pytest.raises(Unsupported, match="iOS16 cannot compute conv2d in 8 bits") as caught:
        Coreml(target="iOS16").lower(source.graph, source.plan)
    assert caught.value.hint == "target = 'iOS17' or later, or activations = 'float' (weights only)"
    with pytest.raises(ValueError, match="activations is 'plan' or 'float', not 'static'"):
        Coreml(activations="static")


def test_a_planned_operator_that_is_float_in_the_file_is_an_error(source: Source, tmp_path: Path) -> None:
    simulation = Coreml().lower(source.graph, source.plan)
    for name, options, message in (
        ("float", {"precision": "float16"}, "0 of 3 planned conv operators in the file read int8 weights"),
        ("weights", {"activations": "float"}, "0 of 3 planned conv operators in the file read 8-bit activations"),
    ):
        exporter = Coreml(**options)  # type: ignore[arg-type]
        (tmp_path / name).mkdir()
        exporter.write(exporter.lower(source.graph, source.plan), tmp_path / name)
        with pytest.raises(ParityError, match=message):
            hold_integers(read(tmp_path / name / MODEL), simulation)


@pytest.mark.parametrize("layer", ["depthwise", "last"])
def test_a_wrong_weight_is_found_and_named(artifact: Artifact, source: Source, layer: str) -> None:
    simulation = Coreml().lower(source.graph, source.plan)
    for name, tensor in {**simulation.program.state_dict, **simulation.program.constants}.items():
        if name.startswith(layer) and name.endswith("integers"):
            tensor[0] += 9
    inputs = {"x": VALUES[:1]}
    found = stepwise(simulation, inputs, Engine(engine="interpreter").trace(artifact, inputs)).fault
    assert found is not None
    assert found.operator == ("linear" if layer == "last" else "conv2d")
    assert layer in found.layer


@given(low=st.floats(-1e3, 0), high=st.floats(1e-3, 1e3))
def test_grids_are_centred_where_that_costs_little(low: float, high: float) -> None:
    grid, full = COREML.grid(low, high), (high - low) / 255
    assert grid.step <= 1.25 * full * (1 + 1e-6)
    assert -grid.zero * grid.step <= low + 0.5 * full * (1 + 1e-3)
    assert (255 - grid.zero) * grid.step >= high - 0.5 * full * (1 + 1e-3)
    assert low != 0 or grid.zero == 0


def test_grids_around_zero_and_behind_a_leaky_relu() -> None:
    assert COREML.grid(-1.0, 0.9).zero == 128
    assert COREML.grid(-1.0, 0.9).step == 1 / 128
    assert COREML.grid(-0.1, 0.9).zero not in (0, 128)
