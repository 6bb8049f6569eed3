"""The membrane against what is known of it: its exact modes, its energy, and SciPy's own solution in time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgepack import waves


def mode(size: int, m: int, n: int) -> np.ndarray:
    places = np.pi * (np.arange(size) + 1) / (size + 1)
    return np.sin(m * places)[:, None] * np.sin(n * places)[None]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (5, 1)])
def test_standing_waves_swing_as_the_scheme_must(m: int, n: int) -> None:
    """A mode of the grid keeps its shape; its height is cos(ω·t) with sin(ω/2) = s·√(sin²(…m) + sin²(…n))."""
    size, courant = 15, 0.6
    found = waves.propagate(mode(size, m, n), 60, courant)
    half = [math.sin(0.5 * math.pi * k / (size + 1)) ** 2 for k in (m, n)]
    omega = 2 * math.asin(courant * math.sqrt(sum(half)))
    wanted = np.cos(omega * np.arange(60))[:, None, None] * mode(size, m, n)
    assert np.abs(found - wanted).max() < 1e-10


def test_the_continuous_solution_is_approached_by_second_order() -> None:
    """Error against cos(√2·π·c·t)·sin(πx)·sin(πy) falls by four where the grid is twice as fine."""
    errors = []
    for size in (15, 31, 63):
        steps, step = 2 * (size + 1), 0.5 / (size + 1)
        found = waves.propagate(mode(size, 1, 1), steps + 1, 0.5)[-1]
        errors.append(np.abs(found - math.cos(math.sqrt(2) * math.pi * steps * step) * mode(size, 1, 1)).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_equals_an_independent_solution_of_the_same_membrane() -> None:
    """Finite differences in space solved in time by SciPy to 1e-9; small steps of the scheme come near it."""
    integrate = pytest.importorskip("scipy.integrate")
    sparse = pytest.importorskip("scipy.sparse")
    size, courant, steps = 16, 0.05, 200
    (start,) = waves.membranes(1, size, seed=3)
    line = sparse.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(size, size))
    matrix = sparse.kronsum(line, line).tocsr()
    count = size * size

    def forces(_: float, state: np.ndarray) -> np.ndarray:
        return np.concatenate([state[count:], matrix @ state[:count]])

    time = courant * steps
    begin = np.concatenate([start.ravel(), np.zeros(count)])
    wanted = integrate.solve_ivp(forces, (0, time), begin, rtol=1e-9, atol=1e-11, method="DOP853").y[:count, -1]
    found = waves.propagate(start, 2, courant, every=steps)[-1]
    assert np.linalg.norm(found.ravel() - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_samples_are_frames_of_one_membrane_in_a_row() -> None:
    x, y = waves.samples(6, size=16, past=3, ahead=2, every=2, seed=1)
    assert (x.shape, y.shape) == ((6, 16, 16, 3), (6, 1, 16, 16))
    assert (x.dtype, y.dtype) == (np.float32, np.float32)
    fields = waves.propagate(waves.membranes(6, 16, 1), 15, 0.5, 2)
    for sample in range(6):
        starts = [
            t for t in range(11) if np.allclose(np.moveaxis(x[sample], -1, 0), fields[sample, t : t + 3], atol=1e-6)
        ]
        assert any(np.allclose(y[sample, 0], fields[sample, t + 4], atol=1e-6) for t in starts)
    again, _ = waves.samples(6, size=16, past=3, ahead=2, every=2, seed=1)
    assert (again == x).all()


def test_explosions_are_refused_and_errors_are_relative() -> None:
    with pytest.raises(ValueError, match=r"courant is above 0 and at most 1/√2 = 0.7071"):
        waves.propagate(np.zeros((4, 4)), 3, 0.8)
    targets = np.ones((2, 1, 3, 3))
    assert waves.relative_l2(targets * [[[[1.1]]], [[[0.5]]]], targets) == pytest.approx([0.1, 0.5])
