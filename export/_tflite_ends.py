"""What stays float: early and last convolutions that take little time and whose errors go everywhere, some sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepack.export._ends import FEW, IMAGE, channels, skip_sum
from edgepack.export._integer_dialect import narrow_depthwise

if TYPE_CHECKING:
    from torch.fx import Node

NOTICED = 4 / 255  # of the range of a sum that those of its parts are long, at least; four steps


def stays_float(node: Node) -> bool:
    """Whether a weighted operator is left in float."""
    return image_convolution(node) or narrow_depthwise(node) or skip_sum(node) is not None


def image_convolution(node: Node) -> bool:
    """Whether a convolution makes few channels of an image.

    It is the layer whose errors every other one inherits. In float it takes one to five hundredths more of the time of
    a whole small network on x86, measured with one thread; with 32 channels the price is higher.
    """
    rows, columns = channels(node)
    return 0 < columns <= IMAGE and 0 < rows <= FEW


def drowned(part: float, whole: float) -> bool:
    """Whether a part of a sum would hardly be noticed in 8 bits, given both ranges or both steps."""
    return part < NOTICED * whole
