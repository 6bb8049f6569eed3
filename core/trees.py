"""Spanning trees over the output channels of a binary layer.

Two channels whose ±1 weights differ in few places share most of their work: a channel's sum is its parent's plus
twice the inputs at the places where they differ. The tree that is shortest in such places needs the fewest operations
("MST-compression: compressing and accelerating binary neural networks with minimum spanning tree", ICCV 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ROOT = -1
TRIED_ROOTS = 8


@dataclass(frozen=True)
class Tree:
    """A rooted tree over the channels of one layer.

    Attributes:
        parents: per channel its parent's index, −1 for the root; int64 (channels,).
        lengths: per channel the places in which it differs from its parent, 0 for the root; int64 (channels,).
    """

    parents: Ints
    lengths: Ints

    @property
    def root(self) -> int:
        return int(np.flatnonzero(self.parents == ROOT)[0])

    @property
    def length(self) -> int:
        """Of all edges together."""
        return int(self.lengths.sum())

    @property
    def depth(self) -> int:
        """Edges between the root and the channel that is furthest from it: the sums that wait for one another."""
        return int(self.levels().max())

    def levels(self) -> Ints:
        """Per channel its edges to the root; int64 (channels,)."""
        levels = np.zeros(len(self.parents), np.int64)
        at = self.parents.copy()
        while (at != ROOT).any():
            levels += at != ROOT
            at = np.where(at == ROOT, ROOT, self.parents[at])
        return levels

    def order(self) -> Ints:
        """Channels, parents before children; int64 (channels,)."""
        order: Ints = np.argsort(self.levels(), kind="stable")
        return order


def distances(signs: NDArray[np.bool_]) -> Ints:
    """In how many places each pair of rows differs; ``signs``: bool (channels, places); int64 (channels, channels)."""
    values = np.where(signs.reshape(len(signs), -1), 1.0, -1.0)
    differing: Ints = ((values.shape[1] - values @ values.T) / 2).round().astype(np.int64)
    return differing


def spanning_tree(between: Ints) -> Tree:
    """The shortest tree over all channels, and among those that were met the one of least depth.

    Which of several shortest trees is the shallowest is a hard problem; Prim's algorithm is run from a few channels,
    prefers parents near its start, and each tree is rooted again at its centre.

    Args:
        between: distances, symmetric; int64 (channels, channels). Equal channels (distance 0) are edges like others.
    """
    starts = np.unique(np.append(np.linspace(0, len(between) - 1, TRIED_ROOTS).astype(int), between.sum(0).argmin()))
    trees = [rooted_at_centre(_prim(between, int(start)), between) for start in starts]
    return min(trees, key=lambda tree: tree.depth)


def _prim(between: Ints, start: int) -> Ints:
    """Parents of the tree that grows from ``start``."""
    count = len(between)
    parents, levels = np.full(count, ROOT), np.zeros(count, np.int64)
    far = between.max(initial=0) + 1
    nearest = between[start] * count  # of two equal distances the one with the shallower parent
    outside = np.ones(count, bool)
    outside[start] = False
    parents[outside] = start
    for _ in range(count - 1):
        channel = int(np.where(outside, nearest, far * count).argmin())
        outside[channel] = False
        levels[channel] = levels[parents[channel]] + 1
        offered = between[channel] * count + levels[channel]
        closer = outside & (offered < nearest)
        nearest[closer], parents[closer] = offered[closer], channel
    return parents


def rooted_at_centre(parents: Ints, between: Ints) -> Tree:
    """The same edges, rooted at the middle of their longest path: no other root gives a smaller depth."""
    path = _longest_path(_neighbours(parents))
    root = path[len(path) // 2]
    turned = np.full(len(parents), ROOT)
    for channel, parent in _walk(_neighbours(parents), root):
        turned[channel] = parent
    inner = turned != ROOT
    lengths = np.zeros(len(parents), np.int64)
    lengths[inner] = between[np.flatnonzero(inner), turned[inner]]
    return Tree(turned, lengths)


def _neighbours(parents: Ints) -> list[list[int]]:
    near: list[list[int]] = [[] for _ in parents]
    for channel, parent in enumerate(parents.tolist()):
        if parent != ROOT:
            near[channel].append(parent)
            near[parent].append(channel)
    return near


def _walk(near: list[list[int]], root: int) -> list[tuple[int, int]]:
    """Pairs of channel and parent, level by level, without the root's."""
    pairs, met = [(root, ROOT)], {root}
    for channel, _ in pairs:
        for other in near[channel]:
            if other not in met:
                met.add(other)
                pairs.append((other, channel))
    return pairs[1:]


def _longest_path(near: list[list[int]]) -> list[int]:
    first = _last(near, 0)
    parents = dict(_walk(near, first))
    path = [_last(near, first)]
    while path[-1] != first:
        path.append(parents[path[-1]])
    return path


def _last(near: list[list[int]], root: int) -> int:
    """A channel furthest from the root."""
    pairs = _walk(near, root)
    return pairs[-1][0] if pairs else root
