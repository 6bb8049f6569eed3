"""Batch norms that folding leaves where they are, each named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from _folding import Cases, check, fold, norms, scramble, task  # noqa: E402
from edgepack.compress.fold import Fold  # noqa: E402
from edgepack.errors import InputError, ParityError  # noqa: E402


def test_a_norm_over_another_axis_stays() -> None:
    notes = check(scramble(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))), 1, 6, 6, left=1)
    assert "0 has its channels on another axis" in notes.text
    notes = check(scramble(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))), 1, 6, 6, left=1)
    assert "1 has its channels on another axis" in notes.text


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda m, x: m.norm(y := m.conv(x)) + y, "other operators also read conv (Conv2d) before it"),
        (lambda m, x: m.norm(torch.cat([m.conv(x), x], 2)), "its input is a concatenation"),
        (lambda m, x: m.norm(m.conv(x).sigmoid()), "its input is sigmoid"),
        (lambda m, x: m.norm(F.conv2d(x, m.conv.weight)), "its input is conv2d"),
        (lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(), "also used outside of the layer"),
        (lambda m, x: m.norm(m.conv(x)) + m.norm.weight.sum(), "also used outside of the layer"),
        (lambda m, x: m.norm(m.conv(x).flip(1)), "its input is flip"),
    ],
)
def test_what_stays_is_named_with_the_reason(how: Callable[[Any, Any], Any], reason: str) -> None:
    notes = check(scramble(Cases(how)), 1, 4, 5, 5, left=2)
    assert "left norm: " in notes.text
    assert reason in notes.text


def test_a_functional_norm_is_named() -> None:
    def how(m: Any, x: Any) -> Any:
        return m.other(m.conv(F.batch_norm(x, m.norm.running_mean, m.norm.running_var)))

    assert "left forward: a batch norm is called as a function" in check(scramble(Cases(how)), 1, 4, 5, 5, left=1).text


def test_batch_statistics_and_bad_statistics_stay() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    folded, notes = fold(module, task(1, 4, 8, 8))
    assert norms(folded) == 1
    assert "left 1: it uses the statistics of the batch, not running ones" in notes.text
    module = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    module[1].running_var[0] = -1.0
    folded, notes = fold(module, task(1, 4, 8, 8))
    assert norms(folded) == 1
    assert "left 1: its statistics are not finite" in notes.text


def test_computed_weights_stay() -> None:
    module = scramble(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)))
    folded, notes = fold(module, task(1, 4, 8, 8))
    assert norms(folded) == 1
    assert "0 cannot be edited (its weight is computed, not a plain parameter)" in notes.text


def test_weights_that_would_overflow_stay() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=1e-12))).half()
    module[1].running_var[0] = 0.0
    module[1].running_mean[0] = 0.0
    module[0].weight.data[0] = 1.0
    folded, notes = fold(module, task(1, 4, 8, 8, dtype="float16"))
    assert norms(folded) == 1
    assert "left 1: merged weights overflow float16" in notes.text
    assert bool((module[0].weight[0] == 1).all())


def test_types_must_agree() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3).half(), nn.BatchNorm2d(6))  # as mixed-precision checkpoints come
    folded, notes = fold(scramble(module), task(1, 4, 8, 8, dtype="float16"))
    assert norms(folded) == 1
    assert "0 is float16, it is float32" in notes.text


def test_a_norm_that_computes_more_stays() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    notes = check(scramble(nn.Sequential(nn.Conv2d(4, 6, 3), Doubled(6))), 1, 4, 8, 8, left=1)
    assert "left 1: Doubled computes more than a batch norm" in notes.text


def test_a_layer_that_ignores_its_bias_is_caught() -> None:
    class Bare(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            return F.conv2d(x, self.weight)

    module = scramble(nn.Sequential(Bare(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
    with pytest.raises(ParityError, match="fold changed the network's answers") as caught:
        fold(module, task(1, 4, 8, 8))
    assert "leave = ['1']" in str(caught.value.hint)


def test_leave_names_layers_and_what_is_inside() -> None:
    def net() -> nn.Module:
        return scramble(nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(3))))

    for leave, left in [(("0",), 1), (("*.1",), 3), (("1.0", "2.*"), 2)]:
        folded, notes = fold(net(), task(1, 4, 9, 9), leave=leave)
        assert norms(folded) == left
        assert "'leave' names" in notes.text


def test_leave_is_checked() -> None:
    with pytest.raises(ValueError, match="leave is a list of layer names"):
        Fold(leave="conv")  # type: ignore[arg-type]
    module = nn.Sequential(nn.Conv2d(4, 4, 3))
    module.add_module("stem", nn.ReLU())
    Fold(leave=("st*",)).check(module, task(1, 4, 9, 9))
    with pytest.raises(InputError, match="no layer is called 'sten'") as caught:
        Fold(leave=("sten",)).check(module, task(1, 4, 9, 9))
    assert caught.value.hint == "did you mean 'stem'?"


def test_a_network_without_norms_is_not_traced() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    folded, notes = fold(module, task(1, 3))  # the shape would not even fit
    assert folded is module
    assert notes.lines == ["nothing to fold: the network has no batch norm"]
