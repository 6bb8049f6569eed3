"""Hold an integer ONNX file against what was planned: stored dtypes, and what ONNX Runtime makes of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import MissingExtra, ParityError, require
from edgepack.export._alignment import word
from edgepack.export._ends import IMAGE, channels, skip_sum
from edgepack.export._integer_dialect import (
    ADDITIONS,
    CONVOLUTIONS,
    LEAKY,
    NORMS,
    RELUS,
    SILU,
    Dialect,
    narrow_depthwise,
)
from edgepack.export._probed import probed
from edgepack.export._qdq import planned_integer

if TYPE_CHECKING:
    from torch.fx import Node

    import onnx
    from edgepack.contracts import Graph

ROUNDINGS = frozenset({"quantized_decomposed"})


def _slow(node: Node) -> bool:
    """Whether a convolution reads an image and gives few channels, is a narrow depthwise one, or ends a skip.

    The integer kernels want channels last and unfold patches: the image is turned around first, and three channels
    fill no vector. Measured on x86 with one thread: such first layers take 1.2 to 2.5 times as long in integers as in
    float, those of 64 channels two thirds. But a float convolution leaves channels first, and where a sum reads that,
    all sums behind it stay so: ONNX Runtime then turns the values around before and after every layer.
    """
    if narrow_depthwise(node) or skip_sum(node) is not None:
        return True
    rows, columns = channels(node)
    return 0 < columns <= IMAGE and rows <= 32 and not _summed(node)


def _summed(node: Node) -> bool:
    """Whether a sum reads a result, at once or behind a ReLU and its rounding."""
    return any(word(user) in ADDITIONS or (word(user) in RELUS | ROUNDINGS and _summed(user)) for user in node.users)


ONNX_RUNTIME = Dialect(
    "u8s8",
    fused=RELUS,
    integer=ADDITIONS | LEAKY | {"cat", "sigmoid", "sigmoid_", "mul", "mul_", "mean"},
    same_step=LEAKY,
    every_output=CONVOLUTIONS,
    split=SILU,
    slow=_slow,
    grouped=True,
    narrow=True,
    twins=True,  # see _slow: the sums behind a float one have channels first
    both=NORMS,
    float_bias=frozenset({"matmul"}),  # an int32 one would be made float in every run
    dynamic=frozenset({"linear"}),
)
# The kernels of 64-bit ARM multiply signed by signed integers. Images are turned around and unfolded there too; nobody
# measured what that costs, but in float these layers bring MobileNetV1-0.25 from 15.8 to 21.4 dB.
ONNX_RUNTIME_ARM = replace(ONNX_RUNTIME, name="s8s8-arm", signed=True)
TARGETS = {"x86": ONNX_RUNTIME, "arm": ONNX_RUNTIME_ARM}


def here(target: str = "x86") -> tuple[Dialect, list[str]]:
    """The dialect as the stored probe of this machine wants it, and the sentence that says so.

    Operators it takes off the list still run in integers where all around them is: ONNX Runtime sees to that. A probe
    of this machine says nothing of ARM.
    """
    return (TARGETS[target], []) if target == "arm" else probed(ONNX_RUNTIME, "onnxruntime", "u8")


KERNELS = {
    "conv": ("QLinearConv", "ConvInteger"),
    "linear": ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"),
}
FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def name_pools(graph: onnx.GraphProto) -> None:
    """Write means over height and width as the pooling that ONNX Runtime has in integers, in place."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    named = set()
    for node in graph.node:
        kept = all(attribute.i == 1 for attribute in node.attribute if attribute.name == "keepdims")
        if node.op_type != "ReduceMean" or not kept or len(node.input) < 2 or node.input[1] not in constants:
            continue
        axes = sorted(numpy_helper.to_array(constants[node.input[1]]).tolist())
        if axes in ([2, 3], [-2, -1]):
            node.op_type = "GlobalAveragePool"
            named.add(node.input[1])
            del node.input[1:], node.attribute[:]
    for name in named - {name for node in graph.node for name in node.input}:
        graph.initializer.remove(constants[name])


def hold_integers(path: Path, simulation: Graph) -> None:
    """Every operator that was planned in integers reads an int8 (or packed int4) weight of the file.

    Raises:
        ParityError: the file holds fewer; says how many.
    """
    import onnx
    from onnx import TensorProto

    model = onnx.load_model_from_string(path.read_bytes())
    kinds = (TensorProto.INT8, TensorProto.INT4)
    integers = {tensor.name for tensor in model.graph.initializer if tensor.data_type in kinds}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = sum(
        _reads_integers(node, makers, integers)
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul", "MatMulInteger")
    )
    planned = sum(planned_integer(simulation).values())
    if found < planned:
        raise ParityError(f"the file has {found} operators with int8 weights, {planned} were planned")


def _reads_integers(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], integers: set[str]) -> bool:
    name = node.input[1]
    while name in makers and makers[name].op_type in ("Transpose", "Reshape", "DequantizeLinear", "Mul", "Cast"):
        name = makers[name].input[0]
    return name in integers


def fused(path: Path, simulation: Graph) -> list[str]:
    """What ONNX Runtime computes in integers after its own optimization, as a sentence.

    Raises:
        ParityError: an operator that was planned in integers is computed in float.
    """
    try:
        ort = require("onnxruntime", "onnx-run")
    except MissingExtra:
        return []
    arm = simulation.dialect in ONNX_RUNTIME_ARM.forms.values()
    operators = _optimized(ort, path, signed=arm)
    if simulation.dialect == ONNX_RUNTIME.forms["float"]:
        return _loaded(ort, operators)
    planned = planned_integer(simulation)
    kinds = ("linear",) if simulation.dialect == ONNX_RUNTIME.forms["dynamic"] else tuple(KERNELS)
    for kind in kinds:
        kernels = KERNELS[kind]
        wanted = sum(count for word, count in planned.items() if word.startswith(kind))
        found = sum(operators[kernel] for kernel in kernels)
        if found < wanted:
            left = ", ".join(f"{operators[name]} {name}" for name in FLOAT_KERNELS if operators[name])
            raise ParityError(
                f"ONNX Runtime {ort.__version__} computes {found} of {wanted} planned {kind} operators in integers "
                f"(left: {left or 'none by that name'})"
            )
    integer = ", ".join(f"{count} {name}" for name, count in sorted(operators.items()) if _is_integer(name))
    slow = sum(_slow(node) for node in simulation.program.graph.nodes if node.op == "call_function")
    faster = f"; in float, where they serve better: {slow} Conv" if slow else ""
    return [f"ONNX Runtime {ort.__version__} runs {integer}{faster}"]


def _loaded(ort: Any, operators: Counter[str]) -> list[str]:
    left = operators["DequantizeLinear"] + operators["Cast"]
    if left:
        raise ParityError(f"ONNX Runtime {ort.__version__} makes {left} weights float in every run, not once")
    return [f"ONNX Runtime {ort.__version__} makes the weights float when it loads the file and computes in float"]


def _is_integer(name: str) -> bool:
    return name.startswith("QLinear") or any(name in kernels for kernels in KERNELS.values())


def _optimized(ort: Any, path: Path, signed: bool) -> Counter[str]:
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if signed:  # as ONNX Runtime does by itself on ARM
            options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)
