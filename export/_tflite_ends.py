"""What stays float: convolutions at the ends, which take little time and whose errors go everywhere, and some sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepack.export._alignment import word
from edgepack.export._dialects import _groups
from edgepack.export._integer_dialect import ADDITIONS

if TYPE_CHECKING:
    from torch.fx import Node

IMAGE, FEW = 4, 16  # channels at most
NOTICED = 4 / 255  # of the range of a sum that those of its parts are long, at least; four steps


def stays_float(node: Node) -> bool:
    """Whether a weighted operator is left in float."""
    return image_convolution(node) or skip_into(node) is not None or skipping(node) is not None


def image_convolution(node: Node) -> bool:
    """Whether a convolution makes few channels of an image.

    It is the layer whose errors every other one inherits. In float it takes one to five hundredths more of the time of
    a whole small network on x86, measured with one thread; with 32 channels the price is higher.
    """
    rows, columns = _channels(node)
    return 0 < columns <= IMAGE and 0 < rows <= FEW


def skip_into(last: Node) -> Node | None:
    """The first convolution of an image, where its result is added to what this one makes an image of.

    ::

        image → first ─┬─ … ─ add ─ last → pixel shuffle → image

    Super-resolution learns small corrections; on the way past them the picture itself is in that sum, and its steps in
    8 bits are as large as the corrections. Both convolutions are a hundredth of such a network.
    """
    if not 0 < _channels(last)[0] <= FEW:
        return None
    added: Any = last.args[0]
    ways = added.all_input_nodes if word(added) in ADDITIONS else ()
    return next((way for way in ways if 0 < _channels(way)[1] <= IMAGE), None)


def skipping(first: Node) -> Node | None:
    """The sum that ``first`` skips to; see ``skip_into``."""
    sums = [user for user in first.users if word(user) in ADDITIONS]
    return next((one for one in sums if any(skip_into(user) is first for user in one.users)), None)


def drowned(part: float, whole: float) -> bool:
    """Whether a part of a sum would hardly be noticed in 8 bits, given both ranges or both steps."""
    return part < NOTICED * whole


def _channels(node: Node) -> tuple[int, int]:
    """Output and input channels of a convolution in one group; zeros for anything else."""
    if word(node) != "conv2d" or _groups(node) != 1:
        return 0, 0
    weight: Any = node.args[1]
    rows, columns = weight.meta["val"].shape[:2]
    return int(rows), int(columns)
