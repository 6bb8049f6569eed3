"""4-bit weights looked up in tables of values: what the pass makes of them, and what Core ML's files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress._codebook import ENTRIES, look_up, sharing, tables_of  # noqa: E402
from edgepack.compress._grid import round_to, weight_scale  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.errors import InputError, ParityError, Unsupported  # noqa: E402
from edgepack.export import _coreml_tables  # noqa: E402
from edgepack.export._tables import codes_of  # noqa: E402
from edgepack.export.c import C  # noqa: E402
from edgepack.export.coreml import Coreml  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.export.tensorrt import Tensorrt  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import Source, export  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
ROWS = {"wide": 32, "depth": 12, "odd": 12, "again": 12, "head": 5}
WEIGHTS = 32 * 8 * 9 + 12 * 9 + 12 * 32 + 12 * 12 + 5 * 12


class Layers(nn.Module):
    """Numbers of channels that groups divide, and others; one weight that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.wide = nn.Conv2d(8, 32, 3, padding=1)
        self.odd = nn.Conv2d(32, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, groups=12)
        self.again = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.wide(torch.relu(self.first(x))))
        y = torch.relu(self.depth(torch.relu(self.odd(y)))).mean((2, 3))
        return self.head(torch.relu(self.again(torch.relu(self.again(y)))))


def folder_of(tmp: Path, **options: Any) -> Path:
    values = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(Layers().eval(), task, [Quantize(weight_bits=4, explain=False, **options)], tmp, Silent())
    return tmp


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("grouped"), codebook=8)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("single"), codebook=4096)


def layers_of(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight's name → values, tables."""
    source = Source.open(folder / "compressed")
    module = source.graph.program.module(check_guards=False)
    found = {}
    for node in module.graph.nodes:
        if (table := source.plan.tensors.get(f"{node.name}/weight_table")) is not None:
            name = str(node.args[1].target)
            found[name.removesuffix(".weight")] = module.get_parameter(name).detach().numpy(), table
    return found


@pytest.mark.parametrize(("rows", "channels", "shared"), [(64, 8, 8), (12, 8, 4), (5, 8, 5), (10, 4096, 10), (7, 2, 1)])
def test_channels_that_share_a_table(rows: int, channels: int, shared: int) -> None:
    assert sharing(rows, channels) == shared


def test_tables_are_what_k_means_of_scikit_learn_finds() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(1)
    weight = torch.randn(4, 200)
    ours = (look_up(weight, tables_of(weight, None, 4), None) - weight).square().sum()
    theirs = cluster.KMeans(ENTRIES, n_init=10, random_state=0).fit(weight.reshape(-1, 1).double().numpy()).inertia_
    assert float(ours) < 1.1 * theirs  # and 0 is among ours
    steps = (round_to(weight, weight_scale(weight, top=7), 7) - weight).square().sum()
    assert float(ours) < 0.8 * float(steps)


def test_a_table_holds_zero_and_what_is_exact_in_sixteen_bits() -> None:
    torch.manual_seed(2)
    for weight in (torch.rand(6, 9) + 1, -torch.rand(6, 9) - 1, torch.randn(6, 3), torch.zeros(6, 4)):
        tables = tables_of(weight, None, 3)
        assert tables.shape == (2, ENTRIES)
        assert (tables == 0).any(1).all()
        assert torch.equal(tables.half().float(), tables)
        assert (tables.diff(dim=1) >= 0).all()
        found = look_up(weight, tables, None)
        nearest = (weight.reshape(2, -1, 1) - tables[:, None]).abs().amin(2)
        torch.testing.assert_close((found - weight).abs().reshape(2, -1), nearest)


def test_columns_in_turn_err_less_than_the_nearest_values() -> None:
    torch.manual_seed(3)
    weight = torch.randn(8, 6, 3, 3)
    x = torch.randn(300, 10) @ torch.randn(10, 54) + 0.1 * torch.randn(300, 54)
    moments = (x.T @ x).double()[None]
    tables = tables_of(weight, moments, 4)
    errors = [(x @ (look_up(weight, tables, how) - weight).flatten(1).T).square().sum() for how in (moments, None)]
    assert errors[0] < 0.5 * errors[1]
    alone = look_up(weight, tables, torch.eye(54, dtype=torch.float64)[None])
    assert torch.equal(alone, look_up(weight, tables, None))  # columns that do not depend on each other


def test_weights_are_of_their_tables(grouped: Path) -> None:
    found = layers_of(grouped)
    assert {name: len(values) for name, (values, _) in found.items()} == ROWS
    assert {name: len(tables) for name, (_, tables) in found.items()} == {
        "wide": 4, "depth": 3, "odd": 3, "again": 3, "head": 1,
    }  # fmt: skip
    for values, tables in found.values():
        for rows, table in zip(values.reshape(len(tables), -1), tables, strict=True):
            assert np.isin(rows, table).all()
    plan = Source.open(grouped / "compressed").plan
    said = [entry["weight"].get("codebook") for entry in plan.nodes.values() if "weight" in entry]
    assert said == [None, 8, 4, 4, 4, 4, 5]
    notes = Artifact.open(grouped / "compressed").manifest.history[0]["notes"]
    assert any("5 with a table of 16 values per 8 channels" in note for note in notes)


@pytest.mark.parametrize(("made", "target"), [("grouped", "iOS18"), ("single", "iOS16"), ("single", "iOS18")])
def test_core_ml_looks_them_up(made: str, target: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("coremltools")
    folder: Path = request.getfixturevalue(made)
    artifact = export(folder, [Coreml(target=target, name=f"{made}-{target}")], Silent())[0].artifact
    parity, census = artifact.manifest.parity, artifact.manifest.census
    assert parity.status == "checked"
    assert parity.max_rel is not None
    assert parity.max_rel < 1e-5
    assert census is not None
    assert census["operators"]["constexpr_lut_to_dense"] == 5
    assert "5 weights lie in 4 bits, looked up in tables: smaller, not faster" in census["notes"]
    if target == "iOS18":
        assert census["weight_bytes"]["uint4"] == WEIGHTS // 2


def test_an_old_system_has_one_table(grouped: Path) -> None:
    source = Source.open(grouped / "compressed")
    with pytest.raises(Unsupported, match=r"iOS17 looks up a weight in one table, and conv2d_1 has 4") as error:
        Coreml().lower(source.graph, source.plan)
    assert error.value.hint == "target = 'iOS18', or codebook = 32 in quantize"


def test_a_wrong_value_in_a_file_is_found(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coremltools")
    monkeypatch.setattr(_coreml_tables, "_key", lambda codes, tables: b"")
    with pytest.raises(ParityError, match=r"'wide\.weight' is planned in tables of 16 values, the file holds it other"):
        export(grouped, [Coreml(target="iOS18", name="wrong")], Silent())


@pytest.mark.parametrize("exporter", [Onnx(), Openvino(), Tflite(), C()], ids=lambda e: e.format)
def test_formats_without_tables_refuse(grouped: Path, exporter: Exporter) -> None:
    source = Source.open(grouped / "compressed")
    with pytest.raises(Unsupported, match=r"no weights that are looked up in tables \(\w+\.weight\)") as error:
        exporter.lower(source.graph, source.plan)
    assert error.value.exit_status == 7
    assert error.value.hint == "export to coreml, or leave codebook out in quantize"


def test_tensorrt_refuses_float_activations_first(grouped: Path) -> None:
    source = Source.open(grouped / "compressed")
    with pytest.raises(Unsupported):
        Tensorrt().lower(source.graph, source.plan)


def test_a_plan_of_another_network_is_refused() -> None:
    with pytest.raises(InputError, match=r"the weight w is not of the values in the table"):
        codes_of(np.float32([[0.5, 1.0]]), np.float32([[0.0, 1.0]]), "w")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 4, "codebook": 0}, "codebook is a number of channels from 1, not 0"),
        ({"codebook": 8}, "codebook needs weight_bits = 4 and float activations"),
        ({"weight_bits": 4, "activation_bits": 8, "codebook": 8}, "codebook needs weight_bits = 4 and float"),
        ({"weight_bits": 4, "codebook": 8, "group_size": 32}, "leave group_size out"),
        ({"weight_bits": 4, "codebook": 8, "rounding": "adaround"}, "codebook has none: 'gptq' or 'nearest'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)
