"""Ranks by energy and EVBMF, in multiples; and the knapsack that spreads a budget over layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="pip install 'edgepack[factorize]'")

from edgepack.compress._knapsack import choose
from edgepack.compress._ranks import rank_by_energy, rank_by_evbmf, rounded


def planted(rank: int, rows: int, columns: int, noise: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns)) + noise * random.normal(
        size=(rows, columns)
    )


@pytest.mark.parametrize(("rows", "columns"), [(64, 576), (576, 64), (40, 40)])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_evbmf_finds_a_planted_rank_and_its_noise(rank: int, rows: int, columns: int) -> None:
    sizes = np.linalg.svd(planted(rank, rows, columns, 0.3), compute_uv=False)
    found, variance = rank_by_evbmf(sizes, rows, columns)
    assert found == rank
    assert variance == pytest.approx(0.09, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_evbmf_keeps_nothing_of_noise(seed: int) -> None:
    sizes = np.linalg.svd(np.random.default_rng(seed).normal(size=(64, 576)), compute_uv=False)
    assert rank_by_evbmf(sizes, 64, 576)[0] == 0


def test_evbmf_without_noise_or_without_anything() -> None:
    sizes = np.linalg.svd(planted(3, 20, 30, 0.0), compute_uv=False)
    assert rank_by_evbmf(sizes, 20, 30)[0] == 3
    assert rank_by_evbmf(np.zeros(4), 4, 9) == (0, 0.0)
    assert rank_by_evbmf(np.array([2.0]), 1, 9)[0] in (0, 1)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_energy_is_the_smallest_rank_that_holds_the_share(values: list[float], share: float) -> None:
    sizes = np.sort(values)[::-1]
    rank, squares = rank_by_energy(sizes, share), sizes**2
    assert 1 <= rank <= len(sizes)
    assert squares[:rank].sum() >= share * squares.sum() * (1 - 1e-9)
    assert rank == 1 or squares[: rank - 1].sum() < share * squares.sum() * (1 + 1e-9)


@given(st.floats(0.1, 300), st.integers(1, 16), st.integers(1, 256))
def test_rounded_ranks_are_multiples_within_the_full_one(rank: float, multiple: int, full: int) -> None:
    found = rounded(rank, multiple, full)
    assert 1 <= found <= full
    assert found == full or found % multiple == 0
    assert found in (full, multiple) or abs(found - rank) <= multiple / 2 + 1e-09


LAYERS = st.lists(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=4),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(LAYERS, st.integers(1, 150), st.integers(1, 40))
def test_knapsack_equals_brute_force(layers: list[list[tuple[float, int, int]]], first: int, second: int) -> None:
    errors = [[form[0] for form in layer] for layer in layers]
    costs = [[[float(form[index]) for form in layer] for layer in layers] for index in (1, 2)]
    best = None
    for picks in itertools.product(*(range(len(layer)) for layer in layers)):
        chosen = [layer[pick] for layer, pick in zip(layers, picks, strict=True)]
        if sum(form[1] for form in chosen) <= first and sum(form[2] for form in chosen) <= second:
            total = sum(form[0] for form in chosen)
            best = total if best is None else min(best, total)
    found = choose(errors, costs, [first, second])
    if best is None:
        assert found is None
        return
    assert found is not None
    chosen = [layer[pick] for layer, pick in zip(layers, found, strict=True)]
    assert sum(form[1] for form in chosen) <= first
    assert sum(form[2] for form in chosen) <= second
    assert sum(form[0] for form in chosen) == pytest.approx(best, abs=1e-6)


def test_knapsack_of_no_layers() -> None:
    assert choose([], [[]], [0.0]) == []
    assert choose([], [[]], [-1.0]) is None
