"""The weights of factored layers: truncated SVD, Tucker-2 by HOSVD and HOOI, CP by alternating least squares.

Everything is computed in float64, one group after the other, and cast to the layer's own type at the end. Weights are
W[o, c, k…] as PyTorch stores them; a linear layer's have no k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edgepack.compress._stages import Form, Stage, chain_module, fill, stages
from edgepack.errors import require

NESTED = ("channel-svd", "spatial-svd")  # a smaller rank is the beginning of a larger one
SWEEPS = 3  # of HOOI, after HOSVD
ITERATIONS, SETTLED = 200, 1e-6  # of alternating least squares, and the relative change that ends them
RIDGE = 1e-10  # of a kernel of norm 1: components may be linearly dependent
DAMPING = 1e-4  # of second moments, of the mean of their diagonal


def factored(layer: nn.Module, form: Form, moment: Tensor | None = None) -> nn.Sequential:
    """The layer in a form, as a chain of standard layers in inference mode; see ``in_forms``."""
    return in_forms(layer, [form], moment)[0]


def in_forms(layer: nn.Module, forms: Sequence[Form], moment: Tensor | None = None) -> list[nn.Sequential]:
    """The layer in several forms; one SVD gives all ranks of a method.

    Args:
        moment: second moment of what the layer reads, (groups, n, n) with n = c·k / groups: ``channel-svd`` then
            makes the error of the results small instead of that of the weights.
    """
    dense, weight = Stage.of(layer), layer.weight
    assert isinstance(weight, Tensor)
    kernels = weight.detach().double().chunk(dense.groups)
    largest = {form.method: max(other.ranks for other in forms if other.method == form.method) for form in forms}
    wholes = {
        method: [factors(kernel, Form(method, ranks), None if moment is None else moment[index])
                 for index, kernel in enumerate(kernels)]
        for method, ranks in largest.items() if method in NESTED
    }  # fmt: skip
    found = []
    for form in forms:
        parts = [_first(whole, form.ranks[0]) for whole in wholes[form.method]] if form.method in NESTED else [
            factors(kernel, form) for kernel in kernels]  # fmt: skip
        found.append(_chain(layer, dense, form, parts))
    return found


def _first(factors_: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The first components of an SVD."""
    into, out = factors_
    return [into[:rank], out[:, :rank]]


def _chain(layer: nn.Module, dense: Stage, form: Form, parts: Sequence[Sequence[Tensor]]) -> nn.Sequential:
    chain = chain_module(stages(dense, form), layer.weight.dtype)  # type: ignore[arg-type]
    for stage, pieces in zip(chain, zip(*parts, strict=True), strict=True):
        last = stage is chain[-1] and isinstance(layer.bias, Tensor)
        fill(stage, torch.cat(pieces), layer.bias if last else None)  # type: ignore[arg-type]
    return chain


def factors(kernel: Tensor, form: Form, moment: Tensor | None = None) -> list[Tensor]:
    """Weights of each stage for one group, outputs first."""
    if form.method == "channel-svd":
        return channel_svd(kernel, form.ranks[0], moment)
    if form.method == "spatial-svd":
        return spatial_svd(kernel, *form.ranks)
    if form.method == "tucker":
        return tucker(kernel, *form.ranks)
    return cp(kernel, *form.ranks)


def unfoldings(kernel: Tensor, method: str) -> list[Tensor]:
    """The matrices whose rank a method cuts; ``cp``: those of ``tucker``."""
    if method == "channel-svd":
        return [kernel.flatten(1)]
    if method == "spatial-svd":
        return [_columns_by_rows(kernel)]
    return [_unfolded(kernel, mode) for mode in (1, 0)]


def channel_svd(kernel: Tensor, rank: int, moment: Tensor | None = None) -> list[Tensor]:
    """W = B·A with A (rank, c·k) and B (o, rank), both scaled by the roots of the singular values.

    With a second moment X·Xᵀ = L·Lᵀ the SVD is that of W·L, which makes ‖(W − B·A)·X‖ least.
    """
    matrix = kernel.flatten(1)
    if moment is None:
        return _halves(matrix, rank)
    damped = moment.double() + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    lower = torch.linalg.cholesky(damped)
    into, out = _halves(matrix @ lower, rank)
    return [torch.linalg.solve_triangular(lower, into, upper=False, left=False), out]


def spatial_svd(kernel: Tensor, rank: int) -> list[Tensor]:
    """Vertical filters (rank, c, k_h) and horizontal ones (o, rank, k_w): SVD of W as (c·k_h) × (o·k_w)."""
    outputs, inputs, height, width = kernel.shape
    across, down = _halves(_columns_by_rows(kernel), rank)
    vertical = down.T.reshape(rank, inputs, height)
    return [vertical, across.reshape(rank, outputs, width).movedim(1, 0)]


def tucker(kernel: Tensor, inputs: int, outputs: int) -> list[Tensor]:
    """W = core ×₀ U_o ×₁ U_c: HOSVD, then sweeps of HOOI, whose error never rises."""
    out, into = _leading(_unfolded(kernel, 0), outputs), _leading(_unfolded(kernel, 1), inputs)
    for _ in range(SWEEPS if inputs < kernel.shape[1] or outputs < kernel.shape[0] else 0):
        out = _leading(_unfolded(torch.einsum("oc...,cr->or...", kernel, into), 0), outputs)
        into = _leading(_unfolded(torch.einsum("oc...,or->rc...", kernel, out), 1), inputs)
    core = torch.einsum("oc...,op,cr->pr...", kernel, out, into)
    return [into.T.contiguous(), core, out]


def cp(kernel: Tensor, rank: int) -> list[Tensor]:
    """W = Σ_r q_r ⊗ a_r ⊗ u_r ⊗ …: exact at full rank, alternating least squares below.

    The columns of a component are given equal norms, so that none is huge beside another.
    """
    modes = _exact_modes(kernel) if rank >= math.prod(kernel.shape) // max(kernel.shape) else _fitted(kernel, rank)
    missing = rank - modes[0].shape[1]
    modes = [torch.nn.functional.pad(mode, (0, missing)) for mode in modes]
    norms = torch.stack([mode.norm(dim=0) for mode in modes])
    even = norms.clamp_min(torch.finfo(norms.dtype).tiny).log().mean(0).exp()
    alive = (norms > 0).all(0)
    out, into, *space = (mode * torch.where(alive, even / norms[index].clamp_min(1e-300), 0.0)
                         for index, mode in enumerate(modes))  # fmt: skip
    # an axis of one tap has no stage of its own
    flat = [mode for mode in space if mode.shape[0] == 1]
    for mode in flat:
        into = into * mode
    return [into.T.contiguous(), *(mode.T.contiguous() for mode in space if mode.shape[0] > 1), out]


def _fitted(kernel: Tensor, rank: int) -> list[Tensor]:
    size = kernel.norm()
    if size == 0:
        return [torch.zeros(length, rank, dtype=torch.float64) for length in kernel.shape]
    decomposition = require("tensorly.decomposition", "factorize")
    found = decomposition.parafac(
        (kernel / size).numpy(), rank, n_iter_max=ITERATIONS, init="svd", tol=SETTLED, random_state=0, l2_reg=RIDGE
    )
    first, *rest = (torch.from_numpy(np.ascontiguousarray(mode)).double() for mode in found.factors)
    return [first * torch.from_numpy(np.asarray(found.weights)).double() * size, *rest]


def _exact_modes(kernel: Tensor) -> list[Tensor]:
    """One component per place of all axes but the longest, which holds the values there."""
    longest = max(range(kernel.dim()), key=lambda axis: kernel.shape[axis])
    others = [axis for axis in range(kernel.dim()) if axis != longest]
    places = list(itertools.product(*(range(kernel.shape[axis]) for axis in others)))
    modes: list[Tensor] = [torch.empty(0)] * kernel.dim()
    for number, axis in enumerate(others):
        rows = torch.tensor([place[number] for place in places])
        modes[axis] = torch.nn.functional.one_hot(rows, kernel.shape[axis]).T.double()
    modes[longest] = kernel.movedim(longest, 0).reshape(kernel.shape[longest], -1)
    return modes


def _halves(matrix: Tensor, rank: int) -> list[Tensor]:
    """A (rank, n) and B (m, rank) with B·A the best approximation of a rank (Eckart and Young)."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = sizes[:rank].sqrt()
    return [roots[:, None] * right[:rank], left[:, :rank] * roots]


def _columns_by_rows(kernel: Tensor) -> Tensor:
    """(o, c, k_h, k_w) → (c·k_h, o·k_w)."""
    return kernel.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _unfolded(kernel: Tensor, mode: int) -> Tensor:
    return kernel.movedim(mode, 0).flatten(1)


def _leading(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors, by the eigenvectors of the small Gram matrix."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors.flip(1)[:, :count]
