"""What quantize finds out about its own losses: figures against another computation, seeded faults by their names."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack import reporting  # noqa: E402
from edgepack.compress._emulation import Emulation, Variant  # noqa: E402
from edgepack.compress._sensitivity import sentences  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import PassRun, compress  # noqa: E402
from edgepack.graph import capture  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

PLAIN: dict[str, Any] = {"equalize": False, "bias_correct": False, "rounding": "nearest", "calibrate": "minmax"}


class Chain(nn.Module):
    """Three layers; ``forward`` is the float network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


class Sum(nn.Module):
    """A residual sum whose one side is ``1 / ratio`` of the other."""

    def __init__(self, ratio: float, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.ratio, self.inplace = ratio, inplace

    def settle(self, x: Tensor) -> None:
        with torch.no_grad():
            large = self.a(x).relu().max()
            self.b.weight /= self.b(self.a(x).relu()).abs().max() * self.ratio / large
            self.b.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu_() if self.inplace else self.a(x).relu()
        y = self.b(x)
        y = y.add_(x) if self.inplace else y + x
        return self.c(y)


def task(samples: int = 20, size: int = 8, shape: tuple[int, ...] = ()) -> Task:
    values = np.random.default_rng(0).standard_normal((samples, 3, size, size)).astype(np.float32)
    return Task((Input("x", shape or (1, 3, size, size)),), calibration=Samples(values))  # type: ignore[arg-type]


def found(module: nn.Module, folder: Path, **options: Any) -> tuple[dict[str, Any], nn.Module, PassRun]:
    run = PassRun(folder, 0, Plan(), Silent(), module, task())
    rounded = Quantize(**options).apply(copy.deepcopy(module.eval()), task(), run)
    return dict(run.findings["sensitivity"]), rounded, run


def decibel(value: Tensor, reference: Tensor) -> float:
    noise = (value.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def by_layer(finding: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["layer"]: row for row in finding["layers"]}


def kinds(row: dict[str, Any]) -> set[str]:
    return {cause["kind"] for cause in row["causes"]}


def rounder(run: PassRun) -> Callable[[str, Tensor], Tensor]:
    """Rounding by the plan, written out."""

    def rounded(name: str, value: Tensor) -> Tensor:
        low, high = (run.plan.nodes[name]["range"][end] for end in ("low", "high"))
        step = (high - low) / 255
        zero = round(-low / step)
        return (torch.clamp(torch.round(value / step) + zero, 0, 255) - zero) * step

    return rounded


def test_figures_are_those_of_a_computation_by_hand(tmp_path: Path) -> None:
    module = Chain().eval()
    finding, other, run = found(module, tmp_path, **PLAIN)
    q, samples = rounder(run), finding["samples"]
    x = torch.from_numpy(task().calibration.values[:samples])

    def network(left: str) -> Tensor:
        """Each layer rounded but one; what that one alone writes or reads is not rounded, nor what no layer reads."""
        a, b, c = (getattr(module if name == left else other, name) for name in "abc")
        y = F.relu(a(x if left == "a" else q("input:x", x)))
        y = F.relu(b(q("relu", y)))
        return c(q("mean", y.mean((2, 3))))

    with torch.no_grad():
        exact = module(x)
        base = decibel(network(""), exact)
        assert finding["sqnr_db"] == pytest.approx(base, abs=0.02)
        rows = by_layer(finding)
        for name in "abc":
            assert rows[name]["gain_db"] == pytest.approx(decibel(network(name), exact) - base, abs=0.05), name
        first = F.relu(module.a(x))
        alone = q("relu", F.relu(F.conv2d(q("input:x", x), other.a.weight, module.a.bias, padding=1)))
        assert rows["a"]["sqnr_db"] == pytest.approx(decibel(alone, first), abs=0.02)
        assert rows["a"]["result_db"] == pytest.approx(decibel(q("relu", first), first), abs=0.02)
        weight = F.relu(F.conv2d(x, other.a.weight, module.a.bias, padding=1))
        assert rows["a"]["weight_db"] == pytest.approx(decibel(weight, first), abs=0.02)


def test_a_channel_a_hundred_times_the_others_is_named_on_both_sides(tmp_path: Path) -> None:
    module = Chain().eval()
    with torch.no_grad():
        module.a.weight[5] *= 100
        module.b.weight[:, 5] /= 100
    rows = by_layer(found(module, tmp_path, **PLAIN)[0])
    for name, where in (("a", "result"), ("b", "input")):
        cause = next(cause for cause in rows[name]["causes"] if cause["kind"] == "outlier channel")
        assert (cause["channel"], cause["where"]) == (5, where)
        assert 50 < cause["ratio"] < 200
    assert "channel 5 of its result reaches" in rows["a"]["causes"][0]["text"]
    calm = by_layer(found(module, tmp_path, **{**PLAIN, "equalize": True})[0])
    assert "outlier channel" not in kinds(calm["b"])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_sum_of_unequal_sides_is_named_with_its_ratio(tmp_path: Path, inplace: bool) -> None:
    module = Sum(50.0, inplace).eval()
    module.settle(torch.from_numpy(task().calibration.values))
    finding, _, _ = found(module, tmp_path, **PLAIN)
    row = next(row for row in finding["layers"] if row["operator"].startswith("add"))
    cause = row["causes"][0]
    assert cause["kind"] == "residual mismatch"
    assert 25 < cause["ratio"] < 100
    assert cause["smaller"] == "conv2d_1"
    assert any("summands differ ×" in text for text in sentences(finding))
    even = Sum(1.0).eval()
    even.settle(torch.from_numpy(task().calibration.values))
    assert not any("residual mismatch" in kinds(row) for row in found(even, tmp_path, **PLAIN)[0]["layers"])


def test_clipped_dead_and_lost_channels_and_a_lone_weight_are_named(tmp_path: Path) -> None:
    module = Chain().eval()
    with torch.no_grad():
        module.a.bias[2] = -100  # dead behind the ReLU
        module.a.weight[3], module.a.bias[3] = module.a.weight[3] * 1e-4, 0.0  # less than a step
        module.b.weight[7, 0, 0, 0] = 10.0
    rows = by_layer(found(module, tmp_path, **PLAIN)[0])
    causes = {cause["kind"]: cause for cause in rows["a"]["causes"]}
    assert causes["dead channel"]["channels"] == [2]
    assert causes["lost channel"]["channels"] == [3]
    assert rows["a"]["causes"][-1]["kind"] == "dead channel"
    lone = next(cause for cause in rows["b"]["causes"] if cause["kind"] == "weight outlier")
    assert lone["channel"] == 7
    values = task(60).calibration.values
    values[0, 0, 0, 0] = 60.0  # one value far out: percentile cuts it off
    job = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(values))  # type: ignore[arg-type]
    run = PassRun(tmp_path, 0, Plan(), Silent(), module, job)
    Quantize(**{**PLAIN, "calibrate": "percentile"}).apply(Chain().eval(), job, run)
    clipped = by_layer(dict(run.findings["sensitivity"]))["a"]["causes"]
    cause = next(cause for cause in clipped if cause["kind"] == "clipped range" and cause["where"] == "input")
    assert 0 < cause["share"] < 0.01
    assert cause["of_error"] > 0.5


def test_leaving_the_worst_layers_in_order_helps_each_time_and_as_much_as_was_said(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())))
    module[0] = nn.Conv2d(3, 6, 3, padding=1)
    with torch.no_grad():
        for layer, peak in ((module[2], 8.0), (module[4], 4.0), (module[8], 16.0)):
            layer.weight[:, 0, 0, 0] += peak * layer.weight.abs().max()
    finding, _, _ = found(module.eval(), tmp_path, **PLAIN)
    steps = [one for one in finding["advice"] if one["change"].startswith("leave")]
    assert len(steps) == 3
    figures = [finding["sqnr_db"], *(step["to_db"] for step in steps)]
    assert figures == sorted(figures)
    sizes = [step["size_ratio"] for step in steps]
    assert sizes == sorted(sizes)
    assert sizes[0] > 1
    for step in steps:
        names = tuple(ast.literal_eval(step["change"].removeprefix("leave = ")))
        again, _, _ = found(module, tmp_path, **PLAIN, leave=names)
        assert again["sqnr_db"] == pytest.approx(step["to_db"], abs=0.1)
    worst = next(row["layer"] for row in finding["layers"])
    assert worst in steps[0]["change"]
    assert any(f"{worst} costs" in text for text in sentences(finding))


@pytest.mark.parametrize("module", [Sum(3.0, inplace=True), Chain()])
def test_a_variant_from_where_it_differs_is_that_variant_from_the_start(module: nn.Module) -> None:
    graph = capture(module.eval(), task())
    captured = graph.program.module(check_guards=False)
    weights = {
        node.name: (torch.zeros_like(module.get_submodule(name).weight) + 0.1, None)
        for node, name in zip([n for n in captured.graph.nodes if "conv2d" in n.name], "abc", strict=False)
    }

    def quantize(node: fx.Node, value: Tensor) -> Tensor:
        return value.mul(8).round().div(8)

    emulation = Emulation(captured, weights, quantize)
    variants = [Variant(frozenset({name})) for name in weights] + [Variant(exact=True), Variant(frozenset(weights))]
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        together = emulation.run([x], variants)
        assert len(together) == len(variants) + 1
        for variant, outputs in zip(variants, together[1:], strict=True):
            alone = emulation.run([x], [variant])[1]
            torch.testing.assert_close(outputs, alone, rtol=0, atol=0)
        torch.testing.assert_close(together[0], emulation.run([x], [])[0], rtol=0, atol=0)
        assert not torch.equal(together[0][0], together[1][0])


def test_it_reaches_the_manifest_and_the_page_and_can_be_left_out(tmp_path: Path) -> None:
    module = Chain().eval()
    with torch.no_grad():
        module.a.weight[5] *= 100
        module.b.weight[:, 5] /= 100
    result = compress(module, task(), [Quantize(**PLAIN)], tmp_path, Silent())
    step = result.manifest.history[0]
    assert step["findings"]["sensitivity"]["layers"][0]["layer"] in "abc"
    assert any("leave = [" in note or "costs" in note for note in result.notes)
    data = reporting.build(tmp_path)
    reporting.write_html(data, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Where rounding loses" in page
    assert "channel 5 of its result reaches" in page
    silent = compress(module, task(), [Quantize(**PLAIN, explain=False)], tmp_path / "b", Silent())
    assert silent.manifest.history[0]["findings"] == {}
    reporting.write_html(reporting.build(tmp_path / "b"), tmp_path / "b" / "report.html")
    assert "Where rounding loses" not in (tmp_path / "b" / "report.html").read_text(encoding="utf-8")


def test_the_same_twice(tmp_path: Path) -> None:
    assert found(Chain().eval(), tmp_path, **PLAIN)[0] == found(Chain().eval(), tmp_path, **PLAIN)[0]
