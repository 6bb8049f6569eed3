"""Whole ONNX files: their layers and names, damage, weights beside them, and what PyTorch exports."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgepack.errors import InputError, Unsupported

onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
from _lifting import DYNAMIC, N, check, compare, random, write  # noqa: E402
from edgepack.models.onnx import lift_onnx  # noqa: E402

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def layers(lifted: Any) -> dict[str, str]:
    calls = lifted.graph.find_nodes(op="call_module")
    return {node.target: type(lifted.get_submodule(node.target)).__name__ for node in calls}


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


def export(module: nn.Module, example: Tensor, path: Path) -> None:
    """As PyTorch writes ONNX, with a dynamic batch."""
    shapes = ({0: DYNAMIC},)
    torch.onnx.export(module, (example,), path, dynamo=True, external_data=False, dynamic_shapes=shapes, verbose=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_pytorch_exports(tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed: pip install 'edgepack[onnx]'")
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    export(Residual().eval(), torch.rand(2, 3, 4, 4), path)
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
    export(module, torch.rand(2, 3, 224, 224), path)
    check(path, (3, 224, 224))
