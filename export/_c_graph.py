"""A network as steps on flat memory: what the C files are written from.

Every value is a *view* of a buffer: sizes and strides in the order of memory, so that slices, transpositions and
broadcasts cost nothing, and what must lie in another order is copied by a step of its own. Images keep their channels
last in memory whatever the network calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SIZES = {"float32": 4, "int8": 1, "uint8": 1, "int32": 4, "uint32": 4}


@dataclass(eq=False)
class Buffer:
    """Memory of one value.

    Attributes:
        dtype: NumPy name.
        size: elements.
        place: ``arena``, or the name of an input or output of the network, which the caller holds.
        offset: byte in the arena, once it is planned.
        constant: values known when the network is written.
    """

    dtype: str
    size: int
    place: str = "arena"
    offset: int = 0
    constant: Array | None = None

    @property
    def bytes(self) -> int:
        return self.size * SIZES[self.dtype]


@dataclass(frozen=True)
class View:
    """A value in memory.

    Attributes:
        sizes, strides: in the order of memory, strides in elements.
        order: which axis of the network's value each of them is.
        offset: elements from the buffer's begin.
    """

    buffer: Buffer
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    order: tuple[int, ...]
    offset: int = 0

    @classmethod
    def new(cls, dtype: str, shape: Sequence[int], order: Sequence[int] | None = None) -> View:
        """Fresh memory for a value of this shape, its axes in this order."""
        order = tuple(range(len(shape))) if order is None else tuple(order)
        sizes = tuple(shape[axis] for axis in order)
        return cls(Buffer(dtype, int(np.prod(sizes, dtype=np.int64))), sizes, contiguous(sizes), order)

    @property
    def dtype(self) -> str:
        return self.buffer.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the network's order."""
        return tuple(self.sizes[self.order.index(axis)] for axis in range(len(self.sizes)))

    @property
    def count(self) -> int:
        return int(np.prod(self.sizes, dtype=np.int64))

    def axis(self, axis: int) -> int:
        """Where an axis of the network lies in memory."""
        return self.order.index(axis)

    def stride(self, axis: int) -> int:
        """Elements between neighbours along an axis of the network."""
        return self.strides[self.order.index(axis)]

    def permuted(self, axes: Sequence[int]) -> View:
        """The value with its axes in another order; nothing moves."""
        inverse = {old: new for new, old in enumerate(axes)}
        return replace(self, order=tuple(inverse[axis] for axis in self.order))

    def sliced(self, axis: int, start: int, stop: int, step: int = 1) -> View:
        place = self.axis(axis)
        sizes, strides = list(self.sizes), list(self.strides)
        offset = self.offset + start * strides[place]
        sizes[place], strides[place] = max(0, -(-(stop - start) // step)), strides[place] * step
        return replace(self, sizes=tuple(sizes), strides=tuple(strides), offset=offset)

    def without(self, axis: int) -> View:
        """The value without an axis of size one."""
        place = self.axis(axis)
        kept = [index for index in range(len(self.sizes)) if index != place]
        return replace(
            self,
            sizes=tuple(self.sizes[index] for index in kept),
            strides=tuple(self.strides[index] for index in kept),
            order=tuple(self.order[index] - (self.order[index] > axis) for index in kept),
        )

    def with_axis(self, axis: int) -> View:
        """The value with one more axis of size one."""
        order = (*(old + (old >= axis) for old in self.order), axis)
        return replace(self, sizes=(*self.sizes, 1), strides=(*self.strides, 1), order=order)

    def expanded(self, shape: Sequence[int]) -> View:
        """The value repeated along axes of size one, and along new ones in front."""
        view = self
        for _ in range(len(shape) - len(self.sizes)):
            view = view.with_axis(0)
        sizes = tuple(shape[axis] for axis in view.order)
        repeated = zip(sizes, view.sizes, view.strides, strict=True)
        strides = tuple(0 if new != old else stride for new, old, stride in repeated)
        return replace(view, sizes=sizes, strides=strides)

    def in_order(self, order: Sequence[int]) -> View:
        """Sizes and strides listed in another order of axes; nothing moves."""
        places = [self.axis(axis) for axis in order]
        return replace(
            self,
            sizes=tuple(self.sizes[place] for place in places),
            strides=tuple(self.strides[place] for place in places),
            order=tuple(order),
        )

    def dense(self) -> bool:
        """Whether the listed order is that of memory, without gaps; axes of size one do not matter."""
        wanted = contiguous(self.sizes)
        pairs = zip(self.sizes, self.strides, wanted, strict=True)
        return all(size == 1 or stride == right for size, stride, right in pairs)

    def reshaped(self, shape: Sequence[int]) -> View:
        """The same memory of a dense value in the network's order, under other sizes."""
        return View(self.buffer, tuple(shape), contiguous(shape), tuple(range(len(shape))), self.offset)

    def array(self, memory: Array) -> Array:
        """The value out of its buffer's content, in the network's order."""
        size = memory.itemsize
        places = [self.axis(axis) for axis in range(len(self.sizes))]
        return np.lib.stride_tricks.as_strided(
            memory[self.offset :],
            [self.sizes[place] for place in places],
            [self.strides[place] * size for place in places],
            writeable=False,
        )


@dataclass(eq=False)
class Step:
    """One call of a kernel.

    Attributes:
        kernel: which one; ``_c_calls`` knows its arguments.
        name: the operator of the simulation.
        options: whatever the kernel needs besides values.
        scratch: memory it needs meanwhile.
    """

    kernel: str
    name: str
    inputs: list[View]
    output: View
    options: dict[str, Any] = field(default_factory=dict)
    scratch: Buffer | None = None

    def buffers(self) -> Iterator[Buffer]:
        for view in (*self.inputs, self.output):
            yield view.buffer
        if self.scratch is not None:
            yield self.scratch


@dataclass
class Network:
    """Steps in the order of computation.

    Attributes:
        inputs, outputs: memory of the caller, by name.
    """

    steps: list[Step] = field(default_factory=list)
    inputs: Mapping[str, View] = field(default_factory=dict)
    outputs: Mapping[str, View] = field(default_factory=dict)

    def readers(self, buffer: Buffer) -> list[Step]:
        return [step for step in self.steps if any(view.buffer is buffer for view in step.inputs)]

    def writers(self, buffer: Buffer) -> list[Step]:
        return [step for step in self.steps if step.output.buffer is buffer]


def contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of dense memory."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def channels_last(rank: int) -> tuple[int, ...]:
    """Order of axes in memory for images (N, C, …)."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


def merged(views: Sequence[View]) -> tuple[list[int], list[list[int]]]:
    """Views of one shape as few axes: sizes, and strides per view, outermost first.

    Axes that are neighbours in every view become one. The order is that of the first view's memory.
    """
    order = views[0].order
    lists = [view.in_order(order) for view in views]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in views]
    for place, size in enumerate(lists[0].sizes):
        if size == 1:
            continue
        steps = [view.strides[place] for view in lists]
        if sizes and all(known[-1] == step * size for known, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for known, step in zip(strides, steps, strict=True):
                known[-1] = step
        else:
            sizes.append(size)
            for known, step in zip(strides, steps, strict=True):
                known.append(step)
    return sizes, strides


def planar(view: View) -> bool:
    """Whether an image's rows follow each other without gaps in each channel."""
    if len(view.sizes) != 4:
        return False
    _, _, height, width = view.shape
    _, _, row, pixel = view.in_order((0, 1, 2, 3)).strides
    return (width == 1 or pixel == 1) and (height == 1 or row == width)
