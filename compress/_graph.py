"""The one graph view of a module: which layer computes what, on whose parameters, and what feeds it.

The module is captured once; the operators of the graph are then traced back to the layers they came from. Passes
read the view and edit the module itself, by path, so that it stays the user's module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepack.graph import capture
from edgepack.tracing import example_inputs

if TYPE_CHECKING:
    from edgepack.task import Task

aten = torch.ops.aten
AFFINE = ("weight", "bias")
LAYERS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    aten.conv1d: (nn.Conv1d, AFFINE),
    aten.conv2d: (nn.Conv2d, AFFINE),
    aten.conv3d: (nn.Conv3d, AFFINE),
    aten.conv_transpose1d: (nn.ConvTranspose1d, AFFINE),
    aten.conv_transpose2d: (nn.ConvTranspose2d, AFFINE),
    aten.conv_transpose3d: (nn.ConvTranspose3d, AFFINE),
    aten.linear: (nn.Linear, AFFINE),
    aten.batch_norm: (_BatchNorm, (*AFFINE, "running_mean", "running_var")),
    aten.layer_norm: (nn.LayerNorm, AFFINE),
    aten.group_norm: (nn.GroupNorm, AFFINE),
}
SHAPE_OF_SECOND = (aten.reshape_as, aten.view_as, aten.expand_as)


@dataclass(frozen=True, eq=False)
class Call:
    """One use of a layer: the operator that does its work.

    Attributes:
        path: where the call found the layer in the module tree (a shared layer may have several paths).
        layer: the layer.
        node: its operator in the graph.
        obstacle: why the layer's parameters must not be edited on the strength of this call, None when they may.
    """

    path: str
    layer: nn.Module
    node: fx.Node
    obstacle: str | None = None


@dataclass(eq=False)
class GraphView:
    """A captured module, seen as calls of its layers.

    The graph is the view's own copy: ``bypass`` keeps it true while a pass takes layers out of the module.

    Attributes:
        module: the module that was captured, in inference mode.
        program: what ``torch.export`` made of it.
        inputs: example inputs that fit the program.
        calls: every use of a layer with parameters (those of ``LAYERS``), in the order of computation. Not among
            them: operators on a layer's parameters outside of the layer, such as ``F.linear(x, self.fc.weight)``.
    """

    module: nn.Module
    program: torch.export.ExportedProgram
    inputs: tuple[Tensor, ...]
    calls: tuple[Call, ...] = field(init=False)

    @classmethod
    def of(cls, module: nn.Module, task: Task) -> GraphView:
        """Capture the module on the task's inputs.

        Raises:
            Unsupported, InputError: it cannot be captured; see ``edgepack.graph.capture``.
        """
        _forget_origins(module)
        graph = capture(module, task)
        return cls(module, graph.program, example_inputs(graph.inputs))

    def __post_init__(self) -> None:
        self.calls = tuple(_calls(self.module, self.program))
        self._at = {call.node: call for call in self.calls}
        self._of: dict[nn.Module, list[Call]] = {}
        for call in self.calls:
            self._of.setdefault(call.layer, []).append(call)

    @property
    def nodes(self) -> list[fx.Node]:
        """The operators, in the order of computation."""
        return [node for node in self.program.graph.nodes if node.op == "call_function"]

    def call_at(self, node: fx.Node) -> Call | None:
        """The layer call whose work this operator does, None for any other operator."""
        return self._at.get(node)

    def calls_of(self, layer: nn.Module) -> list[Call]:
        """Every call of one layer, under whatever path."""
        return self._of.get(layer, [])

    def bypass(self, node: fx.Node) -> None:
        """Take an operator out of the graph: what read its result reads its first argument."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        self.program.graph.erase_node(node)


def operator_of(node: fx.Node) -> Any:
    """The ATen operator without its overload (``torch.ops.aten.conv2d``), None for other nodes."""
    return getattr(node.target, "overloadpacket", None)


def owner_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward holds this operator, ``""`` for the outermost."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def argument(node: fx.Node, name: str) -> Any:
    """An operator's argument by the name its schema gives it, default included; None where there is none."""
    for index, entry in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if entry.name == name:
            return node.args[index] if index < len(node.args) else node.kwargs.get(name, entry.default_value)
    return None


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's result, at the example's size where an axis is dynamic; ``()`` where it is no tensor."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else ()
    return tuple(size if isinstance(size, int) else int(size.node.hint) for size in sizes)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node's values (not only its shape); one that reads it twice counts once."""
    return [user for user in node.users if not _reads_shape_only(user, node)]


def named(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern (as in file names: ``*``, ``?``, ``[...]``) names the layer or something around it."""
    parts = path.split(".")
    around = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatchcase(name, pattern) for name in around for pattern in patterns)


def put_layer(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of the module tree where ``old`` is registered."""
    for parent in list(module.modules()):
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)


def _forget_origins(module: nn.Module) -> None:
    # torch.export copies the paths that a traced graph remembers, which are those before passes moved its layers;
    # without them it notes where it finds the layers now.
    for graph_module in module.modules():
        if isinstance(graph_module, fx.GraphModule):
            for node in graph_module.graph.nodes:
                node.meta.pop("nn_module_stack", None)


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    if operator_of(user) is aten.sym_size:
        return True
    return operator_of(user) in SHAPE_OF_SECOND and user.args[0] is not node


def _calls(module: nn.Module, program: torch.export.ExportedProgram) -> Iterator[Call]:
    tensors = _tensors(module, program)
    modules = dict(module.named_modules(remove_duplicate=False))
    found = [call for node in program.graph.nodes if (call := _call(node, modules, tensors)) is not None]
    bound = {(call.node, source) for call in found for source in call.node.args if isinstance(source, fx.Node)}
    for call in found:
        yield call if call.obstacle else replace(call, obstacle=_foreign_use(call, bound, tensors))


def _tensors(module: nn.Module, program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Placeholder name → the module's own tensor."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {key: functools.reduce(getattr, name.split("."), module) for key, name in names.items()}  # type: ignore[misc]


def _call(node: fx.Node, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Call | None:
    if operator_of(node) not in LAYERS:
        return None
    kind, attributes = LAYERS[operator_of(node)]
    path = owner_path(node)
    layer = modules.get(path)
    if not isinstance(layer, kind):
        return None
    for attribute in attributes:
        source, own = argument(node, attribute), getattr(layer, attribute)
        held = tensors.get(source.name) if isinstance(source, fx.Node) else None
        if held is not own or (source is not None and held is None):
            return Call(path, layer, node, f"its {attribute} is computed, not a plain parameter")
    return Call(path, layer, node)


def _foreign_use(call: Call, bound: set[tuple[fx.Node, fx.Node]], tensors: dict[str, Tensor]) -> str | None:
    for source in call.node.all_input_nodes:
        if source.name in tensors and any((user, source) not in bound for user in source.users):
            return "its parameters are also used outside of the layer"
    return None
