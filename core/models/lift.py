"""Turn an exported program into a module of standard layers, so that passes that need layers can work on it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from edgepack.errors import Unsupported
from edgepack.models import _layers
from edgepack.models._builder import Builder, layer_name

aten = torch.ops.aten
TRAINING = "it was exported in training mode"
EVAL = "call model.eval() before torch.export.export"


def lift_program(program: ExportedProgram) -> fx.GraphModule:
    """Layers where weights are constant (nn.Conv2d, nn.Linear, nn.BatchNorm2d …), ATen operators elsewhere.

    A layer is named by its parameters (``layer1.0.conv1``) and each call has its own, so a shared layer becomes
    two. Dynamic axes stay dynamic. ``meta["input_names"]`` and ``meta["output_names"]`` keep the program's names.

    Raises:
        Unsupported: the program was exported in training mode or writes to its own buffers.
    """
    if _needs_rewriting(program):
        with warnings.catch_warnings():  # torch copies its own deprecated LeafSpec
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            program = program.run_decompositions({})
    return _Lift(program).run()


class _Layer(NamedTuple):
    """What replaces a node: a layer, its input, and the name of one of its parameters."""

    module: nn.Module
    input: Any
    parameter: str


class _Lift:
    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.builder = Builder()
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, tuple[str, Tensor]] = {}
        self.inputs: list[str] = []

    def run(self) -> fx.GraphModule:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name])
            elif node.op == "call_function":
                self._call(node)
        flat = self._outputs()
        module = self.builder.finish(pytree.tree_unflatten(flat, self.program.call_spec.out_spec))
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        module.meta["input_names"] = tuple(self.inputs)
        module.meta["output_names"] = tuple(self._output_names())
        return module

    def _placeholder(self, node: fx.Node, spec: Any) -> None:
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                self.values[node] = spec.arg.value
                return
            self.inputs.append(node.name)
            self.values[node] = self.builder.input(node.name)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            store = self.program.state_dict if spec.target in self.program.state_dict else self.program.constants
            self.constants[node] = (spec.target, store[spec.target])
        else:
            raise Unsupported(f"the exported program takes {node.name!r}, which is neither a tensor nor a constant")

    def _outputs(self) -> list[Any]:
        specs = self.program.graph_signature.output_specs
        (results,) = self.program.graph.output_node().args
        assert isinstance(results, (tuple, list))
        for spec in specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise Unsupported(f"the exported program changes its buffer {spec.target!r}: {TRAINING}", EVAL)
        return [self._value(result) for result in results]

    def _output_names(self) -> list[str]:
        return [getattr(spec.arg, "name", "") for spec in self.program.graph_signature.output_specs]

    def _call(self, node: fx.Node) -> None:
        if node.target is aten._assert_tensor_metadata.default:
            return
        source: Any = node.args[0] if node.target is operator.getitem else None
        if isinstance(self.values.get(source), _First):
            self.values[node] = self.values[source].value if node.args[1] == 0 else None
            return
        rule = RULES.get(node.target)
        layer = rule(self, node, _arguments(node)) if rule is not None else None
        if isinstance(layer, _Layer):
            value = self.builder.layer(layer_name(layer.parameter), layer.module, self._value(layer.input))
            self.values[node] = _First(value) if isinstance(node.meta["val"], (tuple, list)) else value
        elif isinstance(layer, fx.Node):
            self.values[node] = self._value(layer)
        elif not self._folds(node):
            self._copy(node)

    def _copy(self, node: fx.Node) -> None:
        target = _functional(node) or node.target
        args = fx.map_arg(node.args, self._value)
        kwargs = fx.map_arg(node.kwargs, self._value)
        copied = self.builder.graph.create_node("call_function", target, args, kwargs, node.name)
        self.values[node] = copied

    def _value(self, argument: Any) -> Any:
        """What stands for an argument in the new graph."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self.values:
            name, tensor = self.constants[argument]
            self.values[argument] = self.builder.tensor(name, tensor)
        value = self.values[argument]
        return value.value if isinstance(value, _First) else value

    def constant(self, argument: Any) -> Tensor | None:
        found = self.constants.get(argument)
        return None if found is None else found[1]

    def name(self, argument: Any) -> str:
        return self.constants[argument][0]

    def _folds(self, node: fx.Node) -> bool:
        """Compute what depends on constants alone, such as a reparametrized or transposed weight."""
        inputs = node.all_input_nodes
        target = node.target
        if not inputs or any(item not in self.constants for item in inputs):
            return False
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
            return False
        if not isinstance(node.meta.get("val"), Tensor) or any(
            isinstance(n, torch.SymInt) for n in node.meta["val"].shape
        ):
            return False
        with torch.no_grad():
            args: Any = fx.map_arg(node.args, lambda item: self.constants[item][1].detach())
            kwargs: Any = fx.map_arg(node.kwargs, lambda item: self.constants[item][1].detach())
            value = target(*args, **kwargs)
        # Something much larger than its inputs (an expanded token) is cheaper to compute than to store.
        if value.numel() > sum(self.constants[item][1].numel() for item in inputs):
            return False
        self.constants[node] = (self.constants[inputs[0]][0], value.clone() if value._is_view() else value)
        return True


class _First(NamedTuple):
    """The result of an operator with several outputs of which only the first is computed."""

    value: fx.Node


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the operator's own names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {argument.name: argument.default_value for argument in schema.arguments}
    values.update(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    values.update(node.kwargs)
    return values


def _rank(argument: Any) -> int:
    return int(argument.meta["val"].dim())


def _conv(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight, bias = lift.constant(a["weight"]), lift.constant(a["bias"])
    if weight is None or (bias is None and a["bias"] is not None) or _rank(a["input"]) != weight.dim():
        return None
    if "conv_transpose" in str(node.target) or a.get("transposed"):
        module = _layers.conv_transpose(
            weight, bias, a["stride"], a["padding"], a["output_padding"], a["groups"], a["dilation"]
        )
    else:
        module = _layers.conv(weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])
    return _Layer(module, a["input"], lift.name(a["weight"]))


def _linear(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight, bias = lift.constant(a["weight"]), lift.constant(a["bias"])
    if weight is None or weight.dim() != 2 or (bias is None and a["bias"] is not None):
        return None
    return _Layer(_layers.linear(weight, bias), a["input"], lift.name(a["weight"]))


def _product(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    """``mm``, ``matmul`` and ``addmm`` with a constant on the right."""
    left, right = (a["mat1"], a["mat2"]) if "mat1" in a else (a["self"], a.get("mat2", a.get("other")))
    weight, bias = lift.constant(right), None
    if weight is None or weight.dim() != 2:
        return None
    if "mat1" in a:
        bias = lift.constant(a["self"])
        if bias is None or bias.shape != weight.shape[1:] or a["alpha"] != 1 or a["beta"] != 1:
            return None
    return _Layer(_layers.linear(weight.t(), bias), left, lift.name(right))


def _batch_norm(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    if a.get("training"):
        raise Unsupported(f"{node.name}: {TRAINING}, with batch statistics", EVAL)
    mean, variance = lift.constant(a["running_mean"]), lift.constant(a["running_var"])
    if mean is None or variance is None:
        return None
    weight, bias = lift.constant(a["weight"]), lift.constant(a["bias"])
    module = _layers.batch_norm(_rank(a["input"]), weight, bias, mean, variance, a["eps"])
    return _Layer(module, a["input"], lift.name(a["running_mean"]))


def _layer_norm(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight, bias = lift.constant(a["weight"]), lift.constant(a["bias"])
    if weight is None:
        return None
    return _Layer(_layers.layer_norm(a["normalized_shape"], weight, bias, a["eps"]), a["input"], lift.name(a["weight"]))


def _rms_norm(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight = lift.constant(a["weight"])
    if weight is None:
        return None
    return _Layer(_layers.rms_norm(a["normalized_shape"], weight, a["eps"]), a["input"], lift.name(a["weight"]))


def _group_norm(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight, bias = lift.constant(a["weight"]), lift.constant(a["bias"])
    if weight is None:
        return None
    groups = a["num_groups"] if "num_groups" in a else a["group"]
    return _Layer(_layers.group_norm(groups, weight, bias, a["eps"]), a["input"], lift.name(a["weight"]))


def _instance_norm(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight, bias = lift.constant(a["weight"]), lift.constant(a["bias"])
    if weight is None or not a["use_input_stats"]:
        return None
    return _Layer(_layers.instance_norm(_rank(a["input"]), weight, bias, a["eps"]), a["input"], lift.name(a["weight"]))


def _prelu(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight = lift.constant(a["weight"])
    return None if weight is None else _Layer(_layers.prelu(weight), a["self"], lift.name(a["weight"]))


def _embedding(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    weight = lift.constant(a["weight"])
    return None if weight is None else _Layer(_layers.embedding(weight), a["indices"], lift.name(a["weight"]))


def _dropout(lift: _Lift, node: fx.Node, a: dict[str, Any]) -> fx.Node:
    if a["train"] and a["p"] > 0:
        raise Unsupported(f"{node.name}: {TRAINING}, with dropout", EVAL)
    kept: fx.Node = a["input"]
    return kept


RULES: dict[Any, Callable[[_Lift, fx.Node, dict[str, Any]], _Layer | fx.Node | None]] = {
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.conv_transpose1d.default: _conv,
    aten.conv_transpose2d.input: _conv,
    aten.conv_transpose3d.input: _conv,
    aten.convolution.default: _conv,
    aten.linear.default: _linear,
    aten.addmm.default: _product,
    aten.mm.default: _product,
    aten.matmul.default: _product,
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.native_group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.prelu.default: _prelu,
    aten.embedding.default: _embedding,
    aten.dropout.default: _dropout,
    aten.dropout_.default: _dropout,
    aten.feature_dropout.default: _dropout,
}


def _needs_rewriting(program: ExportedProgram) -> bool:
    """Whether some operator writes in place where that could be seen, or holds a sub-graph."""
    nodes = list(program.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return True
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        written = node.args[0] if node.args else None
        if _functional(node) is None or not isinstance(written, fx.Node) or _aliases(written):
            return True
        if any(order[user] > order[node] for user in written.users):
            return True
    return False


def _aliases(node: fx.Node) -> bool:
    """Whether the node's value may share memory with another one."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    views = any(result.alias_info is not None for result in schema.returns) and not schema.is_mutable
    # These give their input back where nothing has to be done, which their schema does not say.
    maybe = {aten.reshape, aten.contiguous, aten.flatten, aten.dropout, aten.to, aten.matmul, aten.unflatten}
    return views or node.target.overloadpacket in maybe


def _functional(node: fx.Node) -> Any:
    """``relu`` for ``relu_``: the operator that computes the same without writing in place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name = target._schema.name.partition("::")[2]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return getattr(packet, target._overloadname, None)
