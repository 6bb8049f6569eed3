"""The code of binary layers: what is written is read, the sizes are the formula's, damage is found."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.treecode import decode, encode, form, width

Signs = NDArray[np.bool_]


def layer(seed: int, channels: int, places: int, density: float) -> tuple[Signs, NDArray[np.int64]]:
    """Rows that differ from an earlier row in about ``density`` of their places, and that tree."""
    generator = np.random.default_rng(seed)
    parents = np.array([-1] + [int(generator.integers(0, child)) for child in range(1, channels)])
    signs = np.zeros((channels, places), bool)
    signs[0] = generator.random(places) < 0.5
    for child in range(1, channels):
        signs[child] = signs[parents[child]] ^ (generator.random(places) < density)
    return signs, parents


layers = st.builds(
    layer, st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 60), st.sampled_from([0.0, 0.02, 0.1, 0.5])
)


@settings(max_examples=150, deadline=None)
@given(layers)
def test_reads_what_it_wrote_and_is_never_longer_than_the_bits(made: tuple[Signs, NDArray[np.int64]]) -> None:
    signs, parents = made
    code = encode(signs, parents)
    np.testing.assert_array_equal(decode(code, *signs.shape), signs)
    assert len(code) <= -(-(signs.size + 2) // 8)


@pytest.mark.parametrize(("density", "wanted"), [(0.004, "indices"), (0.1, "rice"), (0.5, "raw")])
def test_the_shortest_form_is_taken(density: float, wanted: str) -> None:
    assert form(encode(*layer(1, 64, 24, density) if wanted == "indices" else layer(1, 64, 576, density))) == wanted


@pytest.mark.parametrize(("density", "bits"), [(0.05, 0.289), (0.1, 0.476), (0.2, 0.739)])
def test_rice_codes_are_as_short_as_published(density: float, bits: float) -> None:
    signs, parents = layer(2, 256, 2304, density)
    stored = len(encode(signs, parents)) * 8
    tree = 256 * width(256) + 255 * (width(2305) + 4) + 2304 + 2
    assert (stored - tree) / (255 * 2304) == pytest.approx(bits, rel=0.02)


def test_the_size_of_index_lists_is_the_formulas() -> None:
    signs = np.zeros((16, 40), bool)
    signs[3, 7] = signs[9, 39] = True
    parents = np.where(np.arange(16) == 5, -1, 5)
    code = encode(signs, parents)
    assert form(code) == "indices"
    assert len(code) == -(-(2 + 16 * 4 + 40 + 15 * 6 + 2 * 6) // 8)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
def test_damage_is_found(density: float) -> None:
    signs, parents = layer(3, 12, 90, density)
    code = encode(signs, parents)
    for wrong in (code[:-1], code + b"\0", code[:1]):
        with pytest.raises(InputError, match="binary layer of 12 × 90 weights is damaged"):
            decode(wrong, 12, 90)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(1, 9), st.integers(1, 30))
def test_no_bytes_do_harm(code: bytes, channels: int, places: int) -> None:
    with contextlib.suppress(InputError):
        assert decode(code, channels, places).shape == (channels, places)
