"""Factored layers: exact at full rank, as wrong as theory says below it, as large and as costly as the formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("tensorly", reason="pip install 'edgepack[factorize]'")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from edgepack.compress._decompose import cp, factored, tucker  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compress._stages import (  # noqa: E402
    METHODS,
    Form,
    Stage,
    chain_macs,
    chain_module,
    full_ranks,
    stages,
    suits,
    values,
)

LAYERS = {
    "conv1d": lambda: nn.Conv1d(6, 5, 3, stride=2, padding=1),
    "conv1d of groups": lambda: nn.Conv1d(6, 4, 5, padding=4, dilation=2, groups=2, bias=False),
    "odd kernel": lambda: nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "row": lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(1, 2), bias=False),
    "same": lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(2, 1)),
    "valid": lambda: nn.Conv2d(3, 2, 3, padding="valid"),
    "groups": lambda: nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(4, 8, (3, 5), padding=2, groups=4),
    "pointwise": lambda: nn.Conv2d(6, 5, 1, stride=2, padding=1),
    "conv3d": lambda: nn.Conv3d(3, 4, (2, 3, 1), stride=(1, 2, 2), padding=(1, 0, 1)),
    "linear": lambda: nn.Linear(7, 5),
    "linear without bias": lambda: nn.Linear(4, 9, bias=False),
}


def layer(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype).eval()


def example(of: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    dense = Stage.of(of)
    shape = (2, dense.inputs, *(11, 9, 8)[: len(dense.kernel)]) if dense.kernel else (2, 3, dense.inputs)
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_full_rank_is_exact(name: str, method: str, dtype: torch.dtype, limit: float) -> None:
    one = layer(name, dtype)
    dense = Stage.of(one)
    if not suits(dense, method):
        assert dense.kernel in ((), (1, 1), (1, 3)) or (method, len(dense.kernel)) in {
            ("spatial-svd", 1),
            ("spatial-svd", 3),
        }
        return
    chain = factored(one, Form(method, full_ranks(dense, method)))
    x = example(one, dtype)
    with torch.no_grad():
        wanted, found = one(x), chain(x)
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= limit * wanted.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(METHODS), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(), st.tuples(*[st.integers(1, 3)] * 2), st.tuples(*[st.integers(1, 2)] * 2),
    st.tuples(*[st.integers(0, 2)] * 2), st.tuples(*[st.integers(1, 2)] * 2),
)  # fmt: skip
def test_counts_are_what_runs(
    method: str, groups: int, inputs: int, outputs: int, rank: int, other: int, bias: bool,
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    dense = Stage(groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups, bias)
    if not suits(dense, method):
        return
    form = Form(method, (rank, other)[: 2 if method == "tucker" else 1])
    chain, x = stages(dense, form), torch.zeros(1, dense.inputs, 9, 8)
    module, whole = chain_module(chain), chain_module([dense])
    assert values(chain) == sum(value.numel() for value in module.parameters())
    assert chain_macs(chain, (9, 8)) == macs(module, (x,))
    with torch.no_grad():
        assert module(x).shape == whole(x).shape


@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_are_those_of_the_textbook(groups: int) -> None:
    c, o, h, w, r, s = 12, 8, 3, 5, 3, 2
    dense = Stage(groups * c, groups * o, (h, w), (1, 1), (0, 0), (1, 1), groups)
    wanted = {
        "channel-svd": r * (c * h * w + o),
        "spatial-svd": r * (c * h + o * w),
        "tucker": c * r + r * s * h * w + s * o,
        "cp": r * (c + h + w + o),
    }
    for method, count in wanted.items():
        form = Form(method, (r, s)[: 2 if method == "tucker" else 1])
        assert values(stages(dense, form)) == groups * count


def kernel_of(chain: nn.Sequential, like: nn.Conv2d) -> np.ndarray:
    """The dense kernel that a chain computes: its answers to unit impulses, for padding kernel − 1, stride 1."""
    x = torch.eye(like.in_channels, dtype=torch.float64).reshape(like.in_channels, like.in_channels, 1, 1)
    with torch.no_grad():
        answers = chain(x)  # (c, o, k_h, k_w), turned round
    return answers.flip(2, 3).movedim(0, 1).numpy()


@pytest.mark.parametrize(("method", "rows"), [("channel-svd", "o,cij"), ("spatial-svd", "ci,oj")])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_error_of_an_svd_is_the_energy_of_its_tail(method: str, rows: str, rank: int) -> None:
    torch.manual_seed(1)
    one = nn.Conv2d(6, 9, (3, 2), padding=(2, 1), bias=False).double()
    weight = one.weight.detach().numpy()
    matrix = weight.reshape(9, -1) if rows == "o,cij" else weight.transpose(1, 2, 0, 3).reshape(18, 18)
    tail = (np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()
    missed = weight - kernel_of(factored(one, Form(method, (rank,))), one)
    assert (missed**2).sum() == pytest.approx(tail, rel=1e-10, abs=1e-20)


def test_whitened_svd_answers_nearer_than_any_other_of_its_rank() -> None:
    torch.manual_seed(2)
    one = nn.Linear(12, 10).double()
    x = torch.randn(500, 12, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 12, dtype=torch.float64))
    moment = (x.T @ x)[None]
    plain, white = (factored(one, Form("channel-svd", (3,)), seen) for seen in (None, moment))
    with torch.no_grad():
        errors = [float((chain(x) - one(x)).square().sum()) for chain in (plain, white)]
        # the best of its rank: the tail of the answers themselves
        best = float((torch.linalg.svdvals(x @ one.weight.T)[3:] ** 2).sum())
    assert errors[1] < 0.9 * errors[0]
    assert best <= errors[1] <= 1.01 * best


def test_sweeps_of_tucker_never_make_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepack.compress import _decompose

    kernel = torch.randn(12, 10, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = []
    for sweeps in range(4):
        monkeypatch.setattr(_decompose, "SWEEPS", sweeps)
        into, core, out = tucker(kernel, 4, 5)
        found.append(float((kernel - torch.einsum("rc,pr...,op->oc...", into, core, out)).square().sum()))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(found))
    assert found[3] < found[0]


def test_cp_finds_a_planted_rank_and_keeps_its_columns_even() -> None:
    random = torch.Generator().manual_seed(4)
    modes = [torch.randn(size, 3, dtype=torch.float64, generator=random) for size in (8, 7, 3, 3)]
    kernel = torch.einsum("or,cr,ir,jr->ocij", *modes)
    into, down, across, out = cp(kernel, 3)
    found = torch.einsum("or,rc,ri,rj->ocij", out, into, down, across)
    assert (found - kernel).norm() < 1e-2 * kernel.norm()
    norms = torch.stack([into.norm(dim=1), down.norm(dim=1), across.norm(dim=1), out.norm(dim=0)])
    assert torch.allclose(norms, norms[:1].expand_as(norms))


def test_a_kernel_of_zeros_stays_one() -> None:
    one = nn.Conv2d(4, 4, 3).double()
    nn.init.zeros_(one.weight)
    for method in METHODS:
        ranks = tuple(min(2, most) for most in full_ranks(Stage.of(one), method))
        x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
        with torch.no_grad():
            assert torch.allclose(factored(one, Form(method, ranks))(x), one(x))


def test_text_of_forms() -> None:
    assert str(Form("tucker", (16, 24))) == "tucker 16×24"
    assert str(Form("dense")) == "dense"
    assert math.prod(full_ranks(Stage.of(layer("groups")), "cp")) == 3 * 2 * 3
