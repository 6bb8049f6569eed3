"""Bits chosen for each layer: the programme against all combinations, what it is fed against a plain computation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")
from torch import Tensor, nn  # noqa: E402

from _networks import Chain  # noqa: E402
from _samples import Samples  # noqa: E402
from edgepack._findings import findings  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress._grid import round_to, top, weight_scale  # noqa: E402
from edgepack.compress._programme import choose, total  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import PassRun, compress  # noqa: E402
from edgepack.contracts import Pass  # noqa: E402
from edgepack.errors import InputError  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.exporting import export  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.recipe import build  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
PLAIN: dict[str, Any] = {"equalize": False, "bias_correct": False, "rounding": "nearest"}
ALONE = {"a": 3 * 6 * 9, "b": 6 * 9 * 9, "c": 9 * 5}  # values of each weight
VALUES = sum(ALONE.values()) + 6 + 9 + 5


class Twice(nn.Module):
    """One layer used two times, in front of another, and a second output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(torch.relu(self.a(x)))
        return self.b(y), 100 * y


def samples(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


def task(shape: tuple[int, ...] = (1, 3, 8, 8)) -> Task:
    return Task((Input("x", shape),), calibration=Samples(samples()))  # type: ignore[arg-type]


def found(folder: Path, module: nn.Module | None = None, **options: Any) -> tuple[nn.Module, PassRun]:
    module = Chain().eval() if module is None else module.eval()
    run = PassRun(folder, 0, Plan(), Silent(), module, task())
    return Quantize(explain=False, **options).apply(copy.deepcopy(module), task(), run), run


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    layers, choices, budgets = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    whole = st.integers(0, 10**6)
    table = lambda of: np.array([[draw(of) for _ in range(choices)] for _ in range(layers)])  # noqa: E731
    loss = table(st.floats(0, 1e3, allow_subnormal=False))
    costs = [table(whole) for _ in range(budgets)]
    return loss, costs, [draw(st.integers(0, 10**6 * layers)) for _ in costs]


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_programme_finds_the_best_of_all_combinations(case: tuple[np.ndarray, list[np.ndarray], list[int]]) -> None:
    loss, costs, limits = case
    every = [np.array(one) for one in itertools.product(range(loss.shape[1]), repeat=len(loss))]
    fit = [one for one in every if all(total(c, one) <= limit for c, limit in zip(costs, limits, strict=True))]
    chosen = choose(loss, costs, limits)
    if not fit:
        assert chosen is None
        return
    assert chosen is not None
    assert all(total(cost, chosen) <= limit for cost, limit in zip(costs, limits, strict=True))
    best = min(total(loss, one) for one in fit)
    assert total(loss, chosen) <= best + 1e-9 * max(1.0, float(loss.max()))


def test_losses_are_those_of_each_layer_rounded_alone(tmp_path: Path) -> None:
    _, run = found(tmp_path, weight_bits=[8, 4, 3], size_ratio=0.2, **PLAIN)
    x = torch.from_numpy(samples(run.findings["mixed"]["samples"]))
    assert [row["layer"] for row in run.findings["mixed"]["layers"]] == list(ALONE)
    with torch.no_grad():
        exact = Chain()(x).double()
        for row in run.findings["mixed"]["layers"]:
            for bits, loss in row["loss"].items():
                module = Chain()
                weight = module.get_submodule(row["layer"]).weight
                weight.copy_(round_to(weight, weight_scale(weight, top=top(int(bits))), top(int(bits))))
                wanted = (module(x).double() - exact).square().sum() / exact.square().sum()
                assert loss == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("widths", [(8, 4), (8, 6, 4, 3), (2,)])
def test_sizes_are_what_the_plan_takes_and_weights_lie_on_the_chosen_grids(tmp_path: Path, widths: Any) -> None:
    module, run = found(tmp_path, weight_bits=widths, size_ratio=0.24)
    bits = {row["layer"]: row["bits"] for row in run.findings["mixed"]["layers"]}
    planned = {name.removesuffix("/weight_scale"): scale for name, scale in run.plan.tensors.items()}
    taken = sum(ALONE[name] * bits[name] for name in ALONE) + 32 * 2 * (6 + 9 + 5)  # a scale and a bias per channel
    chosen = run.findings["mixed"]["chosen"]
    assert chosen["size_ratio"] == pytest.approx(taken / (32 * VALUES))
    assert chosen["size_ratio"] <= 0.24
    stored = sum(ALONE[name] * (8 if bits[name] > 4 else 4) for name in ALONE) + 32 * 2 * (6 + 9 + 5)
    assert chosen["stored_ratio"] == pytest.approx(stored / (32 * VALUES))
    entries = [entry["weight"]["bits"] for entry in run.plan.nodes.values() if "weight" in entry]
    assert entries == [bits[name] for name in ALONE]
    for (name, width), scale in zip(bits.items(), planned.values(), strict=True):
        weight = module.get_submodule(name).weight.detach()
        whole = weight.flatten(1) / torch.from_numpy(scale)[:, None]
        torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
        assert whole.abs().max().round() <= top(width)


def test_the_table_gains_with_every_step_of_the_budget(tmp_path: Path) -> None:
    _, run = found(tmp_path, weight_bits=[8, 6, 4, 3], size_ratio=0.25, activation_bits=8)
    table = run.findings["mixed"]["table"]
    sizes, predicted = ([row[name] for row in table] for name in ("size_ratio", "predicted_db"))
    assert len(table) > 3
    assert sizes == sorted(sizes)
    assert predicted == sorted(predicted)
    assert table[0]["layers"] == {"8": 0, "6": 0, "4": 0, "3": 3}
    assert table[-1]["layers"] == {"8": 3, "6": 0, "4": 0, "3": 0}
    assert all(abs(row["measured_db"] - row["predicted_db"]) < 3 for row in table)
    assert table[-1]["bops_ratio"] == pytest.approx(8 * 8 / 32**2)
    [note] = [note for note in run.notes if note.startswith("mixed weights: ")]
    assert f"{run.findings['mixed']['chosen']['size_ratio']:.4f} of the float size in bits" in note


def test_bit_operations(tmp_path: Path) -> None:
    """A budget of operations presses on ``b`` (6·9·9 weights at 16 places), one of size alone as well on ``c``."""
    _, run = found(tmp_path, weight_bits=[8, 2], bops_ratio=0.15)
    rows = {row["layer"]: row for row in run.findings["mixed"]["layers"]}
    macs = {"a": ALONE["a"] * 36, "b": ALONE["b"] * 16, "c": ALONE["c"]}
    assert {name: row["macs"] for name, row in rows.items()} == macs
    spent = sum(macs[name] * row["bits"] * 32 for name, row in rows.items()) / (32**2 * sum(macs.values()))
    assert run.findings["mixed"]["chosen"]["bops_ratio"] == pytest.approx(spent)
    assert spent <= 0.15


def test_layers_left_in_float_count_as_float(tmp_path: Path) -> None:
    _, run = found(tmp_path, weight_bits=[4], size_ratio=0.9, bops_ratio=0.9, leave=["b"])
    chosen = run.findings["mixed"]["chosen"]
    taken = 4 * (ALONE["a"] + ALONE["c"]) + 32 * (6 + 5 + ALONE["b"] + 20)
    assert chosen["size_ratio"] == pytest.approx(taken / (32 * VALUES))
    a, b, c = ALONE["a"] * 36, ALONE["b"] * 16, ALONE["c"]
    assert chosen["bops_ratio"] == pytest.approx((4 * 32 * (a + c) + 32**2 * b) / (32**2 * (a + b + c)))


def test_a_weight_used_twice_has_one_width_and_every_output_counts(tmp_path: Path) -> None:
    _, run = found(tmp_path, Twice(), weight_bits=[8, 3], size_ratio=0.4)
    first, second = run.findings["mixed"]["layers"]
    assert (first["layer"], second["layer"]) == ("a", "b")
    assert first["macs"] == 2 * 9 * 64
    bits = [entry["weight"]["bits"] for entry in run.plan.nodes.values() if "weight" in entry]
    assert bits[0] == bits[1]
    assert second["loss"]["3"] < first["loss"]["3"]  # the large second output does not read it


def test_files_take_what_was_promised_in_bytes(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    compress(Chain(), task(), [Quantize(weight_bits=(8, 4), size_ratio=0.22, explain=False)], tmp_path, Silent())
    finding = Artifact.open(tmp_path / "compressed").manifest.history[0]["findings"]["mixed"]
    artifact = export(tmp_path, [Onnx()], Silent())[0].artifact
    assert artifact.manifest.parity.status == "checked"
    assert artifact.manifest.census is not None
    bits = {row["layer"]: row["bits"] for row in finding["layers"]}
    assert sorted(bits.values()) == [4, 8, 8]
    held = artifact.manifest.census["weight_bytes"]
    assert held["int4"] == sum((ALONE[name] + 1) // 2 for name in bits if bits[name] == 4)
    assert held["int8"] >= sum(ALONE[name] for name in bits if bits[name] == 8)


def test_the_report_shows_the_table(tmp_path: Path) -> None:
    compress(Chain(), task(), [Quantize(size_ratio=0.25, explain=False)], tmp_path, Silent())
    compressed = Artifact.open(tmp_path / "compressed")
    view = findings({"manifest": {"history": compressed.manifest.history}})["mixed"]
    assert view is not None
    assert view["widths"] == ["8", "4"]
    assert [row["chosen"] for row in view["table"]].count(True) <= 1


def test_a_recipe_gives_a_list() -> None:
    item = build(Pass, {"use": "quantize", "weight_bits": [4, 8, 4], "size_ratio": 0.2})
    assert isinstance(item, Quantize)
    assert item.widths == (8, 4)
    assert item.form == "float"
    assert Quantize(size_ratio=0.2).widths == (8, 4)
    assert Quantize(size_ratio=0.2).form == "static"
    assert Quantize(weight_bits=4).widths == (4,)


@pytest.mark.parametrize("name", ["size_ratio", "bops_ratio"])
def test_a_budget_out_of_reach_names_the_least(tmp_path: Path, name: str) -> None:
    least = {"size_ratio": (3 * sum(ALONE.values()) + 1280) / (32 * VALUES), "bops_ratio": 3 / 32}[name]
    limit = {name: 0.05}
    with pytest.raises(
        InputError, match=f"{name} = 0.05 cannot be reached: with weights of 3 bits everywhere"
    ) as error:
        found(tmp_path, weight_bits=[8, 3], **limit)
    assert f"it is {least:.4f}" in error.value.message
    assert error.value.hint is not None
    reachable = {name: float(error.value.hint.split()[2])}
    assert 0 <= reachable[name] - least < 2e-4
    found(tmp_path, weight_bits=[8, 3], **reachable)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": (8, 4)}, "weight_bits is a list to choose from: say within which size_ratio or bops_ratio"),
        ({"weight_bits": (), "size_ratio": 0.2}, r"a list of bits from 2 to 8, not \(\)"),
        ({"weight_bits": (16, 4), "size_ratio": 0.2}, r"from 2 to 8, not \(16, 4\)"),
        ({"weight_bits": 4, "size_ratio": 0.2}, "size_ratio chooses weight_bits, which is a list then or left out"),
        ({"size_ratio": 0.0}, "size_ratio = 0.0: a share is above 0 and at most 1"),
        ({"bops_ratio": 1.5}, "bops_ratio = 1.5: a share is above 0"),
        ({"size_ratio": 0.2, "target": "avx2"}, "target = 'avx2' has its own bits for some layers: leave size_ratio"),
        ({"bits": 8, "weight_bits": (8, 4), "size_ratio": 0.2}, "bits is for weights and activations"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


def test_scipy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepack import errors

    def missing(name: str, *rest: Any) -> Callable[..., Any]:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(errors.MissingExtra, match="scipy"):
        choose(np.ones((1, 1)), [np.ones((1, 1))], [1])
