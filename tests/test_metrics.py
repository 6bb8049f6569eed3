"""Metrics against PyTorch, scikit-learn and hand-made cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.errors import InputError
from edgepack.metrics import Metric, find

HERE = Path()
RANDOM = np.random.default_rng(0)


def value(metric: str | dict[str, Any], outputs: Any, targets: Any) -> float:
    found = find(metric, HERE)
    return found.reduce(found.statistics(np.asarray(outputs), np.asarray(targets)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(6, 20), st.integers(0, 99))
def test_top_k_equals_scikit_learn(count: int, classes: int, seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn")
    random = np.random.default_rng(seed)
    outputs, targets = random.standard_normal((count, classes)), random.integers(0, classes, count)
    for k in (1, 5):
        wanted = sklearn.top_k_accuracy_score(targets, outputs, k=k, labels=range(classes))
        assert value(f"top{k}", outputs, targets) == pytest.approx(wanted)


def test_top1_ties_nan_and_column_targets() -> None:
    outputs = np.array([[1.0, 1.0], [1.0, 1.0], [np.nan, 0.0], [0.0, 1.0]])
    assert find("top1", HERE).statistics(outputs, np.array([[0], [1], [0], [1]])).ravel().tolist() == [1, 0, 0, 1]


def test_psnr_equals_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    one, other = RANDOM.random((4, 3, 9, 7), dtype=np.float32), RANDOM.random((4, 3, 9, 7), dtype=np.float32)
    error = torch.nn.functional.mse_loss(*map(torch.from_numpy, (one, other)), reduction="none").mean((1, 2, 3))
    assert value("psnr", one, other) == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-5)
    assert value({"use": "psnr", "peak": 2}, one, other) == pytest.approx(
        value("psnr", one, other) + 20 * math.log10(2)
    )
    assert value({"use": "psnr", "border": 2}, one, other) == pytest.approx(
        value("psnr", one[:, :, 2:-2, 2:-2], other[:, :, 2:-2, 2:-2])
    )
    assert value("psnr", one, one) == pytest.approx(100)


def test_psnr_y_on_known_colours() -> None:
    """White is luma 235 and black 16; one level of luma is 20 log10(255) dB."""
    white, black = np.ones((1, 3, 8, 8), np.float32), np.zeros((1, 3, 8, 8), np.float32)
    assert value("psnr_y", white, black) == pytest.approx(20 * math.log10(255 / 219))
    assert value("psnr_y", white * 1.5, white) == pytest.approx(100)  # clipped
    edge = black.copy()
    edge[..., :2, :] = 1
    assert value("psnr_y", edge, black) == pytest.approx(100)
    assert value({"use": "psnr_y", "border": 0}, edge, black) < 20
    gray = np.full_like(black, 1.16 / 255)  # one 8-bit level: luma 16.86, rounded to 17
    assert value("psnr_y", gray, black) == pytest.approx(20 * math.log10(255))


def test_rmse_equals_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn")
    one, other = RANDOM.standard_normal((7, 5)), RANDOM.standard_normal((7, 5))
    assert value("rmse", one, other) == pytest.approx(math.sqrt(sklearn.mean_squared_error(one, other)))
    assert not find("rmse", HERE).higher_is_better


def test_mean_iou_equals_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn")
    outputs, targets = RANDOM.standard_normal((3, 4, 6, 5)), RANDOM.integers(0, 4, (3, 6, 5))
    ignored = RANDOM.random(targets.shape) < 0.2
    targets[ignored] = 255
    wanted = sklearn.jaccard_score(targets[~ignored], outputs.argmax(1)[~ignored], average="macro")
    assert value("mean_iou", outputs, targets) == pytest.approx(wanted)


def test_mean_iou_leaves_out_absent_classes() -> None:
    outputs = np.zeros((1, 5, 2, 2))
    outputs[:, 3] = 1
    assert value("mean_iou", outputs, np.full((1, 2, 2), 3)) == 1
    assert value("mean_iou", outputs, np.full((1, 2, 2), 255)) == 0


def test_agreement_needs_no_labels() -> None:
    metric = find("agreement", HERE)
    outputs = RANDOM.standard_normal((6, 4))
    shifted = outputs.copy()
    shifted[0] = -shifted[0]
    assert metric.needs_original
    assert metric.statistics(shifted, outputs).ravel().tolist() == [0, 1, 1, 1, 1, 1]
    dense = RANDOM.standard_normal((2, 3, 4, 4))
    half = dense.copy()
    half[..., :2, :] = np.roll(half[..., :2, :], 1, axis=1)
    assert metric.statistics(half, dense).ravel().tolist() == [0.5, 0.5]


def test_wilson_interval_for_shares() -> None:
    """Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662."""
    metric = find("top1", HERE)
    low, high = metric.interval(np.repeat([1.0, 0.0], [81, 182])[:, None])
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_bootstrap_interval_covers_and_repeats() -> None:
    metric = find("psnr", HERE)
    rows = RANDOM.normal(30, 2, (400, 1))
    low, high = metric.interval(rows)
    assert metric.interval(rows) == (low, high)
    assert (high - low) == pytest.approx(2 * 1.96 * rows.std() / 20, rel=0.1)
    one = metric.interval(rows[:1])
    assert one[0] == one[1] == rows[0, 0]


def test_format() -> None:
    assert find("top1", HERE).format(0.91687) == "91.69 %"
    assert find("psnr_y", HERE).format(37.911) == "37.91 dB"
    assert find("rmse", HERE).format(0.123456) == "0.1235"


def test_callable(tmp_path: Path) -> None:
    code = "import numpy as np\ndef worst(outputs, targets):\n    return np.abs(outputs - targets).max(axis=1)\n"
    (tmp_path / "mine.py").write_text(code)
    metric = find({"use": "mine.py:worst", "unit": "m", "higher_is_better": False, "output": "boxes"}, tmp_path)
    outputs = {"scores": np.zeros((2, 2)), "boxes": np.array([[1.0, 2.0], [3.0, 4.0]])}
    statistics = metric.statistics(metric.pick(outputs), np.zeros((2, 2)))
    assert metric.format(metric.reduce(statistics)) == "3.00 m"
    assert not metric.higher_is_better
    with pytest.raises(InputError, match=r"mine.py:worst failed: ValueError"):
        metric.statistics(np.zeros((2, 2)), np.zeros((2, 3)))


def test_first_output_by_default() -> None:
    outputs = {"b": np.ones(1), "a": np.zeros(1)}
    assert find("top1", HERE).pick(outputs)[0] == 1
    with pytest.raises(InputError, match=r"no output 'boxs'"):
        find({"use": "top1", "output": "boxs"}, HERE).pick(outputs)


@pytest.mark.parametrize(
    "spec, text",
    [
        ("top2", "did you mean"),
        ({"use": "psnr", "pek": 1}, "did you mean 'peak'"),
        ({"use": "psnr", "border": "two"}, "a number from 0"),
        ({}, "there is no metric ''"),
        ("gone.py:f", "does not exist"),
    ],
)
def test_unknown_metrics(spec: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        find(spec, HERE)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "name, outputs, targets, text",
    [
        ("top1", np.zeros((2, 3)), None, "needs targets"),
        ("top1", np.zeros((2, 3)), np.zeros(3, int), "2 outputs and 3 targets"),
        ("top1", np.zeros((2, 3)), np.array([0, 3]), "labels reach from 0 to 3, the output has 3 classes"),
        ("top1", np.zeros((2, 3)), np.array([-1, 1]), "labels reach from -1"),
        ("top1", np.zeros((2, 3)), np.zeros(2), "integer targets"),
        ("top1", np.zeros((2, 3, 4)), np.zeros(2, int), "not (2, 3, 4)"),
        ("top5", np.zeros((2, 3)), np.zeros(2, int), "always right"),
        ("psnr", np.zeros((1, 3, 4, 4)), np.zeros((1, 3, 8, 8)), "differ in shape"),
        ("psnr_y", np.zeros((1, 1, 8, 8)), np.zeros((1, 1, 8, 8)), "RGB"),
        ("psnr_y", np.zeros((1, 3, 4, 4)), np.zeros((1, 3, 4, 4)), "leaves nothing"),
        ("mean_iou", np.zeros((1, 2, 4, 4)), np.full((1, 4, 4), 2), "labels reach 2"),
        ("mean_iou", np.zeros((1, 2, 4, 4)), np.zeros((1, 4, 5), int), "integer classes"),
    ],
)
def test_misfits(name: str, outputs: Any, targets: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        find(name, HERE).statistics(outputs, targets)
    assert text in str(caught.value)


def test_rows_must_match_samples() -> None:
    metric = Metric(name="whole", score=lambda outputs, targets: np.zeros(1))
    with pytest.raises(InputError, match="expected one row per sample"):
        metric.statistics(np.zeros((3, 2)), np.zeros(3))
