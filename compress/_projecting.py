"""Shorter trees without training: the smallest latent weights that differ from a channel's parent change sign."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from edgepack.trees import ROOT, distances, spanning_tree

if TYPE_CHECKING:
    from edgepack.task import Task

BATCHES, BATCH = 16, 64  # from which batch norms take their statistics anew


def shortened(signs: NDArray[np.bool_], latent: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """The signs, ``share`` of those in which a channel differs from its parent flipped: where ``latent`` is smallest.

    Parents come first, so that a channel nears what its parent has become. All arrays: (channels, places).
    """
    found, tree = signs.copy(), spanning_tree(distances(signs))
    for channel in tree.order().tolist():
        parent = int(tree.parents[channel])
        if parent == ROOT:
            continue
        differing = np.flatnonzero(found[channel] != found[parent])
        order = np.argsort(np.abs(latent[channel, differing]), kind="stable")
        chosen = differing[order[: int(share * len(differing))]]
        found[channel, chosen] = found[parent, chosen]
    return found


def shorten(weight: Tensor, latent: Tensor, share: float) -> None:
    """The same for the ±1 weights of a layer, in place."""
    signs = (weight > 0).flatten(1).numpy()
    moved = shortened(signs, latent.detach().flatten(1).numpy(), share)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.where(moved, 1.0, -1.0)).view_as(weight))


def take_statistics(module: nn.Module, task: Task) -> bool:
    """Let batch norms take the statistics of some samples, in order; false where there are none to take."""
    data = task.training or task.calibration
    norms = [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    if data is None or not norms:
        return False
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in islice(data.batches(BATCH), BATCHES):
            module(*(torch.from_numpy(np.ascontiguousarray(batch.inputs[item.name])) for item in task.inputs))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
    return True
