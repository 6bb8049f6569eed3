"""A captured graph → steps on memory (``_c_graph``): how the network is read.

Operators that only move values are in ``_c_moves``, those with arithmetic in ``_c_layers`` and ``_c_math``. What no
table knows is refused by name.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.errors import Unsupported
from edgepack.export._alignment import word
from edgepack.export._c_graph import Array, Buffer, Network, Step, View, channels_last
from edgepack.export._dialects import _attribute

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

Handler = Callable[["Reader", "Node", Mapping[str, Any]], Any]
HANDLERS: dict[str, Handler] = {}
SPEAKERS: dict[str, Handler] = {}


class Phrase:
    """Part of an operator that a graph says in several words; it has no memory yet."""


class Lazy(Phrase, ABC):
    """A value that some operators read in a form of its own; all others get its floats."""

    @abstractmethod
    def read(self, reader: Reader, node: Node, given: Mapping[str, Any]) -> Any:
        """What an operator that reads it in its own form gives, None where it reads floats."""

    @abstractmethod
    def floats(self, reader: Reader) -> View:
        """Its values as memory."""


def handles(*words: str) -> Callable[[Handler], Handler]:
    """Register how operators of these names are read; an in-place form is the same."""

    def register(handler: Handler) -> Handler:
        for one in words:
            HANDLERS[one] = HANDLERS[f"{one}_"] = handler
        return handler

    return register


def speaks(*words: str) -> Callable[[Handler], Handler]:
    """Register how operators of these names continue a phrase."""

    def register(handler: Handler) -> Handler:
        SPEAKERS.update(dict.fromkeys(words, handler))
        return handler

    return register


def read(graph: Graph) -> Network:
    """The network as steps.

    Raises:
        Unsupported: an operator, or a form of one, that the kernels lack; names it.
    """
    from edgepack.export import (  # noqa: F401  (they register their operators)
        _c_bits_read,
        _c_integer_read,
        _c_layers,
        _c_math,
        _c_moves,
    )

    reader = Reader(graph)
    reader.run()
    return reader.network


@dataclass(eq=False)
class Reader:
    """Walks a graph with fixed shapes; handlers are called with it."""

    graph: Graph
    network: Network = field(default_factory=Network)
    values: dict[Node, Any] = field(default_factory=dict)

    def run(self) -> None:
        module = self.graph.program.module(check_guards=False)
        specs = iter(self.graph.inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._input(next(specs).name, node)
            elif node.op == "get_attr":
                self.values[node] = _attribute(module, node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                self._outputs(node)

    def _input(self, name: str, node: Node) -> View:
        shape, dtype = tuple(node.meta["val"].shape), str(node.meta["val"].dtype).removeprefix("torch.")
        if dtype not in ("float32", "uint8"):
            raise Unsupported(f"input {name!r} is {dtype}; the C target takes float32 and uint8", "export to onnx")
        view = View.new(dtype, shape)
        view.buffer.place = name
        self.network.inputs = {**self.network.inputs, name: view}
        return view

    def _outputs(self, node: Node) -> None:
        found = [self.values[source] for source in _flat(node.args[0])]
        for spec, value in zip(self.graph.outputs, found, strict=True):
            source = self.view(value)
            if source.dtype != spec.dtype:
                raise Unsupported(f"output {spec.name!r} is {spec.dtype}; the C target gives float32", "export to onnx")
            target = View.new(source.dtype, source.shape)
            target.buffer.place = spec.name
            self.copy(source, target, spec.name)
            self.network.outputs = {**self.network.outputs, spec.name: target}

    def _call(self, node: Node) -> Any:
        arguments = bound(node, self.values)
        if node.target is operator.getitem:
            return arguments["self"][arguments["index"]]
        leaves = _leaves(list(arguments.values()))
        for lazy in [value for value in leaves if isinstance(value, Lazy)]:
            if (found := lazy.read(self, node, arguments)) is not None:
                return found
        arguments = {name: self._floats(value) for name, value in arguments.items()}
        leaves = _leaves(list(arguments.values()))
        if any(isinstance(value, Phrase) for value in leaves) and not str(node.target).startswith("quantized"):
            return SPEAKERS[word(node)](self, node, arguments)
        if not any(isinstance(value, (View, Phrase)) for value in leaves):
            return self._constant_call(node)
        return self.handler(node)(self, node, arguments)

    def _floats(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._floats(one) for one in value)
        return value.floats(self) if isinstance(value, Lazy) else value

    def handler(self, node: Node) -> Handler:
        """How an operator is read. Raises Unsupported."""
        found = HANDLERS.get(word(node)) or HANDLERS.get(str(node.target))
        if found is None:
            raise self.refused(node)
        return found

    def _constant_call(self, node: Node) -> Any:
        """What depends on weights alone is computed now."""
        import torch

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: self.values[source])
        target: Any = node.target
        with torch.no_grad():
            return target(*args, **kwargs)

    def refused(self, node: Node, form: str = "") -> Unsupported:
        """The error for an operator that the kernels lack."""
        name = word(node) if str(node.target).startswith("aten.") else str(node.target).partition(".")[0]
        what = f"operator {name!r} ({node.name})" + (f" with {form}" if form else "")
        return Unsupported(f"the C target has no {what}", "export to onnx, or give the layer another form")

    def view(self, value: Any, like: View | None = None) -> View:
        """A value as memory: computed, constant or a number."""
        import torch

        if isinstance(value, View):
            return value
        if isinstance(value, Lazy):
            return value.floats(self)
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        array = tensor.detach().numpy()
        return self.constant(array.astype(np.float32) if array.dtype.kind in "fib" else array, like)

    def constant(self, array: Array, like: View | None = None) -> View:
        """Known values, their axes in memory as those of ``like`` where they have as many."""
        order = like.order if like is not None and len(like.order) == array.ndim else None
        view = View.new(str(array.dtype), array.shape, order)
        view.buffer.constant = np.ascontiguousarray(array.transpose(view.order)).reshape(-1)
        return view

    def emit(self, kernel: str, node: Node | str, inputs: Sequence[View], output: View, **options: Any) -> View:
        """Add a step and return its output."""
        name = node if isinstance(node, str) else node.name
        self.network.steps.append(Step(kernel, name, list(inputs), output, options))
        return output

    def scratch(self, dtype: str, size: int) -> None:
        """Give the last step working memory."""
        self.network.steps[-1].scratch = Buffer(dtype, size)

    def copy(self, source: View, target: View, node: Node | str) -> None:
        self.emit("copy", node, [source], target)

    def dense(self, view: View, node: Node | str, order: Sequence[int] | None = None) -> View:
        """The value without gaps in this order of axes, copied where it is not."""
        listed = view.in_order(tuple(range(len(view.sizes))) if order is None else order)
        if listed.dense():
            return listed
        made = View.new(view.dtype, view.shape, listed.order)
        self.copy(view, made, node)
        return made

    def image(self, view: View, node: Node | str) -> View:
        """The value with its channels (axis 1) last and next to each other; other axes may have gaps."""
        listed = view.in_order(channels_last(len(view.sizes)))
        if listed.sizes[-1] == 1:
            return replace(listed, strides=(*listed.strides[:-1], 1))
        if listed.strides[-1] == 1:
            return listed
        made = View.new(view.dtype, view.shape, listed.order)
        self.copy(view, made, node)
        return made

    def reshape(self, view: View, shape: Sequence[int], node: Node | str) -> View:
        """The value under other sizes, in the network's order of elements."""
        return self.dense(view, node).reshaped(shape)

    def padded(
        self, view: View, ends: Sequence[tuple[int, int]], value: float, node: Node | str, order: Sequence[int] = ()
    ) -> View:
        """The value between constants; negative ends cut. ``ends`` per axis of the network; ``order`` in memory."""
        for axis, (before, behind) in enumerate(ends):
            size = view.shape[axis]
            view = view.sliced(axis, max(0, -before), size - max(0, -behind))
        grown = [(max(0, before), max(0, behind)) for before, behind in ends]
        if not any(before or behind for before, behind in grown):
            return view
        shape = [size + sum(pair) for size, pair in zip(view.shape, grown, strict=True)]
        made = inner = View.new(view.dtype, shape, order or view.order)
        around = made.order == channels_last(4) and not any(before or behind for before, behind in grown[:2])
        self.emit("border" if around else "fill", node, [], made, value=value, ends=grown)
        for axis, (before, _) in enumerate(grown):
            inner = inner.sliced(axis, before, before + view.shape[axis])
        self.copy(view, inner, node)
        return made


def bound(node: Node, values: Mapping[Node, Any]) -> dict[str, Any]:
    """Arguments of an operator by name, defaults filled in."""
    import torch

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(zip(("self", "index"), args, strict=False))
    found = {argument.name: argument.default_value for argument in schema.arguments}
    found.update(zip(found, args, strict=False))
    return {**found, **kwargs}


def _leaves(values: Sequence[Any]) -> list[Any]:
    flat = []
    for value in values:
        flat += _leaves(value) if isinstance(value, (list, tuple)) else [value]
    return flat


def _flat(value: Any) -> list[Any]:
    return _leaves(value) if isinstance(value, (list, tuple)) else [value]


def wrapped(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def as_array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array
