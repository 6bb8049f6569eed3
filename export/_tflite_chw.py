"""Which layers of a file XNNPACK computes from their non-zero weights alone, and of each other one, why it does not.

It does so channel by channel (CHW), for operators that hang together: from a 3×3 convolution of stride 2 on three
channels, which turns pixels into channels, to the mean over height and width, which ends them. Between the two there
may only be 1×1 and depthwise convolutions, element-wise operators and resizing, and more than two thirds of the
weights must be zero. After XNNPACK's rewrite for sparse inference (src/subgraph.c) and what was seen of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from edgepack import contents
from edgepack.export._tflite_model import Model

UNARY = frozenset({
    "ABS", "CEIL", "ELU", "FLOOR", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG", "RELU", "RELU6", "RELU_N1_TO_1",
    "ROUND", "SQUARE",
})  # fmt: skip
ENDS = ("MEAN", "DEPTH_TO_SPACE")
BINARY = ("ADD", "MUL")
BEHIND = ("RESHAPE", "FULLY_CONNECTED")  # of the mean; their weights count
LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
SHARE = 2 / 3
BLOCKS = (4, 2)  # of output channels, for which XNNPACK has kernels on 64-bit ARM, where a file has such zeros
FULL = 0.9  # of the weights in blocks that are not zero
ELSEWHERE = "on x86 with AVX it computes them densely all the same, so nothing is faster there"


@dataclass(frozen=True)
class Layer:
    """What XNNPACK does with a layer.

    Attributes:
        zeros: share of its weights.
        block: output channels that its sparse kernel computes at once on 64-bit ARM; 0: it is computed densely.
        why: it is computed densely.
    """

    name: str
    zeros: float
    block: int
    why: str | None


@dataclass(eq=False)
class Chw:
    """One file, seen with XNNPACK's rules.

    Attributes:
        names: of layers, by what their weights hold (``contents.values``).
    """

    file: Model
    names: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def words(self) -> list[str]:
        return [self.file.word(operator) for operator in self.file.main.operators]

    @cached_property
    def makers(self) -> dict[int, int]:
        return {int(t): i for i, operator in enumerate(self.file.main.operators) for t in operator.outputs}

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for index, operator in enumerate(self.file.main.operators):
            for tensor in operator.inputs:
                found.setdefault(int(tensor), []).append(index)
        return found

    def verdict(self) -> str | None:
        """One sentence; None where no weight is stored sparse."""
        if "DENSIFY" not in self.words:
            return None
        layers = [index for index in range(len(self.words)) if self._pointwise(index)]
        if not layers:
            return (
                "no 1×1 convolution is there for XNNPACK's sparse kernels: weights full of zeros make the file smaller"
            )
        cluster = self._cluster()
        why = self._why(cluster)
        if why is None:
            inside = sum(index in cluster for index in layers)
            return (f"XNNPACK computes {inside} of {len(layers)} 1×1 convolutions from their non-zero weights alone on "
                    f"ARM; {ELSEWHERE}")  # fmt: skip
        return f"XNNPACK computes the 1×1 convolutions densely on every processor: {why}"

    def layers(self) -> list[Layer]:
        """Every convolution and linear layer, in the order of computation."""
        cluster = self._cluster()
        fault, found = self._why(cluster), []
        for index, word in enumerate(self.words):
            if word in LAYERS:
                why = self._dense(index, cluster, fault)
                weight = self._weight(index)
                block = block_of(weight.reshape(len(weight), -1)) if why is None else 0
                found.append(Layer(self._name(index), float((weight == 0).mean()), block, why))
        return found

    def layerwise(self) -> list[str]:
        """A sentence for each thing that XNNPACK does with some layers; none where no weight is stored sparse."""
        return list(_sentences(self.layers())) if "DENSIFY" in self.words else []

    def _dense(self, index: int, cluster: set[int], fault: str | None) -> str | None:
        """Why a layer is computed densely; None where it is not."""
        if self.words[index] == "DEPTHWISE_CONV_2D":
            return "depthwise"
        if self.words[index] == "FULLY_CONNECTED":
            return "linear layers have no sparse kernel"
        if not self._pointwise(index):
            return "only 1×1 convolutions of stride 1 have a sparse kernel"
        if fault is not None:
            return fault
        return None if index in cluster else "it lies behind what ends the operators that hang together"

    def _name(self, index: int) -> str:
        key = contents.key(self._weight(index))
        return self.names.get("" if key is None else contents.values(key), f"operator {index}")

    def _why(self, cluster: set[int]) -> str | None:
        if not cluster:
            return "no 3×3 convolution of stride 2 with padding 1 reads an input of three channels"
        if (stranger := self._stranger(cluster)) is not None:
            return stranger
        if not any(self.words[index] in ENDS for index in cluster):
            return "no mean over height and width ends them"
        zeros, weights = self._zeros(cluster)
        if zeros <= SHARE * weights:
            return (f"{zeros} of {weights} weights are zero ({zeros / weights:.0%}), and more than two thirds of those "
                    "of 1×1 convolutions and of the linear layer behind them must be")  # fmt: skip
        return None

    def _cluster(self) -> set[int]:
        """Operators that are reached from the first convolution without leaving what XNNPACK takes."""
        todo = [index for index in range(len(self.words)) if self._enters(index)]
        found: set[int] = set()
        while todo:
            index = todo.pop()
            if index in found:
                continue
            found.add(index)
            if self.words[index] not in ENDS:
                todo += [reader for reader in self._after(index) if self._fits(reader) is None]
        return found

    def _stranger(self, cluster: set[int]) -> str | None:
        """An operator that reads something of the cluster and may not."""
        for index in sorted(cluster):
            if self.words[index] in ENDS:
                continue
            for reader in self._after(index):
                if reader not in cluster:
                    return f"{self._fits(reader) or 'it also leaves them'} ({self.words[reader]}, operator {reader})"
            for tensor in self.file.main.operators[index].outputs:
                if tensor in self.file.main.outputs:
                    return "an output of the network is taken from among them"
        return None

    def _after(self, index: int) -> list[int]:
        return [r for t in self.file.main.operators[index].outputs for r in self.readers.get(int(t), [])]

    def _fits(self, index: int) -> str | None:
        """Why an operator cannot work channel by channel; None where it can."""
        word, operator = self.words[index], self.file.main.operators[index]
        if word in UNARY or word in ("RESIZE_BILINEAR", "DEPTH_TO_SPACE"):
            return None
        if word in BINARY:
            return None if all(self._rank(t) in (0, 1, 4) for t in operator.inputs) else "a factor of another shape"
        if word == "MEAN":
            axes = sorted(int(axis) % 4 for axis in np.ravel(np.asarray(self.file.values(operator.inputs[1]))))
            return None if axes == [1, 2] and operator.builtinOptions.keepDims else "a mean that drops its axes"
        if word == "PAD":
            return self._pads(index)
        if word == "CONV_2D":
            return None if self._pointwise(index) else "a convolution that is neither 1×1 nor the first"
        if word == "DEPTHWISE_CONV_2D":
            return self._depthwise(index)
        return "an operator that XNNPACK does not compute channel by channel"

    def _pads(self, index: int) -> str | None:
        readers = [self.words[reader] for reader in self._after(index)]
        fits = readers and all(word in ("CONV_2D", "DEPTHWISE_CONV_2D") for word in readers)
        return None if fits and self._padding(index) is not None else "padding that differs between sides"

    def _padding(self, index: int) -> int | None:
        """Of height and width, where it is the same everywhere."""
        pads = np.asarray(self.file.values(self.file.main.operators[index].inputs[1]))
        same = len(pads) == 4 and not pads[[0, 3]].any() and len(set(pads[1:3].flatten().tolist())) == 1
        return int(pads[1, 0]) if same else None

    def _depthwise(self, index: int) -> str | None:
        operator = self.file.main.operators[index]
        options, shape = operator.builtinOptions, self._shape(operator.inputs[1])
        kernel, strides = shape[1], {options.strideH, options.strideW}
        if shape[1] != shape[2] or kernel not in (3, 5) or strides not in ({1}, {2}) or options.depthMultiplier > 1:
            return "a depthwise convolution that is not 3×3 or 5×5 of stride 1 or 2"
        if {options.dilationHFactor, options.dilationWFactor} != {1}:
            return "a dilated depthwise convolution"
        return None if self._padded(index, kernel // 2) else "a depthwise convolution that does not pad all sides alike"

    def _padded(self, index: int, wanted: int) -> bool:
        """Whether a convolution pads so much on every side, itself or with the operator before it."""
        operator = self.file.main.operators[index]
        options = operator.builtinOptions
        if options.padding == self.file.schema.Padding.SAME:
            sizes = self._shape(operator.inputs[0])[1:3]
            return options.strideH == 1 or all(size % 2 for size in sizes)
        maker = self.makers.get(int(operator.inputs[0]))
        return maker is not None and self.words[maker] == "PAD" and self._padding(maker) == wanted

    def _enters(self, index: int) -> bool:
        if self.words[index] != "CONV_2D":
            return False
        operator = self.file.main.operators[index]
        options = operator.builtinOptions
        small = self._shape(operator.inputs[1])[1:] == (3, 3, 3) and options.strideH == options.strideW == 2
        return small and self._padded(index, 1)

    def _pointwise(self, index: int) -> bool:
        operator = self.file.main.operators[index]
        if self.words[index] != "CONV_2D" or self._shape(operator.inputs[1])[1:3] != (1, 1):
            return False
        same = self._shape(operator.inputs[0])[3] == self._shape(operator.inputs[1])[3]  # no groups
        return same and operator.builtinOptions.strideH == operator.builtinOptions.strideW == 1

    def _zeros(self, cluster: set[int]) -> tuple[int, int]:
        """Zeros and weights that XNNPACK counts."""
        counted = {index for index in cluster if self._pointwise(index)}
        behind = [reader for index in cluster if self.words[index] in ENDS for reader in self._after(index)]
        while behind:
            index = behind.pop()
            if self.words[index] in BEHIND and index not in counted:
                counted.add(index)
                behind += self._after(index)
        weights = [self._weight(index) for index in counted if self.words[index] != "RESHAPE"]
        return sum(int((one == 0).sum()) for one in weights), sum(one.size for one in weights)

    def _weight(self, index: int) -> Any:
        """Also behind DENSIFY and DEQUANTIZE."""
        tensor = int(self.file.main.operators[index].inputs[1])
        while (values := self.file.values(tensor)) is None:
            tensor = int(self.file.main.operators[self.makers[tensor]].inputs[0])
        return values

    def _shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(int(size) for size in self.file.main.tensors[int(tensor)].shape)

    def _rank(self, tensor: int) -> int:
        shape = self.file.main.tensors[int(tensor)].shape
        return 0 if shape is None else len(shape)


def block_of(weight: np.ndarray[Any, Any]) -> int:
    """Output channels that XNNPACK's kernel takes at once: 4 or 2 where those of a block are nearly all zero together.

    After its src/operators/convolution-nchw.c.
    """
    for size in BLOCKS:
        rows = len(weight) // size * size
        blocks = (weight[:rows].reshape(-1, size, weight.shape[1]) != 0).any(1).sum() * size
        if rows and np.count_nonzero(weight[:rows]) >= FULL * blocks:
            return size
    return 1


def _sentences(layers: list[Layer]) -> Iterator[str]:
    """Layers with one fate together."""
    fates: dict[str, list[str]] = {}
    for one in layers:
        kernel = "" if one.block == 1 else f", {one.block} output channels at once on 64-bit ARM"
        fate = f"from non-zero weights{kernel}" if one.why is None else f"densely: {one.why}"
        fates.setdefault(fate, []).append(f"{one.name} ({one.zeros:.0%})")
    for fate, names in fates.items():
        yield f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} computed {fate} (zeros in brackets)"
