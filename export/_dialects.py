"""What every dialect starts from: float weights as they are, or on the grid of 16-bit floats.

A float16 file stores weights in 16 bits and the engine chooses how to compute. The simulation holds the very same
values in float32, so a CPU engine that computes in float32 must agree with it.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.errors import Unsupported
from edgepack.graph import recapture

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

    from edgepack.plan import Plan

HALF_MAX = 65504.0
SMALL = 16  # tensors up to this size stay float32: a conversion costs more bytes than it saves


def refuse_plan(plan: Plan, format_name: str, precision: str) -> None:
    """Raises Unsupported when the plan asks for more than float weights, unless float32 is what was asked for."""
    if precision == "float32":
        return
    for node, decisions in plan.nodes.items():
        words = ", ".join(word for word in decisions if word != "operator") or "a decision"
        raise Unsupported(
            f"{format_name} cannot write what the plan says about {node!r} ({words})",
            "precision = 'float32' writes the weights as they are",
        )


def lower_float(graph: Graph, precision: str) -> Graph:
    """The simulation of a float artifact: the graph itself, or with 16-bit weights.

    Raises:
        Unsupported: a parameter is beyond the range of float16; names it.
    """
    return half_weights(graph) if precision == "float16" else graph


def half_weights(graph: Graph) -> Graph:
    """Round every weight of two or more axes to float16, keeping it as float32 values.

    Converters fold batch normalization and other constant factors into weights, which would move them off the
    16-bit grid again; so that is done first, in float64. Biases and scales of one axis stay as they are: they are
    a percent of the bytes, and errors in them do not average out.

    Raises:
        Unsupported: a parameter is beyond the range of float16; names it.
    """
    import torch

    module = graph.program.module(check_guards=False)
    with torch.no_grad():
        _fold_norms(module)
        _fold_constants(module)
        _drop_unused(module)
        _round(module)
    return retrace(graph, module)


def half_storage(graph: Graph) -> Graph:
    """Store weights that lie on the 16-bit grid as float16, with a conversion to float32 where they are used."""
    import torch

    module = graph.program.module(check_guards=False)
    for node in list(module.graph.find_nodes(op="get_attr")):
        weight = _attribute(module, node)
        stored = exact_half(weight.detach().numpy()) if isinstance(weight, torch.Tensor) else None
        if stored is None:
            continue
        _assign(module, str(node.target), torch.from_numpy(stored))
        with module.graph.inserting_after(node):
            wide = module.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(wide, delete_user_cb=partial(operator.is_not, wide))
    return retrace(graph, module)


def exact_half(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """The array in 16 bits; None where that would change a value, or is not worth a conversion."""
    if array.dtype != np.float32 or array.size <= SMALL:
        return None
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array, equal_nan=True) else None


def retrace(graph: Graph, module: GraphModule) -> Graph:
    """The graph with another body: same inputs, same outputs."""
    _drop_unused(module)
    module.recompile()
    return recapture(graph, module)


def _drop_unused(module: GraphModule) -> None:
    """Remove dead operators and the weights that only they read."""
    module.graph.eliminate_dead_code()
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for owner_name, owner in list(module.named_modules()):
        prefix = f"{owner_name}." if owner_name else ""
        for table in (owner._parameters, owner._buffers):
            for leaf in [leaf for leaf in table if f"{prefix}{leaf}" not in used]:
                del table[leaf]


def _round(module: GraphModule) -> None:
    import torch

    rounded: dict[int, torch.Tensor] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        weight = _attribute(module, node)
        if not isinstance(weight, torch.Tensor) or weight.dtype != torch.float32 or weight.ndim < 2:
            continue
        grid = weight.to(torch.float16).to(torch.float32)
        if bool((grid.isinf() & weight.isfinite()).any()):
            if isinstance(weight, torch.nn.Parameter):
                largest = float(weight[weight.isfinite()].abs().max())
                raise Unsupported(
                    f"parameter {node.target!r} has a value of {largest:.4g}, beyond float16 (at most {HALF_MAX:.0f})",
                    "precision = 'float32'",
                )
            continue  # a mask of huge negative numbers, not a weight
        # One tensor under two names stays one tensor.
        shared = rounded.setdefault(id(weight), torch.nn.Parameter(grid, requires_grad=False))
        _assign(module, str(node.target), shared)


def _fold_norms(module: GraphModule) -> None:
    """convolution or linear, batch normalization → the same with scaled weights and bias."""
    import torch

    for norm in list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)):
        source: Any = norm.args[0]
        axis = _output_axis(source)
        if axis is None or len(source.users) != 1 or norm.args[5] or (axis == 1 and _groups(source) != 1):
            continue
        weight, bias = (_constant(module, arg) for arg in (*source.args, None)[1:3])
        scale, shift, mean, variance = (_constant(module, arg) for arg in norm.args[1:5])
        if weight is None or mean is None or variance is None:
            continue
        factor = (variance + norm.args[7]).rsqrt() * (1.0 if scale is None else scale)
        scaled = weight * factor.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
        moved = ((0.0 if bias is None else bias) - mean) * factor + (0.0 if shift is None else shift)
        name = str(source.args[1].target)
        kept = [_new_attribute(module, source, f"{name}_{end}", t) for end, t in (("folded", scaled), ("bias", moved))]
        source.args = (source.args[0], *kept, *source.args[3:])
        norm.replace_all_uses_with(source)
        module.graph.erase_node(norm)


def _output_axis(node: Any) -> int | None:
    """Axis of output channels in the weight of a linear map whose channels are axis 1 of its result."""
    packet = getattr(getattr(node, "target", None), "overloadpacket", None)
    name = str(packet).removeprefix("aten.")
    if name in ("conv1d", "conv2d", "conv3d"):
        return 0
    if name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        return 1
    return 0 if name == "linear" and node.meta["val"].ndim == 2 else None


def _groups(node: Node) -> Any:
    return node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)


def _fold_constants(module: GraphModule) -> None:
    """Compute what depends on parameters alone (weight normalization, layer scale …) unless the result is larger."""
    import torch

    for node in module.graph.find_nodes(op="get_attr"):
        node.meta["weight"] = _attribute(module, node)
    for node in list(module.graph.nodes):
        sources = node.all_input_nodes
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or not sources or schema is None or schema.is_mutable:
            continue
        if not all("weight" in source.meta for source in sources):
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: source.meta["weight"])
        value = node.target(*args, **kwargs)
        largest = max(source.meta["weight"].numel() for source in sources)
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.numel() > largest:
            continue
        node.meta["weight"] = value
        if any("weight" not in user.meta for user in node.users):
            kept = _new_attribute(module, node, f"{sources[0].target}_{node.name}", value)
            node.replace_all_uses_with(kept)


def _new_attribute(module: GraphModule, before: Node, name: str, value: torch.Tensor) -> Node:
    import torch

    _assign(module, name, torch.nn.Parameter(value.float().contiguous(), requires_grad=False))
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _constant(module: GraphModule, node: Any) -> torch.Tensor | None:
    if getattr(node, "op", None) != "get_attr":
        return None
    value = _attribute(module, node)
    return value.double() if value.is_floating_point() else None


def _attribute(module: GraphModule, node: Node) -> Any:
    owner, _, leaf = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _assign(module: GraphModule, name: str, value: torch.Tensor) -> None:
    import torch

    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if hasattr(place, leaf):
        delattr(place, leaf)
    if isinstance(value, torch.nn.Parameter):
        place.register_parameter(leaf, value)
    else:
        place.register_buffer(leaf, value)
