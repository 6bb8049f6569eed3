"""TensorRT's rules, each with a graph that breaks it."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[tensorrt]'")

from edgepack.errors import Unsupported  # noqa: E402
from edgepack.export._tensorrt_form import cast_first  # noqa: E402
from edgepack.export._tensorrt_rules import check_rules  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
INT8, UINT8, INT32, INT64, BOOL = (
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)


def model(nodes: list, inputs: dict, outputs: dict, constants: dict | None = None, opset: int = 20):
    """A model with named values: inputs name → (type, shape), outputs name → type, constants name → array."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("own", 1)])


def node(operator: str, inputs: str, outputs: str = "y", **attributes):
    return helper.make_node(operator, inputs.split(), outputs.split(), name=f"the_{operator}", **attributes)


X = {"x": (FLOAT, ["n", 3, 8, 8])}
Y = {"y": FLOAT}
KERNEL = {"w": np.ones((4, 3, 3, 3), np.float32)}
WEIGHTS = np.ones((4, 3, 3, 3), np.int8)
ONE, ZERO = np.float32([1.0]), np.int8([0])


def quantized(scale, zero=None, axis: int | None = None, weights=WEIGHTS):
    """Conv whose int8 weights pass DequantizeLinear."""
    options = {} if axis is None else {"axis": axis}
    constants = {"q": weights, "s": np.float32(scale)} | ({} if zero is None else {"z": zero})
    dequantize = node("DequantizeLinear", "q s" if zero is None else "q s z", "w", **options)
    return [dequantize, node("Conv", "x w")], X, Y, constants


OFFENDERS = {
    "unknown operator": (([node("Det", "x")], X, Y), "Det 'the_Det'.*parser does not have it", "replace the operator"),
    "own domain": (([node("Mine", "x", domain="own")], X, Y), "no operators of 'own'", "replace the operator"),
    "indices of data": (([node("NonZero", "x")], X, {"y": INT64}), "NonZero 'the_NonZero'", "depends on data"),
    "random": (([node("RandomNormalLike", "x")], X, Y), "RandomNormalLike", "an input"),
    "integer matmul": (
        ([node("MatMulInteger", "a b")], {"a": (INT8, [2, 2]), "b": (INT8, [2, 2])}, {"y": INT32}),
        "MatMulInteger",
        "zero point of 0",
    ),
    "control flow": (
        (
            [
                node(
                    "If",
                    "c",
                    then_branch=helper.make_graph(
                        [node("Neg", "x", "t")], "a", [], [helper.make_tensor_value_info("t", FLOAT, None)]
                    ),
                    else_branch=helper.make_graph(
                        [node("Abs", "x", "e")], "b", [], [helper.make_tensor_value_info("e", FLOAT, None)]
                    ),
                )
            ],
            X | {"c": (BOOL, [])},
            Y,
        ),
        "If 'the_If'",
        "compute every branch",
    ),
    "integer matrices": (
        ([node("MatMul", "a b")], {"a": (INT32, [2, 2]), "b": (INT32, [2, 2])}, {"y": INT32}),
        "computes in int32; TensorRT has it for float, float16, bfloat16",
        "cast to float32",
    ),
    "double": (([node("Add", "a a")], {"a": (DOUBLE, [2])}, {"y": DOUBLE}), "computes in double", "cast to float32"),
    "stored double": (
        ([node("Mul", "x d")], X, Y, {"d": np.float64([2.0])}),
        "constant 'd' is double",
        "cast to float32",
    ),
    "cast to double": (([node("Cast", "x", to=DOUBLE)], X, {"y": DOUBLE}), "casts to double", "cast to float32"),
    "uint8 read": (
        ([node("Transpose", "p", perm=[0, 2, 1])], {"p": (UINT8, [1, 2, 3])}, {"y": UINT8}),
        "reads the uint8 input 'p', which only Cast may",
        "cast to float32 first",
    ),
    "uint8 inside": (
        ([node("Cast", "x", "u", to=UINT8), node("Cast", "u", to=FLOAT)], X, Y),
        "uint8 is for inputs and outputs only",
        "cast to int32",
    ),
    "int8 inside": (
        ([node("Relu", "p")], {"p": (INT8, [4])}, {"y": INT8}, None),
        "computes in int8|may stand only between",
        "",
    ),
    "int8 beside": (
        ([node("Cast", "x", "i", to=INT8), node("Cast", "i", to=FLOAT)], X, Y),
        "int8 tensors may stand only between QuantizeLinear and DequantizeLinear",
        "quantize",
    ),
    "beyond int32": (
        ([node("Add", "i big")], {"i": (INT64, [1])}, {"y": INT64}, {"big": np.int64([2**31])}),
        "constant 'big' is beyond int32",
        "smaller values",
    ),
    "unknown rank": (
        ([node("Reshape", "x s", "r"), node("Neg", "r")], X | {"s": (INT64, None)}, Y),
        "number of axes of '.*' is not known",
        "fixed number of axes",
    ),
    "many axes": (
        ([node("Reshape", "x s", "r"), node("Neg", "r")], X, Y, {"s": np.int64([1, 1, 1, 1, 1, 1, -1, 8, 8])}),
        "has 9 axes, TensorRT at most 8",
        "fewer axes",
    ),
    "zero point": (quantized(ONE, np.int8([3])), "zero point is not a constant 0", "quantize symmetrically"),
    "unsigned": (
        quantized(ONE, np.uint8([0]), weights=WEIGHTS.astype(np.uint8)),
        "constant 'q' is uint8|int8 only",
        "",
    ),
    "unsigned activations": (
        (
            [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")],
            X,
            Y,
            {"s": np.float32(1), "z": np.uint8(0)},
        ),
        "constant 'z' is uint8|int8 only",
        "",
    ),
    "negative scale": (quantized([-1.0]), "scales are not positive constants", "before the export"),
    "wrong axis": (quantized(np.ones(3), axis=1), "follow axis 1, not the output channels of Conv", "axis = 0"),
    "channels of activations": (
        (
            [node("QuantizeLinear", "x s", "q", axis=1, output_dtype=INT8), node("DequantizeLinear", "q s", axis=1)],
            X,
            Y,
            {"s": np.ones(3, np.float32)},
            21,
        ),
        "scales per channel of activations",
        "one scale per tensor",
    ),
    "dilated pooling": (
        ([node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2])], X, Y),
        "pools without dilation only",
        "dilated convolution",
    ),
    "indices of maxima": (
        ([node("MaxPool", "x", "y i", kernel_shape=[2, 2])], X, Y),
        "does not return the indices of the maxima",
        "Resize",
    ),
    "4-D convolution": (
        ([node("Conv", "x w")], {"x": (FLOAT, [1, 1, *[3] * 4])}, Y, {"w": np.ones((1, 1, 2, 2, 2, 2), np.float32)}),
        "has 4 spatial axes, TensorRT 1 to 3",
        "",
    ),
    "computed weights": (
        ([node("Conv", "x v")], X | {"v": (FLOAT, [4, 3, 3, 3])}, Y),
        "wants its weights constant",
        "before the export",
    ),
    "resize coordinates": (
        (
            [node("Resize", "x r s", mode="linear", coordinate_transformation_mode="tf_crop_and_resize")],
            X,
            Y,
            {"s": np.float32([1, 1, 2, 2]), "r": np.float32([0, 0, 0, 0, 1, 1, 1, 1])},
        ),
        "does not have the coordinates 'tf_crop_and_resize'",
        "half_pixel",
    ),
    "antialias": (
        (
            [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1)],
            X,
            Y,
            {"s": np.float32([1] * 4)},
        ),
        "does not antialias",
        "antialias = False",
    ),
    "top 4000": (
        ([node("TopK", "x k", "y i")], {"x": (FLOAT, [1, 5000])}, Y, {"k": np.int64([4000])}),
        "k is 4000, TensorRT takes at most 3840",
        "two steps",
    ),
    "top of data": (
        ([node("TopK", "x k", "y i")], {"x": (FLOAT, [1, 50]), "k": (INT64, [1])}, Y),
        "wants its k constant",
        "",
    ),
    "unsorted": (
        ([node("TopK", "x k", "y i", sorted=0)], {"x": (FLOAT, [1, 50])}, Y, {"k": np.int64([4])}),
        "sorts what it selects",
        "sorted = True",
    ),
    "axes of data": (
        ([node("ReduceSum", "x a")], X | {"a": (INT64, [1])}, Y),
        "wants its axes constant|number of axes",
        "",
    ),
    "sum along data": (([node("CumSum", "x a")], X | {"a": (INT64, [])}, Y), "wants its axis constant", ""),
    "training": (
        (
            [node("BatchNormalization", "x c c c c", "y m v", training_mode=1)],
            X,
            Y,
            {"c": np.ones(3, np.float32)},
        ),
        "is in training mode",
        "eval()",
    ),
    "scatter and add": (
        (
            [node("ScatterND", "x i u", reduction="add")],
            {"x": (FLOAT, [4]), "u": (FLOAT, [1])},
            Y,
            {"i": np.int64([[0]])},
        ),
        "scatters without reduction",
        "",
    ),
    "volumes sampled": (
        ([node("GridSample", "x g")], {"x": (FLOAT, [1, 1, 2, 2, 2]), "g": (FLOAT, [1, 2, 2, 2, 3])}, Y),
        "input has 5 axes",
        "",
    ),
    "mean of layer norm": (
        ([node("LayerNormalization", "x c", "y m", axis=-1)], X, Y, {"c": np.ones(8, np.float32)}),
        "has its first output only",
        "",
    ),
    "third norm": (([node("LpPool", "x", p=3, kernel_shape=[2, 2])], X, Y), "p is 3, TensorRT has 1 and 2", ""),
    "batch-first": (
        (
            [node("RNN", "x w r", layout=1, hidden_size=2)],
            {"x": (FLOAT, [1, 4, 3])},
            Y,
            {"w": np.ones((1, 2, 3), np.float32), "r": np.ones((1, 2, 2), np.float32)},
        ),
        "neither batch-first layout nor coupled gates",
        "layout = 0",
    ),
}


@pytest.mark.parametrize("name", OFFENDERS)
def test_an_offender_is_named_with_what_to_use_instead(name):
    made, sentence, instead = OFFENDERS[name]
    with pytest.raises(Unsupported, match=f"tensorrt: .*({sentence})") as caught:
        check_rules(model(*made))
    assert instead in (caught.value.hint or "")
    assert caught.value.exit_status == 7


ALLOWED = {
    "a convolution": ([node("Conv", "x w")], X, Y, KERNEL),
    "1-D": ([node("Conv", "x w")], {"x": (FLOAT, [1, 2, 9])}, Y, {"w": np.ones((1, 2, 3), np.float32)}),
    "3-D": ([node("Conv", "x w")], {"x": (FLOAT, [1, 1, 3, 3, 3])}, Y, {"w": np.ones((1, 1, 2, 2, 2), np.float32)}),
    "16-bit weights": (
        [node("Cast", "h", "w", to=FLOAT), node("Conv", "x w")],
        X,
        Y,
        {"h": np.ones((4, 3, 3, 3), np.float16)},
    ),
    "scales per channel": quantized(np.ones(4), np.zeros(4, np.int8), axis=0),
    "one scale": quantized(1.0),
    "pixels": ([node("Cast", "p", to=FLOAT)], {"p": (UINT8, ["n", 3])}, Y),
    "bytes out": ([node("Cast", "x", to=UINT8)], X, {"y": UINT8}),
    "a slice to the end": (
        [node("Slice", "x b e a")],
        X,
        Y,
        {"b": np.int64([0]), "e": np.int64([np.iinfo(np.int64).max]), "a": np.int64([1])},
    ),
    "a choice": ([node("Greater", "x t", "m"), node("Where", "m x t")], X, Y, {"t": np.float32([0.5])}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_what_tensorrt_takes_passes(name):
    check_rules(model(*ALLOWED[name]))


def test_a_size_that_depends_on_data_is_refused():
    made = model([node("Neg", "x")], {"x": (FLOAT, ["u0", 4])}, {})
    made.graph.output.append(helper.make_tensor_value_info("y", FLOAT, ["2*u0", 4]))
    with pytest.raises(Unsupported, match="size of output 'y' depends on data"):
        check_rules(made)


def test_cast_first_leaves_alone_what_it_would_change():
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=INT32)]
    made = model(nodes, {"x": (UINT8, ["n", 4])}, {"y": INT32})
    before = made.SerializeToString()
    cast_first(made.graph)
    assert made.SerializeToString() == before
