"""What a recipe can name as a model and its weights, and what is said when it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgepack.errors import InputError, Unsupported
from edgepack.models import load

CODE = """
import torch
from torch import nn
import beside

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(3, width)
        self.bn = nn.BatchNorm1d(width)
    def forward(self, x):
        return self.bn(self.fc(x))

def small(width=4):
    return Net(width)

def double():
    return Net().double().train()

def broken():
    raise RuntimeError("no such luck")

def number():
    return 3

ready = Net()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "beside.py").write_text("VALUE = 1\n", encoding="utf-8")
    return tmp_path


def test_import_is_cheap() -> None:
    script = "import sys, edgepack.models; assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_file_package_and_instance(folder: Path) -> None:
    assert load("net.py:small", folder, options={"width": 6}).fc.out_features == 6
    assert not load("net.py:ready", folder).training
    module = load("net.py:double", folder)
    assert next(module.parameters()).dtype == torch.float32
    assert not module.training
    assert isinstance(load("torch.nn:Identity", folder), nn.Identity)
    assert str(folder) not in sys.path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.py:small", "none.py does not exist"),
        ("net.py:smal", "did you mean 'small'"),
        ("net.py:broken", "broken() failed: RuntimeError: no such luck"),
        ("net.py:number", "gave a int, not a torch.nn.Module"),
        ("nowhere.at.all:x", "no module 'nowhere.at.all'"),
        ("resnet20", "cannot tell what model 'resnet20' is"),
        ("missing.pt2", "missing.pt2 does not exist"),
        ("missing.onnx", "missing.onnx does not exist"),
        ("bad.py:x", "SyntaxError"),
    ],
)
def test_sources_that_do_not_work(folder: Path, source: str, message: str) -> None:
    (folder / "bad.py").write_text("def (", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(source, folder)
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


def test_an_unknown_option_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="no option 'widht'") as caught:
        load("net.py:small", folder, options={"widht": 3})
    assert "did you mean 'width'" in str(caught.value)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_weights_however_they_were_saved(folder: Path, nest: str | None, prefix: str) -> None:
    state = {prefix + key: value for key, value in load("net.py:ready", folder).state_dict().items()}
    content: Any = {"epoch": 3, nest: state} if nest else state
    torch.save(content, folder / "weights.pth")
    loaded = load("net.py:small", folder, "weights.pth")
    torch.testing.assert_close(loaded.fc.weight, state[f"{prefix}fc.weight"])


def test_safetensors_without_batch_counters(folder: Path) -> None:
    state = {k: v for k, v in load("net.py:ready", folder).state_dict().items() if "num_batches" not in k}
    save_file(state, folder / "weights.safetensors")
    torch.testing.assert_close(load("net.py:small", folder, "weights.safetensors").fc.bias, state["fc.bias"])


def test_keys_and_shapes_that_do_not_match_are_shown(folder: Path) -> None:
    state = load("net.py:ready", folder).state_dict()
    state["fc.weigth"] = state.pop("fc.weight")
    state["bn.bias"] = torch.zeros(9)
    save_file(state, folder / "weights.safetensors")
    with pytest.raises(InputError) as caught:
        load("net.py:small", folder, "weights.safetensors")
    text = str(caught.value)
    assert "1 missing: fc.weight" in text
    assert "1 unexpected: fc.weigth ('fc.weigth': did you mean 'fc.weight'?)" in text
    assert "bn.bias is (9,) in the file, (4,) in the model" in text


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_weights_does_not_run(folder: Path, legacy: bool) -> None:
    canary = folder / "canary"
    torch.save({"a": Evil(canary)}, folder / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="more than tensors") as caught:
        load("net.py:small", folder, "evil.pth")
    assert caught.value.exit_status == 2
    assert not canary.exists()


def test_damaged_and_odd_weights(folder: Path) -> None:
    state = load("net.py:ready", folder).state_dict()
    torch.save(state, folder / "short.pth")
    save_file(state, folder / "short.safetensors")
    for name in ("short.pth", "short.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=f"{name} is damaged"):
            load("net.py:small", folder, name)
    torch.save([1, 2], folder / "list.pth")
    (folder / "empty.pth").write_bytes(b"")
    for name, message in (("list.pth", "holds a list"), ("empty.pth", "damaged"), ("no.pth", "do not exist")):
        with pytest.raises(InputError, match=message):
            load("net.py:small", folder, name)
    with pytest.raises(InputError, match="holds its own weights"):
        load("model.onnx", folder, "short.pth")


def test_a_program_loads_as_layers(folder: Path) -> None:
    original = load("net.py:ready", folder)
    x = torch.rand(2, 3)
    torch.export.save(
        torch.export.export(original, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), folder / "m.pt2"
    )
    module = load("m.pt2", folder)
    assert isinstance(module.fc, nn.Linear)
    torch.testing.assert_close(module(x), original(x))


ZOO = """
import sys, warnings
warnings.simplefilter("error")
from pathlib import Path
from edgepack.models import load, prepare_torchvision
prepare_torchvision(); prepare_torchvision()
here = Path("/")
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", ZOO + script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_torchvision_imports_beside_a_torch_it_does_not_match() -> None:
    script = """
import torch
assert hasattr(torch.ops.torchvision, "nms") or "torchvision" not in sys.modules
import torchvision.ops
module = load("torchvision:squeezenet1_1", here, options={"num_classes": 7})
assert module(torch.rand(1, 3, 64, 64)).shape == (1, 7)
heads = load("torchvision:ssdlite320_mobilenet_v3_large", here)
outputs = heads(torch.rand(1, 3, 320, 320))
print({name: tuple(value.shape) for name, value in outputs.items()})
"""
    if not installed("torchvision"):
        pytest.skip("torchvision is not installed: pip install torchvision")
    assert "'cls_logits': (1, 3234, 91)" in run(script)


def installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def test_timm_loads() -> None:
    if not (installed("timm") and installed("torchvision")):
        pytest.skip("timm is not installed: pip install 'edgepack[zoo]'")
    script = """
import torch
module = load("timm:test_resnet", here, options={"num_classes": 4})
assert module(torch.rand(1, 3, 96, 96)).shape == (1, 4)
"""
    run(script)


@pytest.mark.slow
def test_transformers_from_a_class_and_a_folder(tmp_path: Path) -> None:
    if not installed("transformers"):
        pytest.skip("transformers is not installed: pip install 'edgepack[zoo]'")
    script = """
import torch
folder = Path(sys.argv[1])
size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 16, "patch_size": 8}
first = load("transformers:ViTForImageClassification", folder, options=size)
first.save_pretrained(folder / "vit")
second = load("transformers:vit", folder)
x = torch.rand(1, 3, 16, 16)
torch.testing.assert_close(first(x).logits, second(x).logits)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ZOO + script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["hidden_size"] == 16


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    if not (installed("timm") and installed("torchvision")):
        pytest.skip("timm is not installed: pip install 'edgepack[zoo]'")
    for source, near in (("timm:resnet5", "resnet50"), ("torchvision:mobilenetv2", "mobilenet_v2")):
        with pytest.raises(InputError) as caught:
            load(source, tmp_path)
        assert near in str(caught.value) or "has no model" in str(caught.value)
    with pytest.raises(Unsupported, match="two-stage"):
        load("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", tmp_path)
