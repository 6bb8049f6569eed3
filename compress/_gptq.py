"""Rounding weights one input column after the other, each error passed on to the columns that follow.

After E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), here for convolutions too: the columns of a convolution are those of its unfolded patches, and
every group of channels has its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from edgepack.compress._graph import argument, operator_of
from edgepack.compress._grid import TOP, laid_out, spread
from edgepack.compress._operators import aten
from edgepack.errors import require

DAMPING = 0.01  # of the mean diagonal
COLUMNS = 8192  # beyond this a Hessian takes half a gigabyte
Nearest = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def second_moments(node: fx.Node, reads: Sequence[Tensor], weight: Tensor) -> Tensor | None:
    """Σ x·xᵀ over the patches that each group of a layer reads, (groups, columns, columns) float64.

    None for layers whose patches this does not know, and for very wide ones.

    Args:
        reads: what the layer reads, in as many parts as it comes in.
    """
    columns = weight[0].numel()
    if columns > COLUMNS:
        return None
    if operator_of(node) is aten.linear:
        products = (rows.T @ rows for rows in (read.reshape(-1, columns).double() for read in reads))
        return functools.reduce(Tensor.add_, products)[None]
    if operator_of(node) is not aten.conv2d or isinstance(argument(node, "padding"), str):
        return None
    groups = argument(node, "groups")
    how = {name: _pair(argument(node, name)) for name in ("dilation", "padding", "stride")}
    total = torch.zeros(groups, columns, columns, dtype=torch.float64)
    for sample in (read[index : index + 1] for read in reads for index in range(len(read))):
        patches = functional.unfold(sample, tuple(weight.shape[2:]), **how)
        patches = patches.view(groups, columns, -1)
        total += (patches @ patches.transpose(1, 2)).double()
    return total


def round_in_turn(weight: Tensor, scale: Tensor, moments: Tensor, top: int | Tensor = TOP) -> Tensor:
    """Values on the grid with less error of the layer's result than the nearest have; shape and type of ``weight``."""
    groups, columns = moments.shape[0], moments.shape[1]
    most = laid_out(top, weight, moments)
    steps = spread(scale, weight).double().expand_as(weight).reshape(groups, -1, columns)

    def nearest(column: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        step = steps[:, :, column]
        whole = (wanted / step).round().clamp(-most[:, :, column], most[:, :, column])
        return whole, whole * step

    return in_turn(weight, moments, nearest).to(weight.dtype) * spread(scale, weight)


def in_turn(weight: Tensor, moments: Tensor, nearest: Nearest) -> Tensor:
    """What ``nearest`` makes of each column, the error of every column passed on to those behind it; float64.

    Args:
        nearest: column, what it should be (groups, rows) → what is kept of it, and the value that stands for.
    """
    groups, columns = moments.shape[0], moments.shape[1]
    rest = weight.detach().double().reshape(groups, -1, columns).clone()
    factor = inverse_factor(moments)
    done = torch.zeros_like(rest)
    for column in range(columns):
        done[:, :, column], value = nearest(column, rest[:, :, column])
        error = (rest[:, :, column] - value) / factor[:, column, column, None]
        rest[:, :, column:] -= error[:, :, None] * factor[:, None, column, column:]
    return done.reshape(weight.shape)


def inverse_factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse, columns that are always zero set apart.

    Of 4,608 columns (a 3×3 convolution of 512 channels) a matrix takes 170 MB, so all is done in one copy.
    """
    found = moments.clone()
    diagonal = found.diagonal(dim1=1, dim2=2)
    diagonal += DAMPING * diagonal.mean(1, keepdim=True)
    diagonal[diagonal <= 0] = 1.0
    for matrix in found:
        _invert_and_factor(matrix)
    return found


def _invert_and_factor(matrix: Tensor) -> None:
    """Put the upper Cholesky factor of a symmetric matrix's inverse in its place."""
    lapack = require("scipy.linalg.lapack", "compress")
    turned = matrix.numpy().T  # columns first, as LAPACK has them: it works in place then
    for step, how in (
        (lapack.dpotrf, {"overwrite_a": 1}),
        (lapack.dpotri, {"overwrite_c": 1}),
        (lapack.dpotrf, {"overwrite_a": 1, "clean": 1}),
    ):
        found, failed = step(turned, lower=1, **how)
        if failed:
            raise np.linalg.LinAlgError(f"{step.__name__}: {failed}")
        assert found is turned or np.shares_memory(found, turned)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])
