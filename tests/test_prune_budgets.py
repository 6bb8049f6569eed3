"""Budgets of prune: which widths keep them, and the verdict of a measurement."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("torch_pruning", reason="pip install 'edgepack[prune]'")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from _pruning import ONE, TASK, net, prune  # noqa: E402
from edgepack.compress._cutting import IN, Group  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compress._pruning import verdict  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress._widths import Costs, enough, narrowest, steps  # noqa: E402
from edgepack.compress.prune import Prune  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.contracts import Pass  # noqa: E402
from edgepack.errors import BudgetError  # noqa: E402
from edgepack.measurement import Ratio  # noqa: E402
from edgepack.recipe import build  # noqa: E402


def test_size_budget(tmp_path: Path) -> None:
    module = net()
    found, run = prune(module, tmp_path, TASK, size_ratio=0.6)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (module, found)]
    assert 0.5 < sizes[1] / sizes[0] <= 0.6
    assert run.findings["channels"]["macs"][1] < run.findings["channels"]["macs"][0]


def test_both_budgets_are_kept(tmp_path: Path) -> None:
    _, run = prune(net(), tmp_path, TASK, size_ratio=0.7, macs_ratio=0.5)
    seen = run.findings["channels"]
    assert seen["macs"][1] <= 0.5 * seen["macs"][0]
    assert seen["parameters"][1] <= 0.7 * seen["parameters"][0]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stopwatch that counts multiply-accumulates instead; the formats it was asked for."""
    asked: list[str] = []

    def measure(self: PassRun, module: nn.Module, against: nn.Module | None = None, format: str = "onnx") -> Ratio:
        asked.append(format)
        value = 0.2 + 0.8 * macs(module, (ONE,)) / macs(against or self.original, (ONE,))
        return Ratio(value, value - 0.01, value + 0.01, "before", "faster", value)

    monkeypatch.setattr(PassRun, "measure", measure)
    return asked


def test_latency_budget_is_measured(tmp_path: Path, measured: list[str]) -> None:
    found, run = prune(net(), tmp_path, TASK, latency_ratio={"openvino": 0.7}, targets=("onnx", "openvino"))
    seen = run.findings["channels"]["targets"]
    assert seen["openvino"]["measured"]["value"] <= 0.7
    assert macs(found, (ONE,)) / macs(net(), (ONE,)) > 0.5  # no more than it takes
    assert "faster by 1." in seen["onnx"]["verdict"]
    assert any(note.startswith("openvino: smaller (") for note in run.notes)
    count = len(measured)
    again, _ = prune(net(), tmp_path, TASK, latency_ratio={"openvino": 0.7}, targets=("onnx", "openvino"))
    assert len(measured) == count + 2  # the choice was remembered, the verdicts were measured
    assert macs(again, (ONE,)) == macs(found, (ONE,))


def test_budgets_out_of_reach(tmp_path: Path, measured: list[str]) -> None:
    with pytest.raises(
        BudgetError,
        match=r"^prune: macs_ratio 0.01 cannot be reached: the narrowest network gives 0\.\d{3}\n  a larger",
    ):
        prune(net(), tmp_path, TASK, macs_ratio=0.01)
    with pytest.raises(BudgetError, match=r"latency_ratio \(onnx\) 0.2 cannot be reached"):
        prune(net(), tmp_path, TASK, latency_ratio=0.2, targets=("onnx",))


@pytest.mark.parametrize(
    "value,low,high,macs_share,text",
    [
        (
            0.5,
            0.45,
            0.55,
            0.5,
            "smaller (0.600 × the parameters) and faster by 2.00 ×: 0.500 × the latency [0.450, 0.550]",
        ),
        (0.98, 0.9, 1.02, 0.5, "not faster here, because the interval reaches 1: 0.980"),
        (1.1, 1.0, 1.2, 0.5, "because the engine's time is not in the multiply-accumulates that are gone"),
        (1.0, 0.9, 1.1, 0.97, "because only 3.0% of the multiply-accumulates are gone"),
    ],
)
def test_verdicts(value: float, low: float, high: float, macs_share: float, text: str) -> None:
    ratio = Ratio(value, low, high, "before", "", value)
    assert text in verdict(ratio, {"macs": macs_share, "parameters": 0.6})


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4), multiple=st.sampled_from([1, 3, 8, 16]),
    least=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)  # fmt: skip
def test_widths_are_multiples_and_never_too_small(sizes: list[int], multiple: int, least: float) -> None:
    layers = {f"l{n}": nn.Linear(size, 2) for n, size in enumerate(sizes)}
    module = nn.ModuleDict(layers)
    groups = [Group(name, {(name, IN): [[i] for i in range(layer.in_features)]}) for name, layer in layers.items()]
    costs = Costs.of(_Runs(module), (), False, True)
    found = steps(groups, [torch.rand(group.units) for group in groups], costs, multiple, least)
    for index, group in enumerate(groups):
        gone = [unit for step in found if step.group == index for unit in step.units]
        assert len(set(gone)) == len(gone)
        left = group.units - len(gone)
        assert left == narrowest(group, multiple, least) >= max(1, math.floor(least * group.units))
        assert left % multiple == 0 or left == group.units


class _Runs(nn.Module):
    """Layers under their own names that need not run."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self) -> None:
        return None


@given(count=st.integers(0, 40), first=st.integers(0, 50))
def test_enough_is_the_first_that_keeps(count: int, first: int) -> None:
    assert enough(count, lambda number: number >= first) == (first if first <= count else None)


def test_half_the_macs_if_no_budget_is_given() -> None:
    item = build(Pass, {"use": "prune", "tune": {"epochs": 3}})
    assert isinstance(item, Prune)
    assert item.macs_ratio == 0.5
    assert item.tune == Tune(epochs=3)
    assert build(Pass, {"use": "prune", "size_ratio": 0.5}).macs_ratio is None  # type: ignore[attr-defined]
