"""Build an fx graph of standard layers, with unique names that never nest inside one another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn


class Builder:
    """Collects nodes, layers and constants, and turns them into a GraphModule."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._layers: set[str] = set()
        self._tensors: dict[int, fx.Node] = {}
        self._wanted: dict[fx.Node, tuple[str, Tensor, bool]] = {}

    def input(self, name: str) -> fx.Node:
        """A placeholder; its name in Python may differ, the given one is what callers keep."""
        return self.graph.placeholder(re.sub(r"\W", "_", name))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def layer(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """A call of ``module`` under ``name``, or ``name_2`` … where it is taken."""
        unique = self._unique(clean_name(name))
        self._layers.add(unique)
        _attach(self.root, unique, module.eval())
        return self.graph.call_module(unique, args)

    def tensor(self, name: str, value: Tensor, trained: bool = False) -> fx.Node:
        """A parameter or buffer of the graph, one node per tensor. Its attribute gets its name at the end."""
        node = self._tensors.get(id(value))
        if node is None:
            node = self.graph.get_attr("pending")
            self._tensors[id(value)] = node
            self._wanted[node] = (clean_name(name), value, trained or isinstance(value, nn.Parameter))
        return node

    def constant_of(self, node: fx.Node) -> Tensor:
        """The tensor behind a node made by ``tensor``."""
        return self._wanted[node][1]

    def finish(self, outputs: Any) -> fx.GraphModule:
        self.graph.output(outputs)
        for node, (name, value, trained) in self._wanted.items():
            if node.users:
                self._name_tensor(node, name, value, trained)
            else:
                self.graph.erase_node(node)
        for layer in list(self.graph.find_nodes(op="call_module")):
            if not layer.users:
                self.graph.erase_node(layer)
        return fx.GraphModule(self.root, self.graph).eval()

    def _name_tensor(self, node: fx.Node, name: str, value: Tensor, trained: bool) -> None:
        # Inside a layer a pass could replace the tensor's owner, so it moves out.
        if any(name.startswith(f"{layer}.") for layer in self._layers):
            name = name.replace(".", "_")
        name = self._unique(name)
        self._layers.add(name)
        if trained:
            value = nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
        _attach(self.root, name, value)
        node.target = name

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while self._clashes(candidate):
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def _clashes(self, name: str) -> bool:
        if any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in self._layers):
            return True
        owner: Any = self.root
        for part in name.split("."):
            if not isinstance(owner, nn.Module):
                return True
            if part not in owner._modules and hasattr(owner, part):
                return True
            owner = owner._modules.get(part)
            if owner is None:
                return False
        return True


def clean_name(name: str) -> str:
    """A dotted attribute path from any string."""
    parts = [re.sub(r"\W", "_", part) for part in re.split(r"[./:]+", name) if part]
    return ".".join(part for part in parts if part) or "layer"


def layer_name(parameter: str) -> str:
    """``layer1.0.conv1`` for ``layer1.0.conv1.weight``; ``attn.in_proj`` for ``attn.in_proj_weight``."""
    owner, _, leaf = parameter.rpartition(".")
    stem = re.sub(r"_?(weight|bias|running_mean|running_var)$", "", leaf)
    return ".".join(part for part in (owner, stem) if part) or "layer"


def _attach(root: nn.Module, name: str, value: Any) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    if isinstance(value, nn.Module):
        owner.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value.detach())


def filled(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """A layer made on the meta device, given its tensors: float ones become trainable parameters or buffers."""
    for name, value in tensors.items():
        if value is None:
            continue
        value = value.detach().clone(memory_format=torch.contiguous_format)
        if name in module._buffers:
            module._buffers[name] = value
        else:
            module.register_parameter(name, nn.Parameter(value))
    if "num_batches_tracked" in module._buffers:
        module._buffers["num_batches_tracked"] = torch.tensor(0, dtype=torch.long)
    return module
