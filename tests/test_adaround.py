"""Rounding learned: never worse than what it starts from, and its objective is what the layer computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from _networks import Chain  # noqa: E402
from _samples import Samples  # noqa: E402
from edgepack.compress._adaround import AdaRound, row_errors, settled  # noqa: E402
from edgepack.compress._gptq import round_in_turn  # noqa: E402
from edgepack.compress._grid import group_scale, round_to, weight_scale  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

TOP = 7


def read(columns: int, samples: int = 300) -> Tensor:
    """Columns depend on each other, as those of a network do."""
    torch.manual_seed(1)
    mixing = torch.randn(columns, max(columns // 8, 1))
    return (torch.randn(samples, mixing.shape[1]) @ mixing.T + torch.randn(samples, columns)).relu()


def learned(weight: Tensor, scale: Tensor, moments: Tensor, seconds: float = 100.0) -> tuple[Tensor, AdaRound]:
    rounding = AdaRound(seconds, 1, lambda count: None)
    return rounding.round(weight, scale, moments, TOP), rounding


def moments_of(x: Tensor) -> Tensor:
    return (x.T.double() @ x.double())[None]


@pytest.mark.parametrize("columns", [1, 7, 40])
def test_errors_of_rows_are_those_of_the_layers_result(columns: int) -> None:
    x, weight = read(columns), torch.randn(5, columns)
    rounded = round_to(weight, weight_scale(weight, top=TOP), TOP)
    wanted = (F.linear(x.double(), (rounded - weight).double())).square().sum(0)
    torch.testing.assert_close(row_errors(weight, rounded, moments_of(x)), wanted)


@pytest.mark.parametrize("columns", [1, 9, 48])
def test_no_row_is_worse_than_its_nearest_values_or_columns_in_turn(columns: int) -> None:
    torch.manual_seed(0)
    x, weight = read(columns), torch.randn(12, columns)
    weight[3] = 0
    scale, moments = weight_scale(weight, top=TOP), moments_of(x)
    found, _ = learned(weight, scale, moments)
    for other in (round_to(weight, scale, TOP), round_in_turn(weight, scale, moments, TOP)):
        assert (row_errors(weight, found, moments) <= row_errors(weight, other, moments)).all()
    whole = found / scale[:, None]
    torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
    assert whole.abs().max().round() <= TOP


def test_few_columns_reach_the_best_of_all_ways_to_round() -> None:
    torch.manual_seed(2)
    x, weight = read(8), torch.randn(6, 8)
    scale, moments = weight_scale(weight, top=TOP), moments_of(x)
    floor = (weight / scale[:, None]).floor()
    ways = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    every = torch.stack([row_errors(weight, (floor + up).clamp(-TOP, TOP) * scale[:, None], moments) for up in ways])
    found = row_errors(weight, learned(weight, scale, moments)[0], moments)
    assert found.sum() <= 1.05 * every.amin(0).sum()


@pytest.mark.parametrize("groups", [1, 3])
def test_no_single_step_gains_any_more(groups: int) -> None:
    torch.manual_seed(3)
    weight, moments = torch.randn(2 * groups, 12), torch.cat([moments_of(read(12, 50 + g)) for g in range(groups)])
    scale = weight_scale(weight, top=TOP)
    start = round_to(weight, scale, TOP)
    found = settled(weight, start, scale, moments, TOP)
    errors = row_errors(weight, found, moments)
    assert errors.sum() < row_errors(weight, start, moments).sum()
    for column in range(12):
        for step in (-1, 1):
            other = found.clone()
            other[:, column] = (other[:, column] + step * scale).clamp(-TOP * scale, TOP * scale)
            assert (row_errors(weight, other, moments) >= errors * (1 - 1e-6)).all()


def test_groups_of_channels_and_of_columns_and_columns_never_read() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    x = read(32)
    x[:, 5] = 0
    scale = group_scale(weight, TOP, 16)
    found, _ = learned(weight, scale, moments_of(x))
    assert found.isfinite().all()
    nearest = round_to(weight, scale, TOP)
    assert row_errors(weight, found, moments_of(x)).sum() < 0.7 * row_errors(weight, nearest, moments_of(x)).sum()
    depthwise, both = torch.randn(4, 1, 3, 3), torch.stack([moments_of(read(9))[0]] * 4)
    rows = weight_scale(depthwise, top=TOP)
    assert learned(depthwise, rows, both)[0].shape == (4, 1, 3, 3)
    one, _ = learned(depthwise[:1], rows[:1], both[:1])
    torch.testing.assert_close(learned(depthwise, rows, both)[0][:1], one)


def test_without_time_rows_are_still_no_worse_and_it_is_said() -> None:
    torch.manual_seed(0)
    x, weight = read(24), torch.randn(5, 24)
    scale, moments = weight_scale(weight, top=TOP), moments_of(x)
    found, rounding = learned(weight, scale, moments, seconds=0.0)
    in_turn = round_in_turn(weight, scale, moments, TOP)
    assert (row_errors(weight, found, moments) <= row_errors(weight, in_turn, moments)).all()
    assert rounding.cut == 1
    assert "0 s did not suffice for 1 of them" in rounding.sentence()


def made(folder: Path, **options: Any) -> tuple[float, PassRun]:
    """Squared error of the outputs on the calibration samples."""
    x = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(x))  # type: ignore[arg-type]
    run = PassRun(folder, 0, Plan(), Silent(), Chain(), task)
    module = Quantize(weight_bits=4, explain=False, **options).apply(copy.deepcopy(Chain().eval()), task, run)
    with torch.no_grad():
        return float((module(torch.from_numpy(x)) - Chain()(torch.from_numpy(x))).square().sum()), run


def test_the_pass_learns_layer_after_layer(tmp_path: Path) -> None:
    error, run = made(tmp_path, rounding="adaround")
    nearest, _ = made(tmp_path, rounding="nearest")
    assert error < nearest
    [note] = [note for note in run.notes if note.startswith("learned to round")]
    assert note.startswith("learned to round 3 layers: 0.")
    again, _ = made(tmp_path, rounding="adaround")
    assert again == error


def test_options() -> None:
    with pytest.raises(ValueError, match="rounding_seconds is a time, not -1"):
        Quantize(rounding="adaround", rounding_seconds=-1)
    with pytest.raises(ValueError, match="rounding is one of nearest, gptq, adaround, not 'up'"):
        Quantize(rounding="up")
