"""Filter quality: the reference values of CNN Filter DB, and what follows from the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgepack.compress._filters import drift, orthogonality, random_entropy, rows_of, sparsity, variance_entropy


def random(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "entropy", "ratio"), [((8, 8), 0.917, 1.012), ((40, 25), 0.9525, 1.003), ((128, 128), 0.9541, 1.003)]
)
def test_random_filters_have_the_published_entropy(shape: tuple[int, int], entropy: float, ratio: float) -> None:
    found = sum(variance_entropy(random(*shape, seed)) for seed in range(20)) / 20
    few = shape[0] * shape[1] < 100
    assert found == pytest.approx(entropy, abs=0.01 if few else 0.001)
    assert found / random_entropy(shape[0] * shape[1]) == pytest.approx(ratio, abs=0.01 if few else 0.001)


def test_one_pattern_scaled_has_no_entropy() -> None:
    pattern = torch.arange(9.0).view(1, 1, 3, 3)
    assert variance_entropy(pattern * torch.rand(16, 4, 1, 1)) == pytest.approx(0, abs=1e-6)
    assert variance_entropy(torch.zeros(4, 4, 3, 3)) == 0
    assert variance_entropy(torch.ones(4, 4, 3, 3)) == 0


def test_orthogonal_rows() -> None:
    square = torch.linalg.qr(torch.randn(36, 36, generator=torch.Generator().manual_seed(1)).double())[0]
    assert orthogonality(square.view(36, 4, 3, 3)) == pytest.approx(1)
    assert orthogonality(torch.ones(5, 4, 3, 3)) == pytest.approx(0)
    assert orthogonality(torch.ones(1, 4, 3, 3)) == 1


def test_sparsity_counts_whole_filters() -> None:
    weight = random(10, 10)
    weight[:3] = 0
    weight[3:, 0, 0, 0] = 0  # single zeros do not count
    assert sparsity(weight) == pytest.approx(0.3)
    assert sparsity(torch.zeros(2, 2, 3, 3)) == 1


def test_drift_is_a_symmetric_distance_that_ignores_scale() -> None:
    one, other = random(32, 32), random(32, 32).abs()
    assert drift(one, one) == 0
    assert drift(one, 3 * one) == pytest.approx(0, abs=1e-9)
    assert drift(one, other) == pytest.approx(drift(other, one))
    assert drift(one, other) > 10 * drift(one, random(32, 32, seed=5)) > 0


def test_rows_of_a_network_and_what_they_advise() -> None:
    before = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    after = nn.Sequential(*[nn.Conv2d(8, 8, layer.kernel_size) for layer in before])
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        after[0].weight[:4] = 0  # type: ignore[index]
        after[1].weight.copy_(torch.arange(9.0).view(3, 3) * torch.rand(8, 8, 1, 1) + 1e-3 * torch.rand(8, 8, 3, 3))
        after[3].weight.copy_(random(8, 8))
    rows = list(rows_of(after, before))
    assert [row["layer"] for row in rows] == ["0", "1", "3"]
    assert rows[0]["advice"] == "50% of its filters are all but zero: prune channels"
    assert rows[1]["advice"] == "its filters are few patterns, scaled: factorize with spatial-svd"
    assert rows[0]["drift"] > 0
