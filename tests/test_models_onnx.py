"""A lifted ONNX file computes what ONNX Runtime computes, keeps dynamic axes, and exports again."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgepack.errors import InputError, Unsupported

onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
from edgepack.models.onnx import lift_onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
DYNAMIC = torch.export.Dim.DYNAMIC
Shape = Sequence[int | str]


def write(
    path: Path,
    nodes: Sequence[Any],
    inputs: dict[str, Shape],
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def reference(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    results: list[np.ndarray[Any, Any]] = session.run(None, arrays)
    return results


def compare(path: Path, module: nn.Module, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    with torch.no_grad():
        results = module(*(torch.from_numpy(array) for array in arrays.values()))
    results = results if isinstance(results, tuple) else (results,)
    for ours, theirs in zip(results, reference(path, arrays), strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1e-6)


def check(path: Path, shape: Sequence[int], batches: Sequence[int] = (1, 3)) -> Any:
    """Parity for several batch sizes, directly and after another capture with a dynamic batch."""
    lifted = lift_onnx(path)
    (name,) = lifted.meta["input_names"]
    example = (torch.rand(2, *shape),)
    again = torch.export.export(lifted, example, dynamic_shapes=({0: DYNAMIC},), strict=False).module()
    for batch in batches:
        array = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
        compare(path, lifted, {name: array})
        compare(path, again, {name: array})
    return lifted


def layers(lifted: Any) -> dict[str, str]:
    calls = lifted.graph.find_nodes(op="call_module")
    return {node.target: type(lifted.get_submodule(node.target)).__name__ for node in calls}


def random(*shape: int) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(1).standard_normal(shape) * 0.5).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


N = helper.make_node
W45, B5, B4 = random(4, 5), random(5), random(4)
CASES: dict[str, tuple[list[Any], tuple[int, ...], dict[str, np.ndarray[Any, Any]]]] = {
    "conv, uneven pads": (
        [N("Conv", ["x", "w", "b"], ["y"], pads=[0, 0, 1, 1], strides=[2, 2])],
        (3, 8, 8),
        {"w": random(4, 3, 3, 3), "b": random(4)},
    ),
    "conv, same upper": (
        [N("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])],
        (3, 9, 8),
        {"w": random(4, 3, 3, 3)},
    ),
    "depthwise, dilated": (
        [N("Conv", ["x", "w"], ["y"], group=4, dilations=[2, 2], pads=[2, 2, 2, 2])],
        (4, 8, 8),
        {"w": random(4, 1, 3, 3)},
    ),
    "transposed conv": (
        [N("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1, 1, 0, 0], group=2)],
        (4, 5, 6),
        {"w": random(4, 3, 3, 3), "b": random(6)},
    ),
    "batch norm": (
        [N("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], epsilon=1e-3)],
        (4, 5, 5),
        {"s": random(4), "b": random(4), "m": random(4), "v": np.abs(random(4)) + 0.5},
    ),
    "gemm": (
        [N("Flatten", ["x"], ["f"]), N("Gemm", ["f", "w", "b"], ["y"], alpha=0.5, beta=2.0)],
        (2, 3, 2),
        {"w": random(12, 5), "b": random(5)},
    ),
    "linear": ([N("MatMul", ["x", "w"], ["m"]), N("Add", ["b", "m"], ["y"])], (3, 4), {"w": W45, "b": B5}),
    "matmul of data": ([N("Transpose", ["x"], ["t"], perm=[0, 2, 1]), N("MatMul", ["x", "t"], ["y"])], (3, 4), {}),
    "layer norm": (
        [N("LayerNormalization", ["x", "s", "b"], ["y"], axis=-1, epsilon=1e-6)],
        (3, 8),
        {"s": random(8), "b": random(8)},
    ),
    "instance norm": ([N("InstanceNormalization", ["x", "s", "b"], ["y"])], (4, 5, 5), {"s": B4, "b": B4}),
    "prelu": ([N("PRelu", ["x", "s"], ["y"])], (4, 5, 5), {"s": random(4, 1, 1)}),
    "average pool, pads not counted": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
        (2, 8, 8),
        {},
    ),
    "average pool, pads counted": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        (2, 7, 7),
        {},
    ),
    "average pool, even pads": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        (2, 7, 7),
        {},
    ),
    "max pool": (
        [N("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)],
        (2, 8, 8),
        {},
    ),
    "max pool, uneven pads": (
        [N("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1])],
        (2, 7, 7),
        {},
    ),
    "global pools": (
        [N("GlobalAveragePool", ["x"], ["a"]), N("GlobalMaxPool", ["x"], ["b"]), N("Sub", ["a", "b"], ["y"])],
        (2, 5, 6),
        {},
    ),
    "activations": (
        [
            N("LeakyRelu", ["x"], ["a"], alpha=0.05),
            N("HardSigmoid", ["a"], ["b"], alpha=1 / 6, beta=0.5),
            N("HardSwish", ["b"], ["c"]),
            N("Elu", ["c"], ["d"]),
            N("Softmax", ["d"], ["e"], axis=1),
            N("HardSigmoid", ["e"], ["f"]),
            N("Clip", ["f", "lo", "hi"], ["g"]),
            N("Erf", ["g"], ["h"]),
            N("Pow", ["h", "three"], ["y"]),
        ],
        (3, 4),
        {"lo": np.float32(0.1), "hi": np.float32(0.9), "three": np.float32(3)},
    ),
    "gelu": ([N("Gelu", ["x"], ["a"]), N("Gelu", ["a"], ["y"], approximate="tanh")], (3, 4), {}),
    "reductions": (
        [
            N("ReduceMean", ["x", "axes"], ["a"], keepdims=1),
            N("ReduceMax", ["x", "axes"], ["b"], keepdims=1),
            N("ReduceL2", ["x", "axes"], ["c"], keepdims=1),
            N("ReduceSum", ["x", "axes"], ["d"], keepdims=1),
            N("Sum", ["a", "b", "c", "d"], ["e"]),
            N("ReduceProd", ["e", "last"], ["y"], keepdims=0),
        ],
        (3, 4, 5),
        {"axes": ints(2, 3), "last": ints(1)},
    ),
    "shapes that fold": (
        [
            N("Shape", ["x"], ["s"]),
            N("Gather", ["s", "zero"], ["n"], axis=0),
            N("Unsqueeze", ["n", "axis"], ["n1"]),
            N("Concat", ["n1", "rest"], ["target"], axis=0),
            N("Reshape", ["x", "target"], ["r"]),
            N("Slice", ["s", "axis", "two"], ["n2"]),
            N("Concat", ["n2", "ones"], ["wide"], axis=0),
            N("Equal", ["wide", "minus"], ["eq"]),
            N("Where", ["eq", "fill", "wide"], ["shape"]),
            N("Expand", ["token", "shape"], ["t"]),
            N("Concat", ["t", "r"], ["y"], axis=1),
        ],
        (4, 3, 2),
        {
            "zero": np.int64(0),
            "axis": ints(0),
            "two": ints(1),
            "rest": ints(-1, 4),
            "ones": ints(1, 4),
            "minus": ints(-1, -1, -1),
            "fill": ints(1, 1, 1),
            "token": random(1, 1, 4),
        },
    ),
    "slices and pieces": (
        [
            N("Slice", ["x", "starts", "ends", "axes", "steps"], ["a"]),
            N("Split", ["a", "parts"], ["b", "c"], axis=1),
            N("Pad", ["c", "pads", "value"], ["d"]),
            N("Pad", ["d", "reflect"], ["e"], mode="reflect"),
            N("Gather", ["e", "order"], ["y"], axis=2),
            N("Squeeze", ["b", "one"], ["unused"]),
        ],
        (4, 8, 6),
        {
            "starts": ints(1, 0),
            "ends": ints(2**62, 8),
            "axes": ints(1, 2),
            "steps": ints(1, 2),
            "parts": ints(1, 2),
            "pads": ints(0, 0, 1, 0, 0, 1, 0, 2),
            "reflect": ints(0, 0, 1, 1, 0, 0, 1, 1),
            "value": np.float32(0.5),
            "order": ints(2, 0, -1),
            "one": ints(1),
        },
    ),
    "depth to space, both orders": (
        [
            N("DepthToSpace", ["x"], ["a"], blocksize=2, mode="CRD"),
            N("SpaceToDepth", ["a"], ["b"], blocksize=2),
            N("DepthToSpace", ["b"], ["y"], blocksize=2),
        ],
        (8, 3, 4),
        {},
    ),
    "resize, nearest": (
        [N("Resize", ["x", "", "scales"], ["y"], coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 3], np.float32)},
    ),
    "resize, nearest half pixel": (
        [N("Resize", ["x", "", "scales"], ["y"])],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize, linear": (
        [N("Resize", ["x", "", "scales"], ["y"], mode="linear")],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 1.5], np.float32)},
    ),
    "resize, cubic": (
        [N("Resize", ["x", "", "scales"], ["y"], mode="cubic")],
        (2, 4, 5),
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "top k": ([N("TopK", ["x", "k"], ["y", "i"], axis=-1)], (3, 8), {"k": ints(3)}),
    "einsum and where": (
        [
            N("Einsum", ["x", "x"], ["a"], equation="bij,bkj->bik"),
            N("Greater", ["a", "zero"], ["c"]),
            N("Where", ["c", "a", "zero"], ["y"]),
        ],
        (3, 4),
        {"zero": np.float32(0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str, tmp_path: Path) -> None:
    nodes, shape, constants = CASES[name]
    check(write(tmp_path / "m.onnx", nodes, {"x": ("n", *shape)}, constants, opset=20), shape)


def test_lstm(tmp_path: Path) -> None:
    constants = {"w": random(2, 12, 4), "r": random(2, 12, 3), "b": random(2, 24)}
    node = N("LSTM", ["x", "w", "r", "b"], ["y", "h", "c"], hidden_size=3, direction="bidirectional")
    path = write(tmp_path / "m.onnx", [node], {"x": ("t", 2, 4)}, constants, ("y", "h", "c"))
    compare(path, lift_onnx(path), {"x": random(5, 2, 4)})


def test_layers_and_names(tmp_path: Path) -> None:
    nodes = [
        N("Conv", ["image", "body.0.weight", "body.0.bias"], ["a"], name="n0"),
        N("Relu", ["a"], ["b"]),
        N("Conv", ["b", "onnx::Conv_7"], ["c"], name="/body/2/Conv"),
        N("GlobalAveragePool", ["c"], ["d"]),
        N("Flatten", ["d"], ["e"]),
        N("MatMul", ["e", "opaque"], ["f"]),
        N("Add", ["f", "head.bias"], ["scores:0"]),
    ]
    constants = {"body.0.weight": random(4, 3, 3, 3), "body.0.bias": random(4), "onnx::Conv_7": random(5, 4, 1, 1)}
    constants |= {"opaque": random(5, 2), "head.bias": random(2)}
    path = write(tmp_path / "m.onnx", nodes, {"image": ("n", 3, 6, 6)}, constants, ("scores:0",))
    lifted = check(path, (3, 6, 6))
    assert layers(lifted) == {"body.0": "Conv2d", "body.2.Conv": "Conv2d", "head": "Linear"}
    assert lifted.meta == {"input_names": ("image",), "output_names": ("scores:0",)}


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [N("NonZero", ["x"], ["y"], name="find")], {"x": (2, 3)})
    with pytest.raises(Unsupported, match=r"NonZero \(node 'find'\)") as caught:
        lift_onnx(path)
    assert caught.value.exit_status == 7
    path = write(tmp_path / "q.onnx", [N("QuantizeLinear", ["x", "s"], ["y"])], {"x": (2, 3)}, {"s": np.float32(1)})
    with pytest.raises(Unsupported, match="float model"):
        lift_onnx(path)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        lift_onnx(tmp_path / "none.onnx")
    path = write(tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"])], {"x": (1, 3, 5, 5)}, {"w": random(4, 3, 3, 3)})
    content = path.read_bytes()
    for damaged in (b"", b"not a model", content[: len(content) // 2], content[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"m\.onnx"):
            lift_onnx(path)


def external(path: Path, location: str) -> None:
    model = onnx.load(path)
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())


def test_external_weights_only_from_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    path = write(folder / "m.onnx", [N("Conv", ["x", "w"], ["y"])], {"x": ("n", 3, 5, 5)}, {"w": random(4, 3, 3, 3)})
    external(path, "weights.bin")
    check(path, (3, 5, 5))
    secret.write_bytes((folder / "weights.bin").read_bytes())
    (folder / "link.bin").symlink_to(secret)
    for location in ("../secret.bin", str(secret), "link.bin", "..\\secret.bin"):
        external(
            write(path, [N("Conv", ["x", "w"], ["y"])], {"x": ("n", 3, 5, 5)}, {"w": random(4, 3, 3, 3)}), location
        )
        with pytest.raises(InputError, match="outside the model's folder"):
            lift_onnx(path)
    (folder / "weights.bin").unlink()
    external(write(path, [N("Conv", ["x", "w"], ["y"])], {"x": ("n", 3, 5, 5)}, {"w": random(4, 3, 3, 3)}), "gone.bin")
    with pytest.raises(InputError, match=r"gone\.bin"):
        lift_onnx(path)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = y + torch.nn.functional.pad(x[:, :, :], (0, 0, 0, 0, 2, 3))
        y = self.attention(y.flatten(2).transpose(1, 2))
        z: Tensor = self.fc(y.mean(1))
        return z


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_pytorch_exports(tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed: pip install 'edgepack[onnx]'")
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    torch.onnx.export(
        Residual().eval(),
        (torch.rand(2, 3, 4, 4),),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: DYNAMIC},),
        verbose=False,
    )
    lifted = check(path, (3, 4, 4))
    assert {"conv1": "Conv2d", "fc": "Linear", "attention.linear1": "Linear"}.items() <= layers(lifted).items()


def test_imdn_at_several_sizes() -> None:
    path = SHARED / "imdn_x2.onnx"
    if not path.exists():
        pytest.skip("the shared trained networks are not on this machine")
    lifted = lift_onnx(path)
    assert layers(lifted)["IMDB3.cca.conv_du.2"] == "Conv2d"
    for shape in ((1, 3, 20, 31), (2, 3, 17, 24)):
        compare(path, lifted, {"input": np.random.default_rng(0).random(shape, dtype=np.float32)})


ZOO = [
    "torchvision:mobilenet_v2",
    "torchvision:resnet50",
    "torchvision:densenet121",
    "timm:deit_small_patch16_224",
    "timm:convnext_atto",
    "timm:efficientnet_b0",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ZOO)
def test_zoo(source: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("the networks are not installed: pip install 'edgepack[zoo]'")
    from edgepack.models import load

    torch.manual_seed(0)
    module, path = load(source, tmp_path), tmp_path / "m.onnx"
    torch.onnx.export(
        module,
        (torch.rand(2, 3, 224, 224),),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: DYNAMIC},),
        verbose=False,
    )
    check(path, (3, 224, 224))
