"""An ATen program in the words that coremltools knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgepack.errors import Unsupported, require

if TYPE_CHECKING:
    from torch import Tensor
    from torch._ops import OpOverload
    from torch.export import ExportedProgram

ROUNDS = 4  # a decomposition may need another


def spelled_out(program: ExportedProgram) -> ExportedProgram:
    """Decompose operators that coremltools has no form for and PyTorch can write with others.

    Raises:
        Unsupported: an operator has no form and no decomposition; names it.
    """
    import torch

    program = program.run_decompositions({})
    gelus = program.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    if any(node.kwargs.get("approximate") == "tanh" for node in gelus):
        # coremltools overlooks the word and would silently take the exact form; it knows the formula, though.
        program = program.run_decompositions({torch.ops.aten.gelu.default: _gelu})
    for _ in range(ROUNDS):
        _say_logical(program)
        _say_strides(program)
        missing = _missing(program)
        if not missing:
            return program
        table = _decompositions(missing)
        for target in missing:
            if target not in table:
                raise _refusal(target)
        program = program.run_decompositions(table)
    raise _refusal(missing[0])


def _refusal(target: OpOverload) -> Unsupported:
    return Unsupported(f"operator {target} has no Core ML form", "export to another format, or replace the operator")


def _missing(program: ExportedProgram) -> list[OpOverload]:
    known = require("coremltools.converters.mil.frontend.torch.torch_op_registry", "coreml")._TORCH_OPS_REGISTRY
    targets = dict.fromkeys(node.target for node in program.graph.nodes if node.op == "call_function")
    named: list[Any] = [target for target in targets if hasattr(target, "_schema")]
    return [target for target in named if known.get_func(target.name()) is None]


def _say_logical(program: ExportedProgram) -> None:
    """``a & b`` of truth values is a bitwise operator in PyTorch, of which coremltools knows only some."""
    import torch

    aten = torch.ops.aten
    words = {"__and__": "logical_and", "__or__": "logical_or", "__xor__": "logical_xor"}
    words |= {"bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_xor": "logical_xor"}
    for old, new in words.items():
        for node in program.graph.find_nodes(op="call_function", target=getattr(aten, old).Tensor):
            if node.meta["val"].dtype == torch.bool:
                node.target = getattr(aten, new).default


def _say_strides(program: ExportedProgram) -> None:
    """Pooling without a stride has that of its window; coremltools wants to read it."""
    import torch

    aten = torch.ops.aten
    for target in (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default):
        for node in program.graph.find_nodes(op="call_function", target=target):
            if len(node.args) == 2:
                node.args = (*node.args, node.args[1])


def _decompositions(missing: list[OpOverload]) -> dict[Any, Callable[..., Any]]:
    """PyTorch's own, but for those that end in its internal operators."""
    import torch
    from torch._decomp import get_decompositions

    aten = torch.ops.aten
    bare = (aten.fmod, aten.prod, aten.fake_quantize_per_tensor_affine_cachemask)
    table = get_decompositions([target for target in missing if target.overloadpacket not in bare])
    ours: dict[Any, Callable[..., Any]] = {
        aten.log_sigmoid.default: _log_sigmoid,
        aten.var_mean.dim: lambda x, *args, **kwargs: (aten.var.dim(x, *args, **kwargs), _mean(x, *args, **kwargs)),
        aten.var_mean.correction: lambda x, *args, **kwargs: (
            aten.var.correction(x, *args, **kwargs), _mean(x, *args, **kwargs),
        ),
    }  # fmt: skip
    return table | {target: ours[target] for target in missing if target in ours}


def _mean(x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **_: Any) -> Tensor:
    return x.mean(dim, keepdim)


def _log_sigmoid(x: Tensor) -> Tensor:
    import torch

    return -torch.nn.functional.softplus(-x)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    import torch

    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
