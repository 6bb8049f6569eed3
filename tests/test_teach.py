"""What a teacher adds: probabilities, outputs, and ScaleKD's feature losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
scipy_fft = pytest.importorskip("scipy.fft")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from edgepack.compress._teach import distance, divergence, matching, output_index, output_names  # noqa: E402
from edgepack.compress._teach_features import (  # noqa: E402
    FeatureLoss,
    FeaturePair,
    Projector,
    as_tokens,
    features_of,
    frequency,
    pair_features,
    spatial,
)
from edgepack.errors import InputError  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


def maps(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.floats(0.5, 8), st.integers(0, 20))
def test_divergence_is_the_formula(temperature: float, seed: int) -> None:
    student, teacher = maps(5, 7, seed=seed), maps(5, 7, seed=seed + 1)
    ours, theirs = (np.exp(x.numpy() / temperature) for x in (student, teacher))
    ours, theirs = ours / ours.sum(1, keepdims=True), theirs / theirs.sum(1, keepdims=True)
    wanted = temperature**2 * (theirs * np.log(theirs / ours)).sum(1).mean()
    assert float(divergence(student, teacher, temperature)) == pytest.approx(wanted)
    assert float(divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(student + 3, teacher, temperature)) == pytest.approx(
        wanted
    )  # a shift changes no probability


def test_scores_of_pixels_count_once_per_position() -> None:
    student, teacher = maps(2, 4, 3, 3), maps(2, 4, 3, 3, seed=1)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 4) for x in (student, teacher)]
    torch.testing.assert_close(divergence(student, teacher, 2), divergence(*rows, 2))


def test_every_output_is_matched_in_its_own_way() -> None:
    student, teacher = (
        [maps(3, 4), maps(3, 2), torch.arange(3)],
        [maps(3, 4, seed=1), maps(3, 2, seed=2), torch.zeros(3)],
    )
    both = divergence(student[0], teacher[0], 4) + distance(student[1], teacher[1])
    torch.testing.assert_close(matching(student, teacher, 0, 4).double(), both)
    plain = distance(student[0], teacher[0]) + distance(student[1], teacher[1])
    torch.testing.assert_close(matching(student, teacher, None, 4).double(), plain)
    assert float(distance(teacher[0] * 0, teacher[0])) == pytest.approx(1)


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 9))
@settings(deadline=None)
def test_frequency_view_is_a_dct_without_its_zeroth_coefficient(height: int, width: int, seed: int) -> None:
    def without(x: Any) -> Any:
        coefficients = scipy_fft.dctn(x.numpy(), axes=(2, 3))
        coefficients[:, :, 0, 0] = 0
        return torch.from_numpy(scipy_fft.idctn(coefficients, axes=(2, 3)))

    student, teacher = maps(2, 3, height, width, seed=seed), maps(2, 3, height, width, seed=seed + 1)
    unit = [F.normalize(without(x), dim=1) for x in (student, teacher)]
    wanted = (unit[0] - unit[1]).square().sum() / 2
    found = frequency(as_tokens(student), as_tokens(teacher))
    assert float(found) == pytest.approx(float(wanted), rel=2e-2)  # positions at which little is are scaled less
    moved = as_tokens(student + torch.arange(3.0).view(1, 3, 1, 1))
    assert float(frequency(moved, as_tokens(teacher))) == pytest.approx(float(found))


def test_same_features_lose_nothing_and_dead_positions_have_bounded_gradients() -> None:
    feature = as_tokens(maps(2, 3, 4, 4)).relu()
    assert float(spatial(feature, feature)) == 0
    dead = torch.zeros_like(feature).index_fill(1, torch.tensor([0]), 1.0).requires_grad_()
    spatial(dead, feature).backward()
    assert dead.grad is not None
    assert float(dead.grad.abs().max()) < 1e3


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((1, 6, 8, 8), (1, 16, 4, 4)), ((1, 6, 4, 4), (1, 17, 12)), ((1, 9, 6), (1, 17, 12)), ((1, 9, 6), (1, 5, 2, 2))],
)
def test_projectors_bridge_shapes_and_learn(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    loss = FeatureLoss([FeaturePair("a", "b", (student, teacher))])
    assert all(isinstance(projector, Projector) for projector in loss.projectors)
    ours, theirs = torch.randn(3, *student[1:], requires_grad=True), torch.randn(3, *teacher[1:])
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        found = loss({"a": ours}, {"b": theirs})
        found.backward()
        optimizer.step()
        values.append(float(found.detach()))
    assert values[-1] < 0.7 * values[0]
    assert ours.grad is not None
    assert ours.grad.any()


def test_equal_shapes_need_no_projector() -> None:
    loss = FeatureLoss([FeaturePair("a", "a", ((1, 3, 4, 4), (1, 3, 4, 4)))])
    assert not list(loss.parameters())
    feature = maps(2, 3, 4, 4)
    assert float(loss({"a": feature}, {"a": feature})) == 0


def stages(width: int) -> nn.Module:
    def stage(inputs: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())

    names = {"one": stage(3, 1), "two": stage(width, 2), "three": stage(width, 2), "three_more": stage(width, 1)}
    network = nn.Sequential()
    for name, layer in names.items():
        network.add_module(name, layer)
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flat", nn.Flatten())
    network.add_module("head", nn.Linear(width, 5))
    return network.eval()


def test_the_ends_of_the_last_resolutions_are_paired() -> None:
    x = [torch.randn(1, 3, 16, 16)]
    pairs = pair_features(["auto"], stages(4), stages(8), x, [])
    assert [(pair.student, pair.teacher) for pair in pairs] == [("two", "two"), ("three_more", "three_more")]
    assert pairs[0].shapes == ((1, 4, 8, 8), (1, 8, 8, 8))
    named = pair_features(["three.1=three", "auto"], stages(4), stages(8), x, ["three.0"])
    assert (named[0].student, named[0].teacher) == ("three.1", "three")
    with pytest.raises(InputError, match=r"'three\.0' is merged with its batch norm"):
        pair_features(["three.0"], stages(4), stages(8), x, ["three.0"])
    with pytest.raises(InputError, match="no layers of one name"):
        pair_features(["auto"], nn.Sequential(stages(4)), stages(8), x, [])


def test_features_are_maps_or_tokens_computed_once() -> None:
    relu = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(2), nn.LayerNorm(16))
    found = features_of(network, [torch.randn(2, 3, 8, 8)])
    assert found == {"0": (1, 4, 6, 6), "2": (1, 4, 4, 4), "4": (1, 4, 16), "5": (1, 4, 16)}


def test_names_of_outputs() -> None:
    one, many = Task((Input("x", (1, 2)),)), Task((Input("x", (1, 2)),), output_names=("a", "b"))
    x = torch.zeros(1)
    assert output_names(nn.Identity(), x, one) == ["output"]
    assert output_names(nn.Identity(), (x, x), one) == ["output_0", "output_1"]
    assert output_names(nn.Identity(), {"left": x, "right": x}, one) == ["left", "right"]
    assert output_names(nn.Identity(), [x, x], many) == ["a", "b"]
    assert output_index(["a", "b"], None, "loss") == 0
    assert output_index(["a", "b"], "b", "loss") == 1
    with pytest.raises(InputError, match="loss: no output 'c'"):
        output_index(["a", "b"], "c", "loss")


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_results_without_any_difference_between_positions_have_finite_gradients(level: float) -> None:
    student = torch.full((2, 4, 3), level, requires_grad=True)
    teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    loss = spatial(student, teacher) + frequency(student, teacher)
    loss.backward()
    assert bool(loss.isfinite())
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
