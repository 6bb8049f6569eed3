"""The pass prune: which channels, how many, within which budgets, and what it says."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("torch_pruning", reason="pip install 'edgepack[prune]'")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _pruning import ITEM, ONE, TASK, Residual, data, gap, net, prune, rows  # noqa: E402
from edgepack import errors  # noqa: E402
from edgepack.compress import _channels  # noqa: E402
from edgepack.compress._channels import DOUBLE, SINGLE, Survey, Trial, difference  # noqa: E402
from edgepack.compress._cutting import IN, OUT, Group, mask, remove, width  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compress._pruning import verdict  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress._widths import Costs, enough, narrowest, steps  # noqa: E402
from edgepack.compress._worth import magnitudes, scales, taylor  # noqa: E402
from edgepack.compress.prune import Prune  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.contracts import Pass  # noqa: E402
from edgepack.errors import BudgetError, InputError, MissingExtra, Unsupported  # noqa: E402
from edgepack.measurement import Ratio  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.recipe import build  # noqa: E402
from edgepack.task import Task  # noqa: E402


def groups_of(module: nn.Module) -> list[Group]:
    return Survey(module, (torch.randn(2, 3, 12, 12),), (), (), True).run().groups


def test_half_the_multiply_accumulates_with_the_same_outputs_as_silenced_channels(tmp_path: Path) -> None:
    module = net()
    found, run = prune(module, tmp_path, TASK)
    share = macs(found, (ONE,)) / macs(module, (ONE,))
    assert 0.4 < share <= 0.5
    assert gap(module, found, run, TASK) <= 1e-5
    seen = run.findings["channels"]
    assert seen["difference"] <= 1e-5
    assert seen["macs"] == [macs(module, (ONE,)), macs(found, (ONE,))]
    assert seen["parameters"] == [sum(p.numel() for p in one.parameters()) for one in (module, found)]
    for name, row in rows(run).items():
        assert row["after"] % 8 == 0
        assert row["before"] - row["after"] == len(row["gone"])
        assert found.get_submodule(name).weight.shape[0] == row["after"]  # type: ignore[union-attr]
    assert rows(run)["wide"]["tied"] == ["deep"]
    assert rows(run)["stem"]["tied"] == ["norm", "thin"]
    assert seen["left"] == {"out": "no layer reads its channels: they are the network's output"}
    assert run.notes[0].startswith("removed units of ")
    json.dumps(seen)


def test_a_removed_unit_is_worth_less_than_one_of_its_group_that_stays(tmp_path: Path) -> None:
    _, run = prune(net(), tmp_path, TASK, macs_ratio=0.6)
    for row in rows(run).values():
        if row["gone"]:
            assert row["criterion"]["gone"]["most"] <= row["criterion"]["kept"]["least"]


def test_magnitudes_are_those_of_all_slices() -> None:
    module = net()
    assert isinstance(module, Residual)
    groups = {group.name: group for group in groups_of(module)}
    for power, found in ((1, magnitudes(module, [groups["wide"]], 1)), (2, magnitudes(module, [groups["wide"]], 2))):
        parts = [module.wide.weight.flatten(1), module.deep.weight.flatten(1), module.thin.weight[:, :, 0, 0].T]
        wanted = torch.cat(parts, 1).norm(power, dim=1).detach()
        assert torch.allclose(found[0], wanted / wanted.mean(), rtol=1e-5)


def test_scales_are_those_of_batch_norms(tmp_path: Path) -> None:
    module = net()
    assert isinstance(module, Residual)
    groups = {group.name: group for group in groups_of(module)}
    found = scales(module, [groups["stem"], groups["wide"]])
    assert found[0] is not None
    assert torch.equal(found[0], module.norm.weight.detach().abs())
    assert found[1] is None
    _, run = prune(module, tmp_path, TASK, criterion="bn-scale", macs_ratio=0.95)
    assert run.findings["channels"]["left"]["wide"] == "no batch norm follows it"
    gone = set(rows(run)["stem"]["gone"])
    assert gone == set(module.norm.weight.detach().abs().argsort()[: len(gone)].tolist())


def test_taylor_expects_what_a_factor_changes() -> None:
    """Of an output that is linear in the factors, the first order is exact: the square of what removal changes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 12)).eval()
    task = Task((ITEM,), calibration=data(2048))
    run = PassRun(Path(), 0, Plan(), Silent(), module, task)
    (group,) = groups_of(module)
    found = taylor(module, [group], task, run, 2048)[0]
    wanted = []
    x = torch.from_numpy(next(iter(task.calibration.batches(2048))).inputs["x"])  # type: ignore[union-attr]
    with torch.no_grad():
        for unit in range(16):
            changed = module(x) - mask(copy.deepcopy(module), group.cut([unit]))(x)
            wanted.append(float((changed**2).sum(1).mean()))  # type: ignore[operator]
    assert torch.allclose(found, torch.tensor(wanted), rtol=0.6)  # 64 draws of signs
    assert abs(float(found.sum()) / sum(wanted) - 1) < 0.15
    assert all(value.grad is None for value in module.parameters())


def test_data_make_taylor_the_criterion_and_their_absence_magnitude(tmp_path: Path) -> None:
    assert prune(net(), tmp_path, Task((ITEM,), calibration=data()))[1].findings["channels"]["criterion"] == "taylor"
    assert prune(net(), tmp_path, TASK)[1].findings["channels"]["criterion"] == "l2"


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


def test_named_layers_stay_or_are_the_only_ones(tmp_path: Path) -> None:
    module = net()
    found, run = prune(module, tmp_path, TASK, macs_ratio=0.8, leave=("deep", "l*"))
    left = run.findings["channels"]["left"]
    assert left["wide"] == "deep, tied to it, is in leave"
    assert left["left"] == "it is in leave"
    assert found.wide.out_channels == 32  # type: ignore[union-attr]
    _, run = prune(module, tmp_path, TASK, macs_ratio=0.9, layers=("wide",))
    assert list(rows(run)) == ["wide"]
    assert run.findings["channels"]["left"]["stem"] == "it is not among layers"


def test_parameters_that_were_frozen_stay_frozen(tmp_path: Path) -> None:
    module = net()
    module.wide.weight.requires_grad_(False)  # type: ignore[union-attr]
    found, run = prune(module, tmp_path, TASK)
    assert rows(run)["wide"]["gone"]
    assert {n: p.requires_grad for n, p in found.named_parameters()} == {
        n: p.requires_grad for n, p in module.named_parameters()
    }


class Padded(nn.Module):
    """A shortcut that takes every other pixel and pads channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1)
        self.conv2, self.out = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.conv2(torch.relu(self.conv1(x)))
        x = torch.relu(y + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
        return self.out(x.mean((2, 3)))


def test_what_pads_channels_keeps_its_width_and_gives_inner_ones(tmp_path: Path) -> None:
    module = Padded().eval()
    found, run = prune(module, tmp_path, TASK, macs_ratio=0.7)
    assert list(rows(run)) == ["conv1"]
    assert "stem" in run.findings["channels"]["left"]
    assert gap(module, found, run, TASK) <= 1e-5


class Odd(nn.Module):
    """One branch each that must stay: normalized together, grouped, averaged over channels, read by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.norm = nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16)
        self.grouped, self.split = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=4)
        self.mean, self.free = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
        self.placed = nn.Conv2d(3, 16, 1)
        self.a, self.b, self.c = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
        self.d, self.e = nn.Conv2d(17, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        averaged = self.mean(x)
        placed = self.placed(x)
        parts = [
            self.a(self.norm(self.normed(x))),
            self.b(self.split(self.grouped(x))),
            self.c(torch.relu(self.free(x))),
        ]
        parts.append(self.d(torch.cat([averaged, averaged.mean(1, keepdim=True)], 1)))
        return sum(parts) + self.e(placed[:, 1:5] + placed[:, 2:6])  # type: ignore[no-any-return]


def test_what_cannot_go_stays_and_says_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Odd().eval()
    found, run = prune(module, tmp_path, TASK, macs_ratio=0.95)
    left = run.findings["channels"]["left"]
    assert left["normed"] == "norm normalizes channels together, so that without some the others would change"
    assert left["grouped"] == "split is a grouped convolution"
    assert left["mean"] == "removing channels from it is not the same as setting their weights to 0"
    assert "placed" in left
    assert list(rows(run)) == ["free"]
    assert gap(module, found, run, TASK) <= 1e-5


def test_a_trial_sees_a_wrong_pairing() -> None:
    """A group that pairs channel i with channel i + 1 of its reader is not believed."""
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    inputs = (torch.randn(2, 3, 12, 12),)
    right = Group("0", {("0", OUT): [[i] for i in range(16)], ("2", IN): [[i] for i in range(16)]})
    wrong = Group("0", {("0", OUT): [[i] for i in range(16)], ("2", IN): [[(i + 1) % 16] for i in range(16)]})
    trial = Trial.of(module, inputs)
    assert trial.fault([right]) is None
    assert trial.fault([wrong]) == "removing channels from it is not the same as setting their weights to 0"
    short = Group("0", {("0", OUT): [[i] for i in range(16)]})
    assert "the network does not run" in str(trial.fault([short]))
    assert trial.limit == DOUBLE
    assert difference(module, inputs, right.cut([3, 5])) < 1e-6


def test_a_small_layer_scale_hides_nothing() -> None:
    """A wrong group behind a factor of 1e-12 is found, since the trial's weights are random."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gamma = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.full((8,), 1e-12))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    wrong = Group("a", {("a", OUT): [[i] for i in range(16)], ("b", IN): [[15 - i] for i in range(16)]})
    assert Trial.of(Scaled().eval(), (torch.randn(2, 8),)).fault([wrong]) is not None


def test_a_network_that_bears_single_precision_only(tmp_path: Path) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x).float()))  # type: ignore[no-any-return]

    module = Single().eval()
    assert Trial.of(module, (torch.randn(2, 3, 12, 12),)).limit == SINGLE
    found, run = prune(module, tmp_path, TASK)
    assert rows(run)["a"]["after"] == 16
    assert gap(module, found, run, TASK) <= 1e-5


def test_groups_that_do_not_go_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Survey, "exact", lambda *_: False)
    with pytest.raises(Unsupported, match=r"prune: without its channels Residual differs by .* at 0\n  leave = \[…\]"):
        prune(net(), tmp_path, TASK)


@settings(max_examples=25, deadline=None)
@given(gone=st.sets(st.integers(0, 15), min_size=1, max_size=15), seed=st.integers(0, 100))
def test_any_channels_of_a_stream_go(gone: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    module = STREAM[0]
    cut = STREAM[1].cut(gone)
    pruned = remove(copy.deepcopy(module), cut)
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        wanted = mask(copy.deepcopy(module), cut)(x)
        assert torch.allclose(pruned(x), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert width(pruned, ("stem", OUT)) == 16 - len(gone)


STREAM = (lambda module: (module, next(group for group in groups_of(module) if group.name == "stem")))(net())


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


def test_training_and_what_follows_resume(tmp_path: Path) -> None:
    task = Task((ITEM,), training=data(), calibration=data())
    found, run = prune(net(), tmp_path, task, tune=Tune(epochs=2, lr=0.01, batch=16, held_out=0))
    assert len(run.findings["tune"]["epochs"]) == 3
    assert run.findings["tune"]["epochs"][2]["loss"] < run.findings["tune"]["epochs"][1]["loss"]
    again, _ = prune(net(), tmp_path, task, tune=Tune(epochs=2, lr=0.01, batch=16, held_out=0))
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise ModuleNotFoundError("no", name="torch_pruning")

    monkeypatch.setattr(errors.importlib, "import_module", gone)
    with pytest.raises(MissingExtra, match=r"'torch_pruning' is not installed\n  pip install 'edgepack\[prune\]'"):
        prune(net(), tmp_path, TASK)


def test_a_network_that_the_library_cannot_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> Any:
        raise ZeroDivisionError("integer division or modulo by zero")

    monkeypatch.setattr(_channels, "_graph", lost)
    with pytest.raises(
        Unsupported, match=r"prune: Residual has no channels that can be removed \(Residual: Torch-Pruni"
    ):
        prune(net(), tmp_path, TASK)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prune: leave: no layer is called 'wid'\n  did you mean 'wide'"):
        prune(net(), tmp_path, TASK, leave=("wid",))
    with pytest.raises(InputError, match="prune: criterion = 'taylor' looks at data, and the task has none"):
        prune(net(), tmp_path, TASK, criterion="taylor")
    with pytest.raises(InputError, match="prune: tune: the task has no training data"):
        prune(net(), tmp_path, TASK, tune=Tune())
    with pytest.raises(Unsupported, match=r"Sequential has no channels that can be removed \(0: no layer reads"):
        prune(nn.Sequential(nn.Conv2d(3, 16, 3)).eval(), tmp_path, TASK)


@pytest.mark.parametrize(
    "options,text",
    [
        ({"criterion": "l3"}, "criterion is one of taylor, l1, l2, bn-scale, not 'l3'"),
        ({"leave": ["a", ""]}, "leave is a list of names"),
        ({"multiple": 0}, "multiple is a whole number from 1"),
        ({"least": 1.5}, "least is from 0 to 1"),
        ({"macs_ratio": 0.0}, "macs_ratio is above 0 and at most 1"),
        ({"latency_ratio": {"tflite": 0.5}}, "latency_ratio names tflite, which is not among targets"),
        ({"latency_ratio": 0.5, "targets": []}, "latency_ratio is measured: name a format in targets"),
    ],
)
def test_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        build(Pass, {"use": "prune", **options})


def test_half_the_macs_if_no_budget_is_given() -> None:
    item = build(Pass, {"use": "prune", "tune": {"epochs": 3}})
    assert isinstance(item, Prune)
    assert item.macs_ratio == 0.5
    assert item.tune == Tune(epochs=3)
    assert build(Pass, {"use": "prune", "size_ratio": 0.5}).macs_ratio is None  # type: ignore[attr-defined]
