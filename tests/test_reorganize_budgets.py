"""Keep rates that meet a budget of operations, latency or score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from _reorganizing import TASK, Pictures, apply, images, vit  # noqa: E402
from edgepack.compress._cuts import cuts_of, rates  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.measurement import Ratio  # noqa: E402
from edgepack.metrics import find  # noqa: E402


def test_macs_budget_gives_the_largest_rate_within(tmp_path: Path) -> None:
    network = vit()
    whole = macs(network, (images(1),))
    cut, run = apply(network, tmp_path, macs_ratio=0.6)
    rate = cuts_of(cut)[0].keep_rate
    assert macs(cut, (images(1),)) <= 0.6 * whole
    with rates(cut, rate + 0.01):
        assert macs(cut, (images(1),)) > 0.6 * whole
    assert any(note.startswith(f"macs_ratio 0.6 gives keep rate {rate:g}") for note in run.notes)


def test_latency_budget_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def measure(self: PassRun, module: nn.Module, against: nn.Module | None = None) -> Ratio:
        asked.append(cuts_of(module)[0].rate)
        value = 0.2 + 0.8 * asked[-1]
        return Ratio(value, value - 0.01, value + 0.01, "original", "faster", value)

    monkeypatch.setattr(PassRun, "measure", measure)
    cut, run = apply(vit(), tmp_path, latency_ratio=0.7)
    assert cuts_of(cut)[0].keep_rate == 0.6  # of 0.05 steps the largest with 0.2 + 0.8 · rate ≤ 0.7
    assert len(asked) <= 6
    assert any("measured at keep rate 0.6: 0.680 × [0.670, 0.690]" in note for note in run.notes)


@pytest.mark.parametrize("metric", ["top1", None])
def test_score_budget_gives_the_smallest_rate_that_keeps_it(tmp_path: Path, metric: str | None) -> None:
    pictures = Pictures()
    network = vit()
    with torch.no_grad():
        batch = next(iter(pictures.batches(24)))
        pictures.targets = network(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy() if metric else None
    task = replace(TASK, calibration=pictures, metric=None if metric is None else find(metric, tmp_path))
    cut, run = apply(network, tmp_path, task, score_drop=0.2)
    with torch.no_grad():
        own = cut(torch.from_numpy(batch.inputs["x"])).argmax(1) != network(torch.from_numpy(batch.inputs["x"])).argmax(
            1
        )
        assert own.float().mean() <= 0.2
    assert cuts_of(cut)[0].keep_rate < 1
    assert any("agreement" in note for note in run.notes) == (metric is None)
