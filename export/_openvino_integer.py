"""Hold integer OpenVINO files against what was planned: stored dtypes, and what the CPU engine makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import ParityError
from edgepack.export._ends import skip_sum
from edgepack.export._integer_dialect import ADDITIONS, CONVOLUTIONS, LEAKY, NORMS, PRODUCTS, RELUS, Dialect
from edgepack.export._qdq import planned_integer

if TYPE_CHECKING:
    from edgepack.contracts import Graph

OPENVINO = Dialect(
    "u8s8-openvino",
    grouped=True,
    fused=RELUS | LEAKY,
    integer=frozenset(),
    both=NORMS,
    float_bias=CONVOLUTIONS | PRODUCTS,
    slow=lambda node: skip_sum(node) is not None,
    detour=ADDITIONS,  # resnet50 takes 3 % longer where shortcuts pass floats to the sum
    first=True,
    early=frozenset({"max_pool2d"}),
    narrow=True,
)
KINDS = {"conv": ("Convolution", "GroupConvolution"), "linear": ("MatMul",)}
RUN = {"conv": ("Convolution",), "linear": ("FullyConnected", "MatMul")}
INTEGER = ("i8", "u8")


def hold_integers(ov: Any, path: Path, simulation: Graph) -> list[str]:
    """Every operator planned in integers reads a weight of 8 or 4 bits; what the engine here runs, as a sentence.

    Raises:
        ParityError: the file holds fewer; says how many.
    """
    planned = planned_integer(simulation)
    model = ov.Core().read_model(path)
    found = Counter(node.get_type_name() for node in model.get_ops() if _reads_integers(node))
    _compare(planned, found, KINDS, "in the file read int8 weights")
    if simulation.dialect == OPENVINO.forms["float"]:
        return []
    return [_run(ov, model)]


def drop_zeros(model: Any) -> None:
    """Take out what subtracts a zero-point of 0 from a weight.

    Equal zero-points are one constant, and the engine leaves weights that share one in float.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Subtract" and _nothing(node.input_value(1).get_node()):
            node.output(0).replace(node.input_value(0))


def set_group(model: Any, size: int) -> None:
    """How many values of a row layers with 8-bit weights round alike; 0 to compute in float.

    Left alone, the engine takes 32.
    """
    model.set_rt_info(str(size), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


def _nothing(node: Any) -> bool:
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and not node.data.any()


def _run(ov: Any, model: Any) -> str:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    nodes = ov.Core().compile_model(model, "CPU", settings).get_runtime_model().get_ops()
    facts = [node.get_rt_info() for node in nodes]
    found = Counter(
        str(fact["layerType"].astype(str)) for fact in facts if str(fact["runtimePrecision"].astype(str)) in INTEGER
    )
    counted = ", ".join(f"{found[kind]} {kind}" for kinds in RUN.values() for kind in kinds if found[kind])
    return f"OpenVINO {ov.__version__.partition('-')[0]} runs {counted or 'nothing'} in 8 bits here"


def _compare(planned: Counter[str], found: Counter[str], kinds: Mapping[str, tuple[str, ...]], where: str) -> None:
    for kind, types in kinds.items():
        wanted = sum(count for word, count in planned.items() if word.startswith(kind))
        have = sum(found[name] for name in types)
        if have < wanted:
            raise ParityError(f"{have} of {wanted} planned {kind} operators {where}")


def _reads_integers(node: Any) -> bool:
    """Whether a chain of constants, conversions and scales behind the second input starts from 8 or 4 bits."""
    if node.get_input_size() < 2:
        return False
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose", "FakeQuantize"):
        source = source.input_value(0).get_node()
    return source.get_type_name() == "Constant" and source.get_element_type().to_string() in (
        "i4",
        "i8",
        "u8",
        "int8_t",
    )
