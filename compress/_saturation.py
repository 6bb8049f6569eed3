"""Which layers an x86 processor without VNNI computes wrongly, and where: 8-bit products that leave 16 bits.

Without VNNI, engines multiply unsigned activations with signed weights by ``vpmaddubsw``: two neighbouring products
are added in 16 bits, with saturation. 255 · 127 + 255 · 127 is then 32767. Neighbours, as ONNX Runtime packs them
(found by running it on an emulated Haswell): columns 2i and 2i + 1 of a linear layer; of a convolution the same where
its patches are unfolded with channels last, kernel position by kernel position, each group for itself. Its depthwise
kernel adds in 32 bits. OpenVINO pairs alike where channels are even in number. Weights of 7 bits cannot saturate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.nn import functional

from edgepack.compress._graph import argument, operator_of
from edgepack.compress._operators import aten

if TYPE_CHECKING:
    from collections.abc import Callable

LOWEST, HIGHEST = -(2**15), 2**15 - 1
LARGEST = 255  # of an activation
NAMED = 8  # layers that a note lists
CHUNK = 1 << 24  # products at once


class Saturation:
    """Collects, over batches, the layers whose pairs saturate.

    Args:
        scales: rounded layer → scale of each row of its weight.
        grid: node → step and zero-point of its values, None where they are not rounded.
    """

    def __init__(self, scales: Mapping[str, Tensor], grid: Callable[[fx.Node], tuple[float, int] | None]) -> None:
        self._scales, self._grid = scales, grid
        self.found: set[str] = set()

    def show(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        """Look at what a layer is about to read."""
        source, scale = node.args[0] if node.args else None, self._scales.get(node.name)
        if scale is None or node.name in self.found or not isinstance(source, fx.Node):
            return
        grid = self._grid(source)
        if grid is None:
            return
        step, zero = grid
        weight = env[argument(node, "weight")]
        whole = (weight / scale.view(-1, *[1] * (weight.dim() - 1))).round()
        read = ((env[source] / step).round() + zero).clamp(0, LARGEST)
        if saturates(node, read, whole, zero):
            self.found.add(node.name)


def saturates(node: fx.Node, read: Tensor, weight: Tensor, zero: int) -> bool:
    """Whether any pair of a layer saturates on these integers; for layouts this does not know, whether one could."""
    if operator_of(node) is aten.linear:
        return _any(read.reshape(1, -1, read.shape[-1]), weight[None])
    groups = argument(node, "groups")
    if weight.shape[1] == 1 and weight.shape[0] == groups:
        return False
    if operator_of(node) is aten.conv3d or isinstance(argument(node, "padding"), str):
        return _could(weight.flatten(1))
    how = {name: argument(node, name) for name in ("dilation", "padding", "stride")}
    if operator_of(node) is aten.conv1d:
        read, weight = read.unsqueeze(2), weight.unsqueeze(2)
        how = {name: [least, *_numbers(value)] for (name, value), least in zip(how.items(), (1, 0, 1), strict=True)}
    rows = channels_last(weight).view(groups, -1, weight[0].numel())
    images = (read[index : index + 1] for index in range(len(read)))
    return any(_any(patches(image, weight, groups, zero, **how), rows) for image in images)


def patches(image: Tensor, weight: Tensor, groups: int, zero: int, dilation: Any, padding: Any, stride: Any) -> Tensor:
    """What a convolution reads, (groups, positions, columns), channels last in each kernel position."""
    rows, columns = _pair(padding)
    padded = functional.pad(image, (columns, columns, rows, rows), value=float(zero))
    taps = weight[0, 0].numel()
    found = functional.unfold(padded, tuple(weight.shape[2:]), dilation=_pair(dilation), stride=_pair(stride))
    return found.view(groups, -1, taps, found.shape[-1]).permute(0, 3, 2, 1).reshape(groups, found.shape[-1], -1)


def channels_last(weight: Tensor) -> Tensor:
    """Rows of a convolution's weight in the order of ``patches``."""
    return weight.flatten(2).transpose(1, 2).flatten(1)


def _any(read: Tensor, weight: Tensor) -> bool:
    """``read`` (groups, positions, columns), ``weight`` (groups, rows, columns): does any pair leave 16 bits?"""
    return any(_one(x, w) for x, w in zip(read, weight, strict=True))


def _one(read: Tensor, weight: Tensor) -> bool:
    even = read.shape[1] - read.shape[1] % 2  # a last column without neighbour cannot saturate alone
    a, b, first, second = read[:, :even:2], read[:, 1:even:2], weight[:, :even:2], weight[:, 1:even:2]
    top_a, top_b = a.amax(0), b.amax(0)
    highest = first.clamp_min(0) * top_a + second.clamp_min(0) * top_b
    lowest = first.clamp_max(0) * top_a + second.clamp_max(0) * top_b
    rows, pairs = ((highest > HIGHEST) | (lowest < LOWEST)).nonzero(as_tuple=True)
    size = max(1, CHUNK // max(len(read), 1))
    for start in range(0, len(rows), size):
        row, pair = rows[start : start + size], pairs[start : start + size]
        sums = a[:, pair] * first[row, pair] + b[:, pair] * second[row, pair]
        if bool(((sums > HIGHEST) | (sums < LOWEST)).any()):
            return True
    return False


def _could(rows: Tensor) -> bool:
    """Whether any two weights of a row, wherever they stand, could saturate."""
    highest = rows.topk(min(2, rows.shape[1]), 1).values.clamp_min(0).sum(1) * LARGEST
    lowest = (-rows).topk(min(2, rows.shape[1]), 1).values.clamp_min(0).sum(1) * LARGEST
    return bool((highest > HIGHEST).any() or (-lowest < LOWEST).any())


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _pair(value: Any) -> tuple[int, int]:
    numbers = _numbers(value)
    return numbers[0], numbers[-1]


def narrow_words(paths: Sequence[str], rounded: int) -> str:
    """Which layers have fewer bits, in a note.

    Args:
        rounded: how many layers have integer weights.
    """
    names = f": {', '.join(paths[:NAMED])}" if paths else ""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"7-bit weights where products saturate without VNNI: {len(paths)} of {rounded} layers{names}{more}"
