"""Giving each use of a shared layer a copy of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from edgepack.errors import Unsupported
from edgepack.graph import capture

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgepack.compress._graph import GraphView
    from edgepack.contracts import Run
    from edgepack.task import Task


def separate(view: GraphView, layers: Sequence[nn.Module], task: Task, run: Run) -> nn.Module | None:
    """Give every call of these layers a layer of its own; None (and a note) where that is not possible.

    A layer registered under several names is copied in place. One that is called several times under the same name
    is not, as only the code that calls it knows: then the whole network is lifted to a ``torch.fx.GraphModule``.
    """
    module = view.module
    groups = [[call.path for call in view.calls_of(layer)] for layer in layers]
    if all(len(set(group)) == len(group) for group in groups):
        own_copies(module, [path for group in groups for path in group])
    elif isinstance(module, fx.GraphModule):
        own_calls(module, [path for group in groups for path in dict.fromkeys(group)])
    else:
        from edgepack.models.lift import lift_program

        try:
            module = lift_program(_captured(view, task))
        except Unsupported as error:
            run.note(f"{groups[0][0]} stays shared: {error.message}")
            return None
        run.note("a layer is called several times under one name: the network continues as a traced graph")
    for group in groups:
        run.note(f"{group[0]} is used {len(group)} times, next to different layers: made separate copies")
    return module


def _captured(view: GraphView, task: Task) -> ExportedProgram:
    """The module's program, which answers as the module does (a tensor, a tuple, a dict)."""
    program = capture(view.module, task).program
    with torch.no_grad():
        structure = pytree.tree_structure(view.module(*view.inputs))
    signature = program.module_call_graph[0].signature
    assert signature is not None
    if structure.num_leaves == signature.out_spec.num_leaves and _plain(structure):
        signature.out_spec = structure
    return program


def _plain(structure: pytree.TreeSpec) -> bool:
    return structure.type in (None, tuple, list, dict) and all(_plain(child) for child in structure.children())


def own_copies(module: nn.Module, paths: Iterable[str]) -> None:
    """Give each path a layer registered nowhere else.

    Containers on the way are copied too if they are shared. Copies are shallow: parameters stay tied until a pass
    puts new ones in.
    """
    for path in paths:
        parent = module
        for name in path.split("."):
            child = parent.get_submodule(name)
            if _places(module, child) > 1:
                child = _copy(child)
                setattr(parent, name, child)
            parent = child


def own_calls(module: fx.GraphModule, paths: Iterable[str]) -> None:
    """Give each call of these layers, beyond the first, a copy of its own: ``name``, ``name_2``, ``name_3`` …"""
    for path in paths:
        calls = [node for node in module.graph.nodes if node.op == "call_module" and node.target == path]
        for count, node in enumerate(calls[1:], start=2):
            name = f"{path}_{count}"
            module.add_submodule(name, _copy(module.get_submodule(path)))
            node.target = name
    module.recompile()


def _places(module: nn.Module, layer: nn.Module) -> int:
    return sum(child is layer for parent in module.modules() for child in parent._modules.values())


def _copy(module: nn.Module) -> nn.Module:
    new = module.__new__(type(module))
    new.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(module.__dict__[table])
    return new
