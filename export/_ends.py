"""The ends of a picture's own way past a network, which 8 bits are too coarse for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepack.export._alignment import word
from edgepack.export._dialects import _groups
from edgepack.export._integer_dialect import ADDITIONS

if TYPE_CHECKING:
    from torch.fx import Node

IMAGE, FEW = 4, 16  # channels at most


def skip_sum(end: Node) -> Node | None:
    """The sum between the two ends of a skip, for either of them; see ``skip_into``."""
    return skipping(end) if skip_into(end) is None else end.all_input_nodes[0]


def skip_into(last: Node) -> Node | None:
    """The first convolution of an image, where its result is added to what this one makes an image of.

    ::

        image → first ─┬─ … ─ add ─ last → pixel shuffle → image

    Super-resolution learns small corrections; on the way past them the picture itself is in that sum, and its steps in
    8 bits are as large as the corrections. Both convolutions are a hundredth of such a network.
    """
    if not 0 < channels(last)[0] <= FEW:
        return None
    added: Any = last.args[0]
    ways = added.all_input_nodes if word(added) in ADDITIONS else ()
    return next((way for way in ways if 0 < channels(way)[1] <= IMAGE), None)


def skipping(first: Node) -> Node | None:
    """The sum that ``first`` skips to; see ``skip_into``."""
    sums = [user for user in first.users if word(user) in ADDITIONS]
    return next((one for one in sums if any(skip_into(user) is first for user in one.users)), None)


def channels(node: Node) -> tuple[int, int]:
    """Output and input channels of a convolution in one group; zeros for anything else."""
    if word(node) != "conv2d" or _groups(node) != 1:
        return 0, 0
    weight: Any = node.args[1]
    rows, columns = weight.meta["val"].shape[:2]
    return int(rows), int(columns)
