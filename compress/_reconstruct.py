"""Weights that read fewer channels than before, solved anew so that their layers give what they gave.

For a layer that read all of x and now reads x' (narrower, and changed by what was removed before it):

    minimise  Σ ‖W'·x' + b' − (W·x + b)‖²  over samples and positions

Layer by layer in the order of computation, after Y. He et al., "Channel Pruning for Accelerating Very Deep Neural
Networks" (arXiv:1707.06168), section 3; here the units are chosen before. Where samples say nothing, weights stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepack.compress._cutting import IN, OUT, Cut
from edgepack.compress._hooks import hooked
from edgepack.compress._tune_feed import drawn, looked_at

if TYPE_CHECKING:
    from edgepack.contracts import Run
    from edgepack.task import Task

Layer = nn.Conv2d | nn.Linear

BATCH = 32
PLACES = 64  # positions that are looked at in a sample
ROWS = 2  # for each column of a weight, else its layer stays as it is
COLUMNS = 8192  # beyond this a matrix takes half a gigabyte
DAMPING = 1e-3  # of the mean diagonal


class _Reached(Exception):
    """A layer has computed; what follows it is not needed."""


@dataclass
class _Sums:
    """Products of what a layer reads, with a column of ones, and of what its results lack."""

    squares: Tensor
    products: Tensor
    wanted: float = 0.0
    missing: float = 0.0
    rows: int = 0


def reconstruct(
    before: nn.Module, module: nn.Module, cut: Cut, task: Task, run: Run, samples: int
) -> dict[str, tuple[float, float]]:
    """Solve the layers of ``module`` that read fewer channels than in ``before``; changes it in place.

    Returns:
        Path of each layer that was solved → error of its results, squared, over the square of those wanted, on the
        samples, before and after.
    """
    data = looked_at(task)
    assert data is not None
    batches = [part.inputs for part in drawn(task, data, samples, run.seed, BATCH)]
    readers = [path for path, what in cut if what == IN and _solvable(module, path) and _solvable(before, path)]
    order = _called_once(module, readers, batches[0])
    found, step = {}, run.progress("reconstructing layers", len(order))
    for path in order:
        gone = cut.get((path, OUT), set())
        sums = _accumulate(before, module, path, gone, batches, run.seed)
        if sums is not None:
            found[path] = _solve(_layer(module, path), sums)
        step(1)
    return found


def _layer(module: nn.Module, path: str) -> Layer:
    layer = module.get_submodule(path)
    assert isinstance(layer, Layer)
    return layer


def _solvable(module: nn.Module, path: str) -> bool:
    try:
        layer = module.get_submodule(path)
    except AttributeError:  # a bare parameter
        return False
    if isinstance(layer, nn.Conv2d):
        known = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return known and layer.weight[0].numel() < COLUMNS
    return isinstance(layer, nn.Linear) and layer.in_features < COLUMNS


def _called_once(module: nn.Module, paths: Sequence[str], inputs: Sequence[Tensor]) -> list[str]:
    """Those of the layers that compute exactly once, in that order."""
    calls: list[str] = []

    def called(path: str, read: tuple[object, ...]) -> None:
        calls.append(path if read else "")  # what comes by keyword is not looked at

    hooks = ((module.get_submodule(path), lambda _, read, __, path=path: called(path, read)) for path in paths)
    with hooked(hooks), torch.no_grad():
        module(*inputs)
    return [path for path in calls if path and calls.count(path) == 1]


def _accumulate(
    before: nn.Module, module: nn.Module, path: str, gone: set[int], batches: Sequence[Sequence[Tensor]], seed: int
) -> _Sums | None:
    """The sums over all samples; None where there are too few."""
    layer, random = _layer(module, path), torch.Generator().manual_seed(seed)
    weight = layer.weight.detach().double().flatten(1)
    columns, rows = weight.shape[1] + 1, weight.shape[0]
    bias = torch.zeros(rows) if layer.bias is None else layer.bias.detach()
    kept = [index for index in range(rows + len(gone)) if index not in gone]
    now = torch.cat([weight, bias.double()[:, None]], 1)
    sums = _Sums(torch.zeros(columns, columns, dtype=torch.float64), torch.zeros(columns, rows, dtype=torch.float64))
    for inputs in batches:
        read, wanted = _seen(module, path, inputs)[0], _rows(layer, _seen(before, path, inputs)[1])
        places = torch.randperm(wanted.shape[1], generator=random)[:PLACES]
        other = wanted[:, places][..., kept].flatten(0, 1).double()
        one = torch.cat([_patches(layer, sample, places) for sample in torch.split(read, 1)]).double()
        one = torch.cat([one, torch.ones(len(one), 1, dtype=torch.float64)], 1)
        lacks = other - one @ now.T
        sums.squares += one.T @ one
        sums.products += one.T @ lacks
        sums.wanted += float(other.square().sum())
        sums.missing += float(lacks.square().sum())
        sums.rows += len(one)
    return sums if sums.rows >= ROWS * columns else None


def _seen(module: nn.Module, path: str, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What a layer reads and what it gives."""
    kept: list[tuple[Tensor, Tensor]] = []

    def stop(_: nn.Module, read: tuple[Tensor, ...], result: Tensor) -> None:
        kept.append((read[0], result))
        raise _Reached

    with hooked([(module.get_submodule(path), stop)]), suppress(_Reached), torch.no_grad():
        module(*inputs)
    return kept[0]


def _patches(layer: Layer, sample: Tensor, places: Tensor) -> Tensor:
    """What some positions of the result are computed from, (positions, columns)."""
    if isinstance(layer, nn.Conv2d):
        how: Mapping[str, tuple[int, ...]] = {name: getattr(layer, name) for name in ("dilation", "padding", "stride")}
        return F.unfold(sample, layer.kernel_size, **how)[0].T[places]
    return _rows(layer, sample)[0, places]


def _rows(layer: Layer, values: Tensor) -> Tensor:
    """(N, C, H, W) of a convolution, (N, …, C) of a linear layer → (N, positions, C)."""
    if isinstance(layer, nn.Conv2d):
        return values.flatten(2).transpose(1, 2)
    return values.reshape(len(values), -1, values.shape[-1])


def _solve(layer: Layer, sums: _Sums) -> tuple[float, float]:
    """Put the least-squares weights in; the error before and after."""
    weight = layer.weight
    damped = sums.squares.clone()
    damped.diagonal().add_(DAMPING * sums.squares.diagonal().mean())
    change = torch.cholesky_solve(sums.products, torch.linalg.cholesky(damped))
    after = sums.missing - float((change * (2 * sums.products - sums.squares @ change)).sum())
    with torch.no_grad():
        weight.add_(change[:-1].T.reshape(weight.shape).to(weight.dtype))
        if layer.bias is None:
            layer.bias = nn.Parameter(change[-1].to(weight.dtype), weight.requires_grad)
        else:
            layer.bias.add_(change[-1].to(weight.dtype))
    scale = max(sums.wanted, 1e-30)
    return sums.missing / scale, max(after, 0.0) / scale
