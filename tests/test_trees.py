"""Spanning trees over binary channels: SciPy's length, exact sums, least depth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.csgraph import minimum_spanning_tree

pytest.importorskip("torch")

from edgepack.trees import ROOT, Tree, distances, rooted_at_centre, spanning_tree


def random_signs(seed: int, channels: int, places: int) -> NDArray[np.bool_]:
    generator = np.random.default_rng(seed)
    prototypes = generator.random((3, places)) < 0.5
    return prototypes[generator.integers(0, 3, channels)] ^ (generator.random((channels, places)) < 0.1)


layers = st.builds(random_signs, st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 40))


def test_distances_count_the_places_that_differ() -> None:
    signs = random_signs(0, 7, 19)
    wanted = (signs[:, None] != signs[None]).sum(2)
    np.testing.assert_array_equal(distances(signs), wanted)


@settings(max_examples=60, deadline=None)
@given(layers)
def test_no_tree_is_shorter(signs: NDArray[np.bool_]) -> None:
    between = distances(signs)
    tree = spanning_tree(between)
    # SciPy takes a stored 0 for a missing edge: one more everywhere
    shortest = minimum_spanning_tree(between + 1).sum() - (len(signs) - 1)
    assert tree.length == round(float(shortest))
    assert (tree.parents == ROOT).sum() == 1
    order = tree.order().tolist()
    assert all(order.index(parent) < order.index(child) for child, parent in enumerate(tree.parents) if parent != ROOT)


@settings(max_examples=60, deadline=None)
@given(layers, st.integers(0, 2**32 - 1))
def test_sums_along_the_tree_are_the_layers_sums(signs: NDArray[np.bool_], seed: int) -> None:
    tree = spanning_tree(distances(signs))
    inputs = np.where(np.random.default_rng(seed).random(signs.shape[1]) < 0.5, 1, -1)
    weights = np.where(signs, 1, -1)
    sums = np.zeros(len(signs), np.int64)
    for channel in tree.order():
        parent = tree.parents[channel]
        if parent == ROOT:
            sums[channel] = weights[channel] @ inputs
        else:
            differs = signs[channel] != signs[parent]
            assert differs.sum() == tree.lengths[channel]
            sums[channel] = sums[parent] + 2 * (inputs[differs] @ weights[channel][differs])
    np.testing.assert_array_equal(sums, weights @ inputs)


@settings(max_examples=60, deadline=None)
@given(layers)
def test_no_other_root_is_less_deep(signs: NDArray[np.bool_]) -> None:
    between = distances(signs)
    tree = spanning_tree(between)
    assert tree.depth == min(with_root(tree, root).depth for root in range(len(signs)))


def with_root(tree: Tree, root: int) -> Tree:
    parents = tree.parents.copy()
    channel, above = root, ROOT
    while channel != ROOT:
        parents[channel], channel, above = above, int(parents[channel]), channel
    return Tree(parents, tree.lengths)


def test_a_chain_is_held_in_its_middle() -> None:
    chain = np.arange(-1, 8)
    between = np.abs(np.arange(9)[:, None] - np.arange(9)[None])
    tree = rooted_at_centre(chain, between)
    assert (tree.root, tree.depth, tree.length) == (4, 4, 8)


@pytest.mark.parametrize(("channels", "places", "density"), [(64, 576, 0.454), (128, 1152, 0.465), (256, 2304, 0.472)])
def test_random_layers_have_the_expected_density(channels: int, places: int, density: float) -> None:
    signs = np.random.default_rng(0).random((channels, places)) < 0.5
    tree = spanning_tree(distances(signs))
    assert tree.length / ((channels - 1) * places) == pytest.approx(density, abs=0.003)
