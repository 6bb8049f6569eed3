"""A term of the loss that shortens the trees of binary layers while they are trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgepack.compress._binary import Binary, Signs
from edgepack.trees import ROOT, Tree, distances, spanning_tree

RAMP = (0.2, 0.6)  # the term grows from nothing to its weight between these parts of the training


def signs_of(layer: Binary) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Per output channel its weights, true for +1; bool (channels, places)."""
    return (layer.layer.weight.detach() > 0).flatten(1).numpy()


def tree_of(layer: Binary) -> Tree:
    return spanning_tree(distances(signs_of(layer)))


class TreePull:
    """Pulls each channel towards its parent in the layer's tree, or all of them towards their majority.

    The term is the mean over layers of (places in which channels differ) / (channels × places); its gradient reaches
    only latent weights that differ, and small ones change sign first. Trees are grown again with each epoch: where a
    killed training goes on, so that it goes on with the same ones.

    Args:
        to: ``tree``, or ``centre`` for the majority of all channels: cheaper, a bound of the tree's length.
        weight: of the term, once it is fully grown.
        epochs: of the training.
        enough: share of differing places from which on a layer is left alone.
    """

    def __init__(self, layers: Sequence[Binary], to: str, weight: float, epochs: int, enough: float = 0.0) -> None:
        self.layers, self.to, self.weight, self.epochs, self.enough = layers, to, weight, epochs, enough
        self.share, self.grown = 0.0, -1
        self.wanted: list[tuple[Tensor, Tensor]] = []

    def advance(self, progress: float) -> None:
        """To be called before each step."""
        low, high = RAMP
        self.share = min(max((progress - low) / (high - low), 0.0), 1.0)
        epoch = int(progress * self.epochs + 1e-6)
        if self.share > 0 and epoch != self.grown:
            self.grown = epoch
            self.wanted = [self._pairs(layer) for layer in self.layers]

    def loss(self) -> Tensor:
        """The term now."""
        if self.share == 0 or self.weight == 0:
            return torch.zeros(())
        parts = [self._differing(layer, *pairs) for layer, pairs in zip(self.layers, self.wanted, strict=True)]
        return self.weight * self.share * (torch.stack(parts) - self.enough).clamp_min(0).mean()

    def _pairs(self, layer: Binary) -> tuple[Tensor, Tensor]:
        """Channels, and per channel the one it is pulled to."""
        tree = tree_of(layer)
        children = np.flatnonzero(tree.parents != ROOT)
        return torch.from_numpy(children), torch.from_numpy(tree.parents[children])

    def _differing(self, layer: Binary, children: Tensor, parents: Tensor) -> Tensor:
        signs: Tensor = Signs()(layer.latent.flatten(1))
        if self.to == "centre":
            centre = torch.where(signs.detach().sum(0) >= 0, 1.0, -1.0)
            return (1 - signs * centre).sum() / 2 / signs.numel()
        return (1 - signs[children] * signs[parents]).sum() / 2 / signs.numel()
