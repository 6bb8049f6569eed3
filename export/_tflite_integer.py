"""Plan → simulation for TFLite, and the simulation in the form that the converter takes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.contracts import Graph
from edgepack.errors import ParityError, require
from edgepack.export._alignment import aligned, word
from edgepack.export._dialects import _assign, _attribute, retrace
from edgepack.export._ends import skip_into
from edgepack.export._fixed_point import BITS as FIXED_BITS
from edgepack.export._fixed_point import FixedPoint, hold_sums, largest_sum
from edgepack.export._integer_dialect import (
    ADDITIONS,
    CONVOLUTIONS,
    LEAKY,
    MULTIPLICATIONS,
    RELUS,
    SILU,
    Dialect,
    narrow_depthwise,
)
from edgepack.export._probed import probed
from edgepack.export._qdq import quantized
from edgepack.export._tflite_copies import with_copies
from edgepack.export._tflite_dynamic import fixed, forms_of, rounding
from edgepack.export._tflite_ends import image_convolution, stays_float
from edgepack.export._tflite_file import constant
from edgepack.export._tflite_pools import with_halves, without_halves
from edgepack.export._tflite_quantized import WEIGHTED
from edgepack.export._tflite_ranges import harmonized, with_slopes
from edgepack.export._tflite_weights import Weight

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from edgepack.plan import Plan

MEANS = frozenset({"mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d"})
SIGMOIDS = frozenset({"sigmoid", "sigmoid_"})
TFLITE = Dialect(
    "s8s8-tflite",
    fused=RELUS,
    integer=ADDITIONS | LEAKY | MEANS | SIGMOIDS | MULTIPLICATIONS | {"cat"},
    every_output=CONVOLUTIONS | {"linear"},
    signed=True,
    split=SILU,
    slow=stays_float,
    spans=dict.fromkeys(SIGMOIDS, (0.0, 255 / 256)),  # steps of 1/256 from −128 on
)
WIDE = FixedPoint("s16s8-tflite", fused=RELUS, integer=ADDITIONS, every_output=CONVOLUTIONS | {"linear"}, signed=True,
                  bits=FIXED_BITS)  # fmt: skip
DIALECTS = (*TFLITE.forms.values(), WIDE.name)


def here() -> tuple[Dialect, list[str]]:
    """The dialect as the stored probe of this machine wants it, and the sentence that says so."""
    return probed(TFLITE, "tflite", "s8")


def lower_integers(graph: Graph, plan: Plan) -> Graph:
    """The simulation. Raises Unsupported where the plan asks for what TFLite lacks."""
    if any(entry.get("range", {}).get("bits") == FIXED_BITS for entry in plan.nodes.values()):
        simulation = quantized(graph, plan, WIDE)
        hold_sums(sums_of(simulation))
        return simulation
    graph, plan = with_copies(graph, plan)
    plan = harmonized(graph, plan)
    graph = with_slopes(graph, plan)
    module = graph.program.module(check_guards=False)
    names = aligned(module, plan)
    forms = forms_of(module, plan, names, TFLITE)
    dynamic = {name for name, form in forms.items() if form == "dynamic"}
    scaled = {name for node, name in names.items() if word(node) in MULTIPLICATIONS and len(node.all_input_nodes) < 2}
    nodes = {name: fixed(entry, forms.get(name)) for name, entry in plan.nodes.items()}
    nodes |= {name: {**nodes[name], "float": "one factor is a number"} for name in scaled}
    simulation = quantized(graph, replace(plan, nodes=nodes), here()[0])
    return with_halves(rounding(simulation, plan, dynamic, TFLITE.forms["dynamic"]) if dynamic else simulation)


def sums_of(simulation: Graph) -> dict[str, int]:
    """Weight → the largest sum of products that it can make of 16-bit values."""
    module = simulation.program.module(check_guards=False)
    sums = {}
    for node in module.graph.nodes:
        stored: list[Any] = [given for given in node.args[1:3] if "dequantize_per_channel" in str(_target(given))]
        if stored:
            weight, *bias = (_attribute(module, given.args[0]).numpy() for given in stored)
            name = str(stored[0].args[0].target).removesuffix("_integers")
            sums[name] = largest_sum(weight, bias[0] if bias else np.zeros(1))
    return sums


def float_weights(simulation: Graph) -> tuple[Graph, list[Weight]]:
    """The simulation with its integer weights and biases as floats on their grid, and the integers."""
    import torch

    module = simulation.program.module(check_guards=False)
    to_floats = torch.ops.quantized_decomposed.dequantize_per_channel.default
    without_halves(module)
    weights, forms = [], _forms(module)
    for node in list(module.graph.find_nodes(op="call_function", target=to_floats)):
        integers, scale = (_attribute(module, source) for source in node.args[:2])
        tall = scale.reshape(-1, *[1] * (integers.ndim - 1))
        name = str(node.args[0].target)
        if integers.dtype == torch.int8:
            found = Counter(forms[user] for user in node.users)
            weights += [Weight(name, integers.numpy(), scale.numpy(), *pair) for pair in found.items()]
        _assign(module, f"{name}_float", torch.nn.Parameter(integers.float() * tall, requires_grad=False))
        with module.graph.inserting_before(node):
            value = module.graph.get_attr(f"{name}_float")
        node.replace_all_uses_with(value)
    return replace(retrace(simulation, module), dialect=simulation.dialect), weights


def _forms(module: GraphModule) -> dict[Node, str]:
    """How operators read integer weights; those whose activations are rounded at run time read them as they are."""
    import torch

    to_floats = torch.ops.quantized_decomposed.dequantize_per_channel.default
    readers = [node for node in module.graph.nodes if len(node.args) > 1 and _target(node.args[1]) is to_floats]
    forms = {}
    for node in readers:
        source = node.args[0]
        behind = source if "dequantize_per_token" in str(source.target) else next(iter(source.all_input_nodes), source)
        if len(node.args) > 2 and _target(node.args[2]) is to_floats:
            forms[node] = "static"
        elif _target(behind) is torch.ops.quantized_decomposed.dequantize_per_token.default:
            forms[node] = "dynamic"
            rows = behind.args[0].args[0]
            node.update_arg(0, rows if behind is source else rows.args[0])
        else:
            forms[node] = "float"
    return forms


def _target(node: Any) -> Any:
    return getattr(node, "target", None)


def choices(simulation: Graph, weights: Sequence[Weight]) -> list[str]:
    """What the dialect does otherwise than the plan asks, as sentences."""
    static = sum(weight.readers for weight in weights if weight.form == "static")
    floating = [node for node in simulation.program.graph.nodes
                if word(node) == "conv2d" and node.args[1].op in ("get_attr", "placeholder")]  # fmt: skip
    image, narrow = (sum(map(kind, floating)) for kind in (image_convolution, narrow_depthwise))
    ends = sum(skip_into(node) is not None for node in floating)
    if simulation.dialect == WIDE.name:
        return [hold_sums(sums_of(simulation)), "16-bit activations: smaller, not faster; XNNPACK does not take them, "
                "TFLite's own operators do"]  # fmt: skip
    notes = here()[1] if simulation.dialect in DIALECTS else []
    if simulation.dialect == TFLITE.forms["dynamic"] and static:
        notes.append(
            f"{static} convolutions round what they read in ranges from calibration, which is faster than in ranges "
            "found at run time; linear layers find theirs at run time"
        )
    if simulation.dialect in DIALECTS and image:
        notes.append(f"{image} convolution{'s' * (image > 1)} with few channels of an image in float")
    if simulation.dialect in DIALECTS and narrow:
        notes.append(f"{narrow} depthwise convolution{'s' * (narrow > 1)} with few channels in float")
    if simulation.dialect in DIALECTS and ends:
        notes.append("the first and the last convolution and the sum that joins them in float, for the image's sake")
    return notes


def hold_integers(data: bytes, weights: Sequence[Weight]) -> None:
    """Every operator that was planned in integers reads the planned integers of the file.

    Raises:
        ParityError: some do not; says which.
    """
    schema = require("ai_edge_litert.schema_py_generated", "tflite")

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    found = Counter(_stored(schema, model))
    for weight in weights:
        key = (weight.form, _fingerprint(weight.integers))
        if found[key] < weight.readers:
            raise ParityError(
                f"{weight.name!r} is planned in integers ({weight.form}) for {weight.readers} operators, "
                f"{found[key]} of the file read it so"
            )
        found[key] -= weight.readers


def _stored(schema: Any, model: Any) -> Iterator[tuple[str, str]]:
    """How each operator of the file reads a weight of 8 or 4 bits, and the weight's fingerprint."""
    words = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    (main,) = model.subgraphs
    origins = {}
    for step in main.operators:
        code = model.operatorCodes[step.opcodeIndex]
        word = words[max(code.builtinCode, code.deprecatedBuiltinCode)]
        if word == "DEQUANTIZE":
            origins[int(step.outputs[0])] = int(step.inputs[0])
        if word not in WEIGHTED:
            continue
        read, place = (int(tensor) for tensor in step.inputs[:2])
        weight = main.tensors[origins.get(place, place)]
        if weight.type not in (schema.TensorType.INT8, schema.TensorType.INT4):
            continue
        integer = main.tensors[read].type in (schema.TensorType.INT8, schema.TensorType.INT16)
        form = "static" if integer else "float" if place in origins else "dynamic"
        yield form, _fingerprint(constant(schema, model, weight))


def _fingerprint(integers: Any) -> str:
    """The same for any order of axes and any signs of channels."""
    return hashlib.sha256(np.sort(np.abs(integers.astype(np.int16)), axis=None).tobytes()).hexdigest()
