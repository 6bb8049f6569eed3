"""How an engine wants a quantization plan written: the words exporters say it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.export._alignment import word
from edgepack.export._dialects import _groups

if TYPE_CHECKING:
    from torch.fx import Node

RELUS = frozenset({"relu", "relu_", "hardtanh", "hardtanh_", "relu6", "relu6_"})
LEAKY = frozenset({"leaky_relu", "leaky_relu_"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
ADDITIONS = frozenset({"add", "add_"})
NORMS = frozenset({"layer_norm"})
PRODUCTS = frozenset({"linear", "matmul"})
MULTIPLICATIONS = frozenset({"mul", "mul_"})
SILU = frozenset({"silu", "silu_"})
NARROW = 16  # channels, of a depthwise convolution that is not worth integers
WEIGHTS_ONLY = "w8"  # the dialect of files whose activations are float
SIGMOID = {"operator": "sigmoid", "range": {"low": 0.0, "high": 1.0, "bits": 8}}


@dataclass(frozen=True)
class Dialect:
    """How an engine wants a plan written.

    Attributes:
        name: as in the manifest; the formats' own modules hold one per engine.
        fused: operators an engine computes in one with the integer operator before them; a result is quantized
            behind them, not between.
        integer: operators without weights that are integer as soon as all they read is quantized.
        same_step: of ``fused`` or ``integer``, those whose result is quantized in the step of what they read, so
            that values they pass unchanged are not rounded twice.
        every_output: weighted operators whose result must be quantized for the engine to compute in integers.
        both: float operators whose result is quantized for integer readers alone; the others read it as it is.
        float_bias: weighted operators whose bias the engine adds in float; ``matmul`` is a linear layer on three or
            more axes.
        dynamic: weighted operators the engine computes with activations rounded in ranges found at run time.
        signed: activations are integers from −128 to 127, not from 0 to 255.
        symmetric: 0 is the integer 0, and −128 is not used; signed only.
        split: operators written as several, because the engine has integer forms of those only.
        slow: whether a weighted operator stays float: the engine computes it faster so, by measurement, or its rounding
            costs the network more than so small an operator can bring.
        detour: sums an engine computes in one with the weighted operator before them, whose result stays float; only
            what comes another way is quantized.
        first: of two convolutions before such a sum, the engine takes the one the sum names first, not the one computed
            last; and the result of the other is quantized around 0, which the engine adds without a shift.
        early: operators that only pick among values, before which these are quantized, not behind.
        narrow: activations of fewer than 8 bits are computed: integers saturate where their few bits end.
        twins: the first convolution of a skip is computed twice where other sums read it as well: in float for the one
            that stays float, in integers for the rest.
        spans: operator → range of the only grid in which the engine has its result.
        grouped: weights beside float activations may have a scale per group of columns.
        tables: weights beside float activations may be looked up in tables of values.
        bits: of activations, the most.
    """

    name: str
    fused: frozenset[str]
    integer: frozenset[str]
    same_step: frozenset[str] = frozenset()
    every_output: frozenset[str] = frozenset()
    both: frozenset[str] = frozenset()
    float_bias: frozenset[str] = frozenset()
    dynamic: frozenset[str] = frozenset()
    signed: bool = False
    symmetric: bool = False
    split: frozenset[str] = frozenset()
    slow: Callable[[Node], bool] = lambda node: False
    detour: frozenset[str] = frozenset()
    first: bool = False
    early: frozenset[str] = frozenset()
    twins: bool = False
    grouped: bool = False
    narrow: bool = False
    tables: bool = False
    bits: int = 8
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def forms(self) -> dict[str, str]:
        """Name of the dialect by what the plan says of activations."""
        return {"static": self.name, "dynamic": f"d8{self.name[2:]}", "float": WEIGHTS_ONLY}

    @property
    def lowest(self) -> int:
        """The smallest integer of an activation."""
        return (-127 if self.symmetric else -128) if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest integer of an activation."""
        return 127 if self.signed else 255

    def grid(self, low: float, high: float, step: float | None = None, bits: int = 8) -> Grid:
        """The integers for a range with 0 in it; ``step`` where another grid gives it.

        Those of fewer bits are the lowest there are, so that what saturates at the bottom, as a ReLU does, needs
        nothing for it.
        """
        if self.symmetric:
            top = (1 << (bits - 1)) - 1
            return Grid(step or _scale(max(-low, high) / top), 0, -top, top)
        lowest, highest = self.lowest, self.lowest + (1 << bits) - 1
        step = step or _scale((high - low) / (highest - lowest))
        return Grid(step, int(np.clip(round(lowest - low / step), lowest, highest)), lowest, highest)

    def around_zero(self, low: float, high: float) -> Grid:
        """The integers for a range, with 0 in their middle."""
        middle = (self.lowest + self.highest + 1) // 2
        step = max(-low / (middle - self.lowest), high / (self.highest - middle))
        return Grid(_scale(step), middle, self.lowest, self.highest)


def _scale(step: float) -> float:
    """A step as engines hold it; 1 for a range of nothing, or of less than float32's normal numbers tell apart."""
    found = float(np.float32(step))
    return found if found >= np.finfo(np.float32).tiny else 1.0


@dataclass(frozen=True)
class Grid:
    """Of an activation: value = step · (integer − zero), integers from ``lowest`` to ``highest``."""

    step: float
    zero: int
    lowest: int
    highest: int


def narrow_depthwise(node: Node) -> bool:
    """Whether a convolution is a depthwise one of few channels.

    Its results are sums of few products, so errors in what it reads do not average out, and it stands early, where all
    others inherit them. The first one of MobileNetV1-0.25 (8 channels, 72 weights) alone costs the network 4.3 dB in
    TensorRT's grid, 3.6 dB in TFLite's and 2.6 dB in Core ML's. Its channels do not fill the vectors of integer
    kernels either.
    """
    if word(node) != "conv2d" or _groups(node) == 1:
        return False
    weight: Any = node.args[1]
    rows, columns = weight.meta["val"].shape[:2]
    return bool(columns == 1 and rows < NARROW)
