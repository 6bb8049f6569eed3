"""Known architectures: what goes is exact, and what stays says why. Random weights, statistics and biases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("torch_pruning", reason="pip install 'edgepack[prune]'")
from torch import nn  # noqa: E402

from _networks import ZOO, resnet20  # noqa: E402
from _pruning import gap, prune, rows, shaken  # noqa: E402
from edgepack import models, usercode  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


def torchvision(make: Callable[[Any], nn.Module]) -> nn.Module:
    models.prepare_torchvision()
    return make(pytest.importorskip("torchvision", reason="pip install torchvision").models)


def timm(name: str, **options: Any) -> nn.Module:
    models.prepare_torchvision()
    library = pytest.importorskip("timm", reason="pip install 'edgepack[zoo]'")
    module: nn.Module = library.create_model(name, num_classes=5, **options)
    return module


def transformers() -> nn.Module:
    models.prepare_torchvision()
    pytest.importorskip("transformers", reason="pip install 'edgepack[zoo]'")
    from transformers import ViTConfig, ViTForImageClassification

    module: nn.Module = ViTForImageClassification(
        ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
        )
    )
    return module


def resnet(vision: Any) -> nn.Module:
    return vision.resnet.ResNet(vision.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)  # type: ignore[no-any-return]


def densenet(vision: Any) -> nn.Module:
    return vision.DenseNet(16, (2, 2), 32, num_classes=5)  # type: ignore[no-any-return]


def convnext(vision: Any) -> nn.Module:
    settings = [vision.convnext.CNBlockConfig(24, 48, 2), vision.convnext.CNBlockConfig(48, None, 1)]
    return vision.ConvNeXt(settings, num_classes=5)  # type: ignore[no-any-return]


def vit(vision: Any) -> nn.Module:
    return vision.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=5)  # type: ignore[no-any-return]


SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": partial(torchvision, resnet),
    "resnet with padded shortcuts": resnet20,
    "mobilenet_v1": lambda: usercode.load("models.py:mobilenet_v1_025", ZOO)(),
    "mobilenet_v2": partial(torchvision, lambda vision: vision.mobilenet_v2(width_mult=0.35, num_classes=5)),
    "densenet": partial(torchvision, densenet),
    "convnext": partial(torchvision, convnext),
    "vit": partial(torchvision, vit),
    "vit, norms behind": lambda: usercode.load("models.py:vit_cifar10", ZOO)(),
    "vit of timm": partial(timm, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    "vit of transformers": transformers,
}
LARGE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (partial(torchvision, lambda vision: vision.resnet18()), 64),
    "resnet50": (partial(torchvision, lambda vision: vision.resnet50()), 64),
    "mobilenet_v2": (partial(torchvision, lambda vision: vision.mobilenet_v2()), 64),
    "mobilenet_v3": (partial(torchvision, lambda vision: vision.mobilenet_v3_small()), 64),
    "densenet121": (partial(torchvision, lambda vision: vision.densenet121()), 64),
    "convnext_atto": (partial(timm, "convnext_atto"), 64),
    "efficientnet_b0": (partial(timm, "efficientnet_b0"), 64),
    "googlenet": (partial(torchvision, lambda v: v.googlenet(init_weights=False, aux_logits=False)), 64),
    "deit_tiny": (partial(timm, "deit_tiny_distilled_patch16_224", img_size=64), 64),
    "vit_b_16": (partial(torchvision, lambda vision: vision.VisionTransformer(64, 16, 12, 12, 768, 3072)), 64),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_goes_is_exact(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, task = shaken(SMALL[name]()), Task((Input("x", (1, 3, 32, 32)),))
    found, run = prune(module, tmp_path, task, macs_ratio=0.7)
    assert gap(module, found, run, task) <= 1e-5
    seen = run.findings["channels"]
    assert seen["difference"] <= 1e-5
    assert 0.4 < seen["macs"][1] / seen["macs"][0] <= 0.7
    assert seen["parameters"][1] < seen["parameters"][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_what_goes_is_exact_in_whole_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, size = LARGE[name]
    module, task = shaken(make()), Task((Input("x", (1, 3, size, size)),))
    found, run = prune(module, tmp_path, task, macs_ratio=0.6)
    assert gap(module, found, run, task) <= 1e-5
    assert run.findings["channels"]["macs"][1] <= 0.6 * run.findings["channels"]["macs"][0]


def test_residual_streams_of_a_resnet_become_narrower(tmp_path: Path) -> None:
    _, run = prune(shaken(torchvision(resnet)), tmp_path, Task((Input("x", (1, 3, 32, 32)),)), macs_ratio=0.4)
    found = rows(run)
    assert found["layer2.0.conv2"]["tied"] == ["layer2.0.bn2", "layer2.0.downsample.0", "layer2.0.downsample.1"]
    assert any(found[name]["gone"] for name in ("conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"))


@pytest.mark.parametrize("name", ["vit", "vit, norms behind", "vit of timm", "vit of transformers"])
def test_whole_heads_and_inner_channels_of_transformers_go(name: str, tmp_path: Path) -> None:
    module, task = shaken(SMALL[name]()), Task((Input("x", (1, 3, 32, 32)),))
    found, run = prune(module, tmp_path, task, macs_ratio=0.5)
    kinds = {row["kind"] for row in rows(run).values() if row["gone"]}
    assert kinds == {"heads", "channels"}
    assert any("normalizes channels together" in why for why in run.findings["channels"]["left"].values())
    left, run = prune(module, tmp_path, task, macs_ratio=0.8, heads=False)
    assert {row["kind"] for row in rows(run).values()} == {"channels"}
    attention = [type(layer).__name__ for layer in module.modules() if "Attention" in type(layer).__name__]
    assert attention == [type(layer).__name__ for layer in left.modules() if "Attention" in type(layer).__name__]
    assert found is not left


def test_attention_of_which_no_head_goes_is_as_it_was(tmp_path: Path) -> None:
    module, task = shaken(torchvision(vit)), Task((Input("x", (1, 3, 32, 32)),))
    found, run = prune(module, tmp_path, task, macs_ratio=0.9, layers=("encoder.layers.encoder_layer_0",))
    now = [type(layer).__name__ for path, layer in found.named_modules() if path.endswith("self_attention")]
    gone = rows(run)["encoder.layers.encoder_layer_0.self_attention"]["gone"]
    assert now == ["SelfAttention" if gone else "MultiheadAttention", "MultiheadAttention"]


def test_the_stem_of_a_convnext_stays(tmp_path: Path) -> None:
    _, run = prune(shaken(torchvision(convnext)), tmp_path, Task((Input("x", (1, 3, 32, 32)),)), macs_ratio=0.7)
    assert "normalizes channels together" in run.findings["channels"]["left"]["features.0.0"]
    assert all(".block." in name for name in rows(run))
