"""The outputs of a captured program: a flat tuple of tensors, their names, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepack.contracts import TensorSpec
from edgepack.errors import InputError, Unsupported

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def flat_outputs(
    program: ExportedProgram, specs: Sequence[TensorSpec], wanted: Sequence[str]
) -> tuple[TensorSpec, ...]:
    """Make the program return a plain tuple of tensors, and describe them."""
    from torch.utils import _pytree as pytree

    if (state := _changed_state(program)) is not None:
        raise Unsupported(f"the network changes {state!r} while it runs", "make the state an input and an output")
    values = [node for node in program.graph.output_node().args[0] if hasattr(node, "meta")]
    names = list(wanted) or _output_names(program, len(values))
    if len(values) != len(program.graph.output_node().args[0]):
        raise Unsupported("an output of the network is not a tensor", "return tensors only")
    if len(names) != len(values):
        raise InputError(f"the network has {len(values)} outputs, the task names {len(names)}")
    program.module_call_graph[0].signature.out_spec = pytree.tree_flatten(tuple(range(len(values))))[1]
    symbols = _symbols(program, specs)
    return tuple(
        TensorSpec(name, str(node.meta["val"].dtype).removeprefix("torch."), _named(node.meta["val"].shape, symbols))
        for name, node in zip(names, values, strict=True)
    )


def _changed_state(program: ExportedProgram) -> str | None:
    """Name of a buffer or input that an operator of the program writes to."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and getattr(value, "op", None) == "placeholder":
                return str(names.get(value.name, value.name))
    return None


def _output_names(program: ExportedProgram, count: int) -> list[str]:
    spec = program.call_spec.out_spec
    keys = spec.context if spec is not None and isinstance(spec.context, list) else []
    if len(keys) == count and spec is not None and spec.num_children == count:
        return [str(key) for key in keys]
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _symbols(program: ExportedProgram, specs: Sequence[TensorSpec]) -> dict[str, str]:
    """Symbol of torch.export → the task's name of the axis."""
    found: dict[str, str] = {}
    inputs = [n for n in program.graph.find_nodes(op="placeholder") if n.name in program.graph_signature.user_inputs]
    for node, spec in zip(inputs, specs, strict=True):
        for size, axis in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(axis, str):
                found.setdefault(str(size), axis)
    return found


def _named(shape: Sequence[Any], symbols: Mapping[str, str]) -> tuple[int | str, ...]:
    def axis(size: Any) -> int | str:
        if isinstance(size, int):
            return size
        return re.sub(r"[su]\d+", lambda match: symbols.get(match[0], match[0]), str(size))

    return tuple(axis(size) for size in shape)
