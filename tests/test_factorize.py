"""The pass factorize: which layers, which ranks, within which budgets, and what it says."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("scipy", reason="pip install 'edgepack[factorize]'")
from torch import nn  # noqa: E402

from edgepack import profiling, reporting  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compress._stages import CONVOLUTIONS  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress.factorize import Factorize  # noqa: E402
from edgepack.compressing import PassRun, compress  # noqa: E402
from edgepack.contracts import INTEGERS, Pass  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import BudgetError, InputError, Unsupported  # noqa: E402
from edgepack.measurement import Ratio  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.recipe import build  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

ITEM = Input("x", (1, 3, 12, 12))
TASK = Task((ITEM,))
ONE = torch.zeros(1, 3, 12, 12)


def net() -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *middle, nn.ReLU(), *head).eval()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A stopwatch that counts multiply-accumulates and parameters instead; what it was asked."""
    seen: list[tuple[str, int]] = []

    def time(
        self: PassRun,
        modules: Sequence[nn.Module],
        task: Task | None = None,
        format: str = "onnx",
        then: Sequence[Pass] = (),
    ) -> list[float]:
        seen.append((format, len(modules)))
        (item,) = (task or self.task).inputs
        return [1e-3 * macs(module, (torch.zeros(item.shape),)) + 1.0 for module in modules]

    def measure(
        self: PassRun,
        module: nn.Module,
        against: nn.Module | None = None,
        format: str = "onnx",
        then: Sequence[Pass] = (),
    ) -> Ratio:
        value = macs(module, (ONE,)) / macs(against or self.original, (ONE,))
        return Ratio(value, value, value, "a", "faster", value)

    monkeypatch.setattr(PassRun, "time", time)
    monkeypatch.setattr(PassRun, "measure", measure)
    return seen


def apply(module: nn.Module, folder: Path, task: Task = TASK, **options: Any) -> tuple[nn.Module, PassRun]:
    run = PassRun(folder, 0, Plan(), Silent(), module, task)
    item, copied = Factorize(**options), copy.deepcopy(module)
    item.check(copied, task)
    return item.apply(copied, task, run), run


def layers(run: PassRun) -> dict[str, dict[str, Any]]:
    return {row["layer"]: row for row in run.findings["factors"]["layers"]}


def test_half_the_rank_of_every_layer_that_saves(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    module, run = apply(net(), tmp_path, rank=0.5)
    rows = layers(run)
    assert rows["2"]["ranks"] == [8, 16]
    assert rows["5"]["ranks"] == [16, 16]
    assert (rows["9"]["form"], rows["9"]["ranks"]) == ("channel-svd", [32])
    assert rows["0"]["ranks"] == [3, 8]
    assert rows["11"]["form"] == "dense"
    assert rows["11"]["why"] == "no rank saves a tenth of its multiply-accumulates"
    assert [type(layer).__name__ for layer in module[5]] == ["Conv2d"] * 3
    assert module(torch.randn(2, 3, 12, 12)).shape == (2, 4)
    found = run.findings["factors"]
    assert found["macs"] == [macs(net(), (ONE,)), macs(module, (ONE,))]
    assert found["parameters"][1] == sum(value.numel() for value in module.parameters())
    ratio = found["macs"][1] / found["macs"][0]
    assert run.notes[0].startswith(f"factored 4 of 5 layers: {ratio:.3f} × the multiply-accumulates")
    assert found["targets"]["onnx"]["measured"]["value"] == pytest.approx(ratio)
    assert found["targets"]["onnx"]["predicted"] == pytest.approx(ratio, rel=0.05)
    assert found["by_energy"]["macs"] <= found["macs"][1]
    json.dumps(found)


def test_full_energy_leaves_the_answers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    original = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=2), nn.Flatten(), nn.Linear(24 * 64, 10)
    ).eval()
    with torch.no_grad():  # so that some rank holds all the energy
        original[3].weight.copy_(torch.randn(10, 2) @ torch.randn(2, 24 * 64) / 40)
    module, run = apply(original, tmp_path, energy=1.0, multiple=1, targets=())
    assert layers(run)["3"]["ranks"] == [2]
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(module(x), original(x), atol=1e-5)


@pytest.mark.parametrize("budget", ["macs_ratio", "size_ratio", "latency_ratio"])
def test_budgets_are_kept(tmp_path: Path, asked: list[tuple[str, int]], budget: str) -> None:
    before = net()
    module, run = apply(before, tmp_path, method="auto", **{budget: 0.6})
    counts = {"macs_ratio": macs(module, (ONE,)) / macs(before, (ONE,)),
              "size_ratio": np.divide(*[sum(p.numel() for p in item.parameters()) for item in (module, before)]),
              "latency_ratio": run.findings["factors"]["targets"]["onnx"]["predicted"]}  # fmt: skip
    assert counts[budget] <= 0.6
    assert counts[budget] > 0.3
    assert any(row["why"] == "" and row["error"] > 0 for row in layers(run).values())


def test_every_budget_is_kept_in_every_target(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    _, run = apply(net(), tmp_path, macs_ratio=0.7, latency_ratio={"openvino": 0.5}, targets=["onnx", "openvino"])
    found = run.findings["factors"]
    assert found["targets"]["openvino"]["predicted"] <= 0.5
    assert set(found["targets"]) == {"onnx", "openvino"}
    assert {target for target, _ in asked} == {"onnx", "openvino"}


def test_a_budget_out_of_reach_says_how_near_it_comes(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    with pytest.raises(
        BudgetError, match=r"factorize: macs_ratio 0.01 cannot be reached: the cheapest forms give 0\.\d{3}\n"
    ):
        apply(net(), tmp_path, macs_ratio=0.01)


def test_a_layer_that_is_not_faster_stays_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    def time(self: PassRun, modules: Sequence[nn.Module], task: Task, format: str) -> list[float]:
        slow = format == "openvino" and len(task.inputs[0].shape) == 4
        return [1.0, *(0.99 if slow else 0.5 for _ in modules[1:])]

    monkeypatch.setattr(
        PassRun,
        "time",
        lambda self, modules, task=None, format="onnx", then=(): time(self, modules, task or TASK, format),
    )
    _, run = apply(net(), tmp_path, targets=["onnx", "openvino"])
    rows = layers(run)
    assert rows["5"]["form"] == "dense"
    assert rows["5"]["why"] == "no form of it is faster"
    assert rows["9"]["form"] == "channel-svd"


def test_the_report_shows_ranks_errors_and_times(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    compress(net(), TASK, [Factorize(rank=0.5)], tmp_path / "out", Silent())
    data = reporting.build(tmp_path / "out")
    (step,) = data["compressed"]["manifest"]["history"]
    found = step["findings"]["factors"]
    rows = {row["layer"]: row for row in found["layers"]}
    reporting.write_html(data, tmp_path / "report.html")
    page = re.sub(r"\s*<[^>]*>\s*", "|", (tmp_path / "report.html").read_text(encoding="utf-8"))
    dense, own = rows["5"]["ms"]["onnx"]
    assert f"|5||tucker||16×16||{rows['5']['error']:.4f}||{dense:.3f} → {own:.3f} ms|" in page
    assert "|11||dense: no rank saves a tenth of its multiply-accumulates||–||0.0000|" in page
    (predicted, measured) = (found["targets"]["onnx"][key] for key in ("predicted", "measured"))
    assert f"|onnx||{predicted:.3f}||{measured['value']:.3f} [" in page


def test_layers_of_one_shape_are_timed_once_and_remembered(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    twins = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)]).eval()
    task = Task((Input("x", (1, 16, 8, 8)),))
    run = PassRun(tmp_path, 0, Plan(), Silent(), twins, task)
    run.measure = lambda *_: Ratio(1, 1, 1, "", "same", 1)  # type: ignore[method-assign]
    for _ in range(2):
        Factorize(rank=0.5).apply(copy.deepcopy(twins), task, run)
    assert asked == [("onnx", 2), ("onnx", 1)]  # the layer with its form, and the whole network
    run.identity = "other options"
    Factorize(rank=0.5).apply(copy.deepcopy(twins), task, run)
    assert len(asked) == 4


class Odd(nn.Conv2d):
    """Computes what a convolution does, but who knows."""


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd, self.mirror = Odd(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.twice, self.tied = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.mirror(self.odd(x)))).flatten(2).transpose(1, 2)
        return self.encoder(self.tied(x) @ self.tied.weight)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_forms_are_timed_on_the_engine_as_they_will_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx,onnx-run]'")
    seen: list[str] = []
    real = profiling.profile

    def watched(artifacts: Sequence[Any], *rest: Any) -> Any:
        seen.extend(artifact.manifest.dialect for artifact in artifacts)
        return real(artifacts, *rest)

    monkeypatch.setattr(profiling, "profile", watched)
    monkeypatch.setattr(profiling, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(profiling, "SECONDS_EACH", 0.1)
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()).eval()
    random = np.random.default_rng(0)
    data = Arrays((ITEM,), {"x": random.standard_normal((8, 3, 12, 12)).astype(np.float32)}, None, True)
    found, run = apply(original, tmp_path, Task((ITEM,), calibration=data), rank=0.25, precision=precision)
    rows = layers(run)
    dense, own = rows["2"]["ms"]["onnx"]
    assert 0 < own < 2 * dense
    assert {one.startswith(INTEGERS) for one in seen} == {precision == "int8"}
    assert len(list(found.parameters())) >= 4
    assert not run.plan.nodes


def test_timing_in_8_bits_needs_calibration_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no calibration data"):
        apply(net(), tmp_path, precision="int8")


def test_layers_that_cannot_be_factored_are_named(tmp_path: Path) -> None:
    module, run = apply(Strange().eval(), tmp_path, rank=8, targets=())
    left = run.findings["factors"]["left"]
    assert left["odd"] == "Odd may compute more than a plain layer"
    assert left["mirror"] == "it pads reflect, not zeros"
    assert left["tied"] == "its parameters are also used outside of the layer"
    assert left["encoder.linear1"] == "TransformerEncoderLayer reads its weights by name"
    assert layers(run)["twice"]["macs"][0] == 2 * 32 * 32 * 9 * 100
    assert isinstance(module.twice, nn.Sequential)
    assert module(ONE).shape == (1, 100, 32)


def test_leave_and_networks_without_layers(tmp_path: Path) -> None:
    _, run = apply(net(), tmp_path, targets=(), leave=["5"])
    assert run.findings["factors"]["left"] == {"5": "'leave' names it"}
    with pytest.raises(InputError, match="factorize: leave: no layer is called 'conv'"):
        apply(net(), tmp_path, targets=(), leave=["conv"])
    with pytest.raises(
        Unsupported, match=r"factorize: Odd has no layer that can be factored \(: Odd may compute|factorize: Seq"
    ):
        apply(nn.Sequential(Odd(3, 8, 3)).eval(), tmp_path, targets=())
    with pytest.raises(Unsupported, match=r"factorize: ReLU has no layer that can be factored\n"):
        apply(nn.ReLU().eval(), tmp_path, targets=())


def test_evbmf_finds_the_rank_of_a_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(48, 8) @ torch.randn(8, 64) + 0.3 * torch.randn(48, 64))
    task = Task((Input("x", (1, 64)),))
    for weaken, rank in ((0.0, 8), (0.4, 24)):
        _, run = apply(nn.Sequential(linear).eval(), tmp_path, task, rank="evbmf", weaken=weaken, targets=())
        assert layers(run)["0"]["ranks"] == [rank]


def test_low_rank_follows_the_calibration_data(tmp_path: Path) -> None:
    """In a network whose data have few directions, a small rank answers them well."""
    random = np.random.default_rng(0)
    x = (random.normal(size=(64, 6)) @ random.normal(size=(6, 40)) + 0.01 * random.normal(size=(64, 40))).astype(
        np.float32
    )
    item = Input("x", (1, 40))
    module = nn.Sequential(nn.Linear(40, 40)).eval()
    found = []
    for calibration in (None, Arrays((item,), {"x": x}, None)):
        task = Task((item,), calibration=calibration, evaluation=Arrays((item,), {"x": x}, None))
        found.append(layers(apply(module, tmp_path, task, rank=8, targets=())[1])["0"]["error"])
    assert found[0] > 0.1
    assert found[1] < 1e-3


def test_trains_and_goes_with_the_other_passes(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    import edgepack
    from edgepack.compress.fold import Fold
    from edgepack.compress.quantize import Quantize

    random = np.random.default_rng(0)
    images = Arrays((ITEM,), {"x": random.normal(size=(64, 12, 12, 3)).astype(np.float32)}, random.integers(0, 4, 64))
    task = replace(TASK, training=images, calibration=images)
    item = Factorize(rank=0.5, tune=Tune(epochs=1, batch=16, held_out=16))
    done = edgepack.compress(net(), task, [Fold(), item, Quantize(explain=False)], tmp_path)
    history = done.manifest.history
    assert [entry["part"] for entry in history] == ["fold", "factorize", "quantize"]
    assert history[1]["findings"]["tune"]["epochs"]
    assert history[1]["after"]["values"] < history[1]["before"]["values"]
    assert history[1]["options"]["tune"]["epochs"] == 1


@pytest.mark.parametrize(("options", "text"), [
    ({"method": "tuckr"}, "did you mean 'tucker'"),
    ({"rank": 0.5, "energy": 0.9}, "give one of rank, energy, or budgets"),
    ({"rank": 8, "macs_ratio": 0.5}, "give one of rank, energy, or budgets"),
    ({"rank": 8.5}, "rank is a whole number, or a share above 0 and below 1, not 8.5"),
    ({"rank": "evb"}, "rank is a number or 'evbmf', not 'evb'"),
    ({"energy": 1.5}, "energy is above 0 and at most 1"),
    ({"macs_ratio": 0.0}, "macs_ratio is above 0 and at most 1"),
    ({"latency_ratio": {"tflite": 0.5}}, "latency_ratio names tflite, which is not among targets"),
    ({"latency_ratio": 0.5, "targets": []}, "latency_ratio is measured: name a format in targets"),
    ({"method": "auto"}, "method = 'auto' is for budgets"),
    ({"multiple": 0}, "multiple is a whole number from 1"),
    ({"weaken": 2.0}, "weaken is from 0 to 1"),
])  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        build(Pass, {"use": "factorize", **options})


def test_options_of_a_recipe() -> None:
    item = build(Pass, {"use": "factorize", "latency_ratio": {"onnx": 0.7}, "tune": {"epochs": 3}})
    assert item.latency_limit("onnx") == 0.7  # type: ignore[attr-defined]
    assert item.tune.epochs == 3  # type: ignore[attr-defined]
    assert build(Pass, {"use": "factorize"}).rank == 0.5  # type: ignore[attr-defined]
    assert build(Pass, {"use": "factorize", "rank": "evbmf"}).rank == "evbmf"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="tune: the task has no training data"):
        Factorize(tune=Tune()).check(net(), TASK)
    assert len(CONVOLUTIONS) == 3
    assert math.isclose(Factorize(latency_ratio=0.5).latency_limit("onnx") or 0, 0.5)
