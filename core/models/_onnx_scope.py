"""Values while an ONNX graph is converted: constants, tensors of the new graph, and sizes.

A constant is a torch.Tensor and stays one as long as everything it meets is constant, so shape computations fold by
themselves. A runtime tensor is an fx node that carries its fake value (shape with symbols, dtype). ``Sizes`` is an
integer vector or scalar in which some item is only known at run time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from edgepack.errors import Unsupported
from edgepack.models._builder import Builder

aten = torch.ops.aten
# Sizes to try dynamic axes with, one per axis. Symbols stand for them; a size that no layer has keeps
# PyTorch from concluding that an axis equals one of fixed size.
TRIED = (7, 352, 416, 544, 608)


class Sizes(NamedTuple):
    """Integers of which at least one is a node. ``scalar`` for a single one without an axis."""

    items: tuple[Any, ...]
    scalar: bool = False


@dataclass(frozen=True)
class Node:
    """One ONNX node.

    Attributes:
        name: for messages.
        layer: the name its layer gets.
        outputs: how many are used.
    """

    operator: str
    name: str
    layer: str
    attributes: dict[str, Any]
    outputs: int
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def unsupported(self, reason: str) -> Unsupported:
        return Unsupported(f"ONNX operator {self.operator} (node {self.name!r}): {reason}")


class Scope:
    """Adds nodes to the new graph; computes at once what is constant.

    Attributes:
        names: the file's name for a constant, by identity.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.builder = Builder()
        self._mode = FakeTensorMode(
            allow_non_fake_inputs=True, shape_env=ShapeEnv(duck_shape=False, specialize_zero_one=True)
        )

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> fx.Node:
        """A placeholder; None in the shape for a dynamic axis."""
        node = self.builder.input(name)
        tried = [size or TRIED[axis % len(TRIED)] for axis, size in enumerate(shape)]
        dynamic = [DimDynamic.STATIC if size is not None else DimDynamic.DYNAMIC for size in shape]
        context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
        real = torch.empty(tried, dtype=dtype)
        node.meta["val"] = self._mode.from_tensor(real, source=ConstantSource(node.name), symbolic_context=context)
        return node

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args)`` now if all is constant, else as a node."""
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, fx.Node) for leaf in leaves):
            with torch.no_grad():
                return function(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self.embed, (args, kwargs))
        node = self.builder.call(function, *args, **kwargs)
        node.meta["val"] = self._fake(function, args, kwargs)
        return node

    def embed(self, value: Tensor) -> fx.Node:
        """A constant as a node: a parameter where the file names it and it is floating point, else a buffer."""
        name = self.names.get(id(value))
        if name is None or not value.is_floating_point():
            return self.builder.tensor(name or "constant", value)
        return self.builder.tensor(name, value, trained=True)

    def layer(self, name: str, module: nn.Module, x: Any) -> Any:
        """``module(x)`` as a call of a layer named ``name``."""
        if isinstance(x, Tensor):
            with torch.no_grad():
                return module(x)
        node = self.builder.layer(name, module, x)
        node.meta["val"] = self._fake(module, (x,), {})
        return node

    def _fake(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(fx.Node, self._value_of, (args, kwargs))
        # Without the Python dispatcher some operators compute with the tried sizes and lose the symbols.
        with self._mode, enable_python_dispatcher(), torch.no_grad():
            return function(*args, **kwargs)

    def _value_of(self, node: fx.Node) -> Any:
        return self.builder.constant_of(node) if node.op == "get_attr" else node.meta["val"]

    def item(self, node: Any, index: int) -> Any:
        """One output of a node with several."""
        if isinstance(node, (tuple, list)):
            return node[index]
        return self.call(operator.getitem, node, index)

    def rank(self, x: Any) -> int:
        return int(x.dim() if isinstance(x, Tensor) else x.meta["val"].dim())

    def dtype(self, x: Any) -> torch.dtype:
        found: torch.dtype = x.dtype if isinstance(x, Tensor) else x.meta["val"].dtype
        return found

    def shape(self, x: Any) -> list[Any]:
        """Sizes of a tensor: an int where it is fixed, a node where it is not."""
        if isinstance(x, Tensor):
            return list(x.shape)
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, x, axis)
            for axis, size in enumerate(x.meta["val"].shape)
        ]

    def sizes(self, value: Any, node: Node) -> list[Any]:
        """Items of an integer vector, as ints and nodes."""
        if isinstance(value, Sizes):
            return list(value.items)
        return self.ints(value, node)

    def ints(self, value: Any, node: Node) -> list[int]:
        """A constant integer vector (or scalar) as a list."""
        if isinstance(value, (list, tuple)) and not isinstance(value, Sizes):
            return [int(item) for item in value]
        return [int(item) for item in self.constant(value, node).reshape(-1).tolist()]

    def constant(self, value: Any, node: Node) -> Tensor:
        if not isinstance(value, Tensor):
            raise node.unsupported("an input that must be constant depends on data")
        return value

    def tensor(self, value: Any) -> Any:
        """Sizes as a tensor of the graph; anything else unchanged."""
        if not isinstance(value, Sizes):
            return value
        items = [
            self.call(aten.scalar_tensor.default, item, dtype=torch.int64)
            if isinstance(item, fx.Node)
            else torch.tensor(item)
            for item in value.items
        ]
        return items[0] if value.scalar else self.call(aten.stack.default, items)


def vector(items: Sequence[Any], scalar: bool = False) -> Any:
    """A constant tensor where every item is known, else Sizes."""
    if any(isinstance(item, fx.Node) for item in items):
        return Sizes(tuple(items), scalar)
    return torch.tensor(items[0] if scalar else list(items), dtype=torch.int64)
