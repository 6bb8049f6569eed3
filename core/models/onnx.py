"""Read an ONNX file as a module of standard layers. Our own converter, a table of operators."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor, fx

import onnx
from edgepack.errors import InputError, Unsupported
from edgepack.models import _onnx_layers, _onnx_math, _onnx_shapes
from edgepack.models._builder import clean_name, layer_name
from edgepack.models._onnx_scope import Node, Scope
from onnx import inliner

RULES = {**_onnx_math.RULES, **_onnx_shapes.RULES, **_onnx_layers.RULES}
QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"}
)
SCOPES = "pkg.torch.onnx.name_scopes"
PARAMETER = re.compile(r"([A-Za-z_]\w*\.)?(\w+\.)*(\w+_)?(weight|bias)")


def lift_onnx(path: Path) -> fx.GraphModule:
    """Layers where weights are constant (nn.Conv2d, nn.Linear …), ATen operators elsewhere.

    Layers are named by their weights where the file has PyTorch's names, else by their nodes. Dynamic axes stay
    dynamic. ``meta["input_names"]`` and ``meta["output_names"]`` keep the file's names.

    Raises:
        InputError: the file is missing, damaged, or refers to data outside its folder.
        Unsupported: an operator has no rule, with its node's name.
    """
    model = _read(path)
    conversion = _Conversion(model)
    try:
        return conversion.run()
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        where = conversion.place or "its inputs"
        text = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be converted: {where}: {type(error).__name__}: {text}") from error


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged or no ONNX file") from error
    if not model.graph.node and not model.graph.output:
        raise InputError(f"{path} is damaged or no ONNX file: it holds no graph")
    _read_external(model, path)
    return inliner.inline_local_functions(model) if model.functions else model


def _read_external(model: onnx.ModelProto, path: Path) -> None:
    """Load weights that lie in files beside the model, and only there."""
    folder = path.parent.resolve()
    found = False
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        found = True
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if len(places) != 1 or "\\" in places[0] or not (folder / places[0]).resolve().is_relative_to(folder):
            raise InputError(f"{path}: tensor {tensor.name!r} refers to a file outside the model's folder: {places}")
        if not (folder / places[0]).is_file():
            raise InputError(f"{path}: its weights {places[0]!r} do not lie beside it")
    if found:
        try:
            onnx.external_data_helper.load_external_data_for_model(model, str(folder))
        except (ValueError, OSError, onnx.checker.ValidationError) as error:
            raise InputError(f"{path}: its external weights are damaged: {str(error).partition(chr(10))[0]}") from error


class _Conversion:
    """One pass over the nodes.

    Attributes:
        place: the node being converted, for messages.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
        self.scope = Scope()
        self.values: dict[str, Any] = {"": None}
        self.place = ""
        self.uses = Counter(name for node in self.graph.node for name in node.input)
        self.uses.update(output.name for output in self.graph.output)
        self.fused: dict[str, str] = {}
        self.layers: set[str] = set()

    def run(self) -> fx.GraphModule:
        for tensor in self.graph.initializer:
            self.values[tensor.name] = _tensor(tensor)
            self.scope.names[id(self.values[tensor.name])] = tensor.name
        inputs = [item for item in self.graph.input if item.name not in self.values]
        self._find_biases()
        for item in inputs:
            self._input(item)
        for position, proto in enumerate(self.graph.node):
            self._convert(proto, position)
        results = [self.scope.tensor(self.values[output.name]) for output in self.graph.output]
        nodes = [self.scope.embed(result) if isinstance(result, Tensor) else result for result in results]
        module = self.scope.builder.finish(nodes[0] if len(nodes) == 1 else tuple(nodes))
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        module.meta["input_names"] = tuple(item.name for item in inputs)
        module.meta["output_names"] = tuple(output.name for output in self.graph.output)
        return module

    def _input(self, item: onnx.ValueInfoProto) -> None:
        self.place = f"input {item.name!r}"
        tensor = item.type.tensor_type
        if not item.type.HasField("tensor_type") or not tensor.HasField("shape"):
            raise Unsupported(f"ONNX input {item.name!r} is no tensor with a known number of axes")
        shape = [
            axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in tensor.shape.dim
        ]
        self.values[item.name] = self.scope.input(item.name, _onnx_shapes.DTYPES[tensor.elem_type], shape)

    def _find_biases(self) -> None:
        """MatMul by a constant, then Add of a constant vector, is one linear layer."""
        producers = {name: node for node in self.graph.node for name in node.output}
        for node in self.graph.node:
            if node.op_type != "Add" or len(node.input) != 2:
                continue
            for product, bias in (node.input, reversed(node.input)):
                source = producers.get(product)
                if source is not None and self.uses[product] == 1 and self._is_linear(source, self.values.get(bias)):
                    self.fused[product] = bias
                    self.fused[node.output[0]] = product

    def _is_linear(self, source: onnx.NodeProto, bias: Any) -> bool:
        if source.op_type != "MatMul" or source.input[0] in self.values or not isinstance(bias, Tensor):
            return False
        weight = self.values.get(source.input[1])
        return isinstance(weight, Tensor) and weight.dim() == 2 and bias.shape == weight.shape[1:]

    def _convert(self, proto: onnx.NodeProto, position: int) -> None:
        domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}::"
        operator = domain + proto.op_type
        name = proto.name or f"{proto.op_type}_{position}"
        self.place = f"{operator} (node {name!r})"
        if proto.op_type == "Add" and proto.output[0] in self.fused:
            self.values[proto.output[0]] = self.values[self.fused[proto.output[0]]]
            return
        rule = RULES.get(operator)
        if rule is None:
            hint = "give the float model instead" if proto.op_type in QUANTIZED else None
            raise Unsupported(f"ONNX operator {operator} (node {name!r}) has no conversion", hint)
        attributes = {a.name: _attribute(a) for a in proto.attribute}
        if proto.op_type == "MatMul" and proto.output[0] in self.fused:
            attributes["fused_bias"] = self.values[self.fused[proto.output[0]]]
        used = sum(1 for output in proto.output if output)
        count = len(proto.output) if proto.op_type == "Split" else used
        layered = operator in _onnx_layers.RULES and len(proto.input) > 1
        label = self._layer_name(proto, name) if layered else name
        node = Node(operator, name, label, attributes, count, self.opset)
        results = rule(self.scope, node, *(self.values[item] for item in proto.input))
        results = results if isinstance(results, tuple) and not hasattr(results, "_fields") else (results,)
        for output, result in zip(proto.output, results, strict=False):
            self.values[output] = result

    def _layer_name(self, proto: onnx.NodeProto, name: str) -> str:
        """That of its weights, else the module the exporter says it came from, else the node's own name."""
        inputs = (*proto.input[1:3], self.fused.get(proto.output[0], ""))
        names = [layer_name(item) for item in inputs if PARAMETER.fullmatch(item)]
        for entry in proto.metadata_props:
            if entry.key == SCOPES and len(scopes := re.findall(r"'([^']*)'", entry.value)) > 1 and scopes[-2]:
                names.append(scopes[-2])
        # Exporters store equal weights once, so the first name may be that of another layer.
        chosen = next((item for item in names if item not in self.layers), names[0] if names else name)
        self.layers.add(chosen)
        return clean_name(chosen)


def _tensor(proto: onnx.TensorProto) -> Tensor:
    if proto.data_type not in _onnx_shapes.DTYPES:
        raise Unsupported(
            f"ONNX tensor {proto.name!r} has element type {proto.data_type}", "give the float model instead"
        )
    return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())


def _attribute(proto: onnx.AttributeProto) -> Any:
    if proto.type == onnx.AttributeProto.TENSOR:
        return _tensor(proto.t)
    value = onnx.helper.get_attribute_value(proto)
    return list(value) if isinstance(value, (list, tuple)) or hasattr(value, "add") else value
