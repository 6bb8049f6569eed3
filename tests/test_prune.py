"""The pass prune: which channels can go, what stays, and what it says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("torch_pruning", reason="pip install 'edgepack[prune]'")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _pruning import ITEM, ONE, TASK, data, gap, groups_of, net, prune, rows  # noqa: E402
from edgepack import errors  # noqa: E402
from edgepack.compress import _channels  # noqa: E402
from edgepack.compress._channels import DOUBLE, SINGLE, Survey, Trial, difference  # noqa: E402
from edgepack.compress._cutting import IN, OUT, Group, mask, remove, width  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.contracts import Pass  # noqa: E402
from edgepack.errors import InputError, MissingExtra, Unsupported  # noqa: E402
from edgepack.recipe import build  # noqa: E402
from edgepack.task import Task  # noqa: E402


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
