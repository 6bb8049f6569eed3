"""Networks with their calibration samples and the images they are judged on, for the eight-bit benchmarks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networks as zoo
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgepack import metrics, models
from edgepack.data import Arrays, open_data
from edgepack.metrics import Metric
from edgepack.task import Input, Task

Array = np.ndarray[Any, Any]
Call = Callable[[Array], Array]

CALIBRATION = 512  # CIFAR images
CROPS, CROP = 32, 96  # for super-resolution, of halved pictures
IMAGES = 300  # of the ImageNet sample; half of them calibrates, the other half is scored, then the other way round
RANDOM_CALIBRATION, RANDOM_SCORED = 64, 32  # ImageNet samples for networks with random weights
PICTURES = {"data": "imagenet_sample"}
TRANSFORMERS = ("vit", "deit_small")
LINEAR = (*TRANSFORMERS, "convnext_atto")
COMPANDING = {"mean": (127.0,) * 3, "std": (127.5,) * 3}


@dataclass(frozen=True)
class Fold:
    """What one quantization sees, and what it is judged on.

    Attributes:
        calibration: (N, C, H, W), preprocessed.
        scored: preprocessed images of one size with their targets (None where there are none).
    """

    calibration: Array
    scored: tuple[tuple[Array, Array | None], ...]

    def batches(self, limit: int | None = None, size: int = 50) -> Iterator[tuple[Array, Array | None]]:
        for images, targets in self.scored:
            for start in range(0, len(images[:limit]), size):
                rows = slice(start, min(start + size, limit or len(images)))
                yield images[rows], None if targets is None else targets[rows]


@dataclass(frozen=True)
class Case:
    """One network of the tables."""

    name: str
    module: nn.Module = field(repr=False)
    item: Input
    folds: tuple[Fold, ...] = field(repr=False)
    metric: Metric | None = None
    work: Path = Path()

    @property
    def folder(self) -> Path:
        """Where everything made of this case is kept."""
        return self.work / self.name / self.fingerprint

    @property
    def transformer(self) -> bool:
        """Whether it attends: the tools have settings of their own for these."""
        return self.name in TRANSFORMERS

    @property
    def linear(self) -> bool:
        """Whether linear layers dominate."""
        return self.name in LINEAR

    @property
    def any_size(self) -> bool:
        """Whether its pictures have different sizes."""
        return "height" in self.item.dynamic

    @property
    def classifies(self) -> bool:
        return self.metric is None or self.metric.name == "top1"

    @property
    def float_bytes(self) -> int:
        return 4 * sum(parameter.numel() for parameter in self.module.parameters())

    def task(self, fold: Fold) -> Task:
        """As edgepack takes it: with calibration samples and nothing to score."""
        return Task((self.item,), calibration=Arrays((self.item,), {self.item.name: fold.calibration}, None, True))

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights and every sample."""
        found = hashlib.sha256(repr((self.name, self.item)).encode())
        for name, tensor in self.module.state_dict().items():
            found.update(name.encode() + tensor.numpy().tobytes())
        for fold in self.folds:
            found.update(np.ascontiguousarray(fold.calibration))
            for images, _ in fold.scored:
                found.update(np.ascontiguousarray(images))
        return found.hexdigest()[:16]

    @cached_property
    def answers(self) -> tuple[tuple[Array, ...], ...]:
        """What the float network gives, per fold and batch."""
        return tuple(tuple(self._answers(number, fold)) for number, fold in enumerate(self.folds))

    def _answers(self, number: int, fold: Fold) -> list[Array]:
        path = self.folder / f"float-{number}.npz"
        if path.exists():
            with np.load(path) as stored:
                return [stored[key] for key in stored.files]
        with torch.no_grad():
            found = [self.module(torch.from_numpy(images)).numpy() for images, _ in fold.batches()]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *found)
        return found


def open_case(name: str, data: Path, work: Path, samples: int | None = None) -> Case:
    """A case by name; ``samples`` limits both what calibrates and what is scored."""
    if name not in CASES:
        raise SystemExit(f"there is no network {name!r}; known: {', '.join(CASES)}")
    return replace(CASES[name](name, data.resolve(), samples), work=work)


def _limit(count: int, samples: int | None) -> int:
    return count if samples is None else min(count, samples)


def _trained(words: str, data: Path) -> tuple[nn.Module, Input]:
    network = next(item for item in zoo.networks() if item.name.startswith(words))
    return zoo.load(network, data).eval(), network.inputs[0]


def whole(item: Input, source: Mapping[str, Any], data: Path) -> tuple[Array, Array | None]:
    batches = list(open_data(source, (item,), data).batches(100))
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return np.concatenate([b.inputs[item.name] for b in batches]), np.concatenate(targets) if targets else None


def _cifar(name: str, data: Path, samples: int | None) -> Case:
    module, item = _trained(f"{name} (CIFAR-10)", data)
    calibration = {"data": "cifar10_train20k.npz", "samples": _limit(CALIBRATION, samples)}
    scored = {"data": "cifar10_test.npz", **({} if samples is None else {"samples": samples})}
    fold = Fold(whole(item, calibration, data)[0], (whole(item, scored, data),))
    return Case(name, module, item, (fold,), metrics.find("top1", data))


def _imagenet(name: str, data: Path, samples: int | None) -> Case:
    if name == "mobilenet_v2":
        module: nn.Module = MobileNetV2(data / "mobilenet_v2_imagenet_int8w.safetensors").eval()
        item = Input("input", (1, 3, 224, 224), resize=256, **COMPANDING)
    else:
        module, item = _trained("mobilenet_v1", data)
    images, targets = whole(item, PICTURES, data)
    assert targets is not None
    folds = tuple(Fold(images[one], ((images[other], targets[other]),)) for one, other in halves(len(images), samples))
    return Case(name, module, item, folds, metrics.find("top1", data))


def halves(count: int, samples: int | None) -> list[tuple[Array, Array]]:
    """Which of the ImageNet sample calibrate and which are scored, in either fold."""
    one, other = np.array_split(np.random.default_rng(0).permutation(count)[: _limit(IMAGES, samples)], 2)
    return [(one, other), (other, one)]


def _super_resolution(name: str, data: Path, samples: int | None) -> Case:
    module, item = _trained("imdn x2 (Set5)", data)
    large = replace(item, shape=(1, 3, 2 * CROP, 2 * CROP), dynamic=("batch",), resize=2 * CROP)
    pictures = open_data({**PICTURES, "samples": _limit(CROPS, samples)}, (large,), data)
    crops = np.concatenate([batch.inputs[item.name] for batch in pictures.batches(CROPS)])
    halved = F.avg_pool2d(torch.from_numpy(crops), 2).numpy()
    pairs = open_data({"inputs": "set5/LR_x2", "targets": "set5/HR"}, (item,), data)
    scored = tuple((batch.inputs[item.name], batch.targets) for batch in pairs.batches(1))
    return Case(name, module, item, (Fold(halved, scored[:samples]),), metrics.find("psnr_y", data))


def _random(name: str, data: Path, samples: int | None) -> Case:
    """Random weights and statistics; real pictures, so that ranges are those of pictures."""
    torch.manual_seed(0)
    models.prepare_torchvision()
    item = Input("input", (1, 3, 224, 224), resize=256, **zoo.IMAGENET)
    module = zoo.with_statistics(models.load(RANDOM[name], Path())).eval()
    count, scored = _limit(RANDOM_CALIBRATION, samples), _limit(RANDOM_SCORED, samples)
    images, _ = whole(item, {**PICTURES, "samples": count + scored}, data)
    return Case(name, module, item, (Fold(images[:count], ((images[count:], None),)),))


RANDOM = {
    "mobilenet_v2-random": "torchvision:mobilenet_v2",
    "resnet50": "torchvision:resnet50",
    "deit_small": "timm:deit_small_patch16_224",
    "convnext_atto": "timm:convnext_atto",
    "efficientnet_b0": "timm:efficientnet_b0",
}
CASES: dict[str, Callable[[str, Path, int | None], Case]] = {
    "resnet20": _cifar,
    "mobilenet_v1": _imagenet,
    "vit": _cifar,
    "resnet32": _cifar,
    "imdn": _super_resolution,
    "mobilenet_v2": _imagenet,
    **dict.fromkeys(RANDOM, _random),
}


class SamePadding(nn.Conv2d):
    """A convolution of stride 2 padded as TensorFlow does: right and below only."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., arXiv:1801.04381) from a file of eight-bit weights with folded batch norms."""

    SETTINGS = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, weights: Path) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(_conv(3, 32, 3, 2), nn.ReLU6())]
        channels = 32
        for expansion, outputs, repeats, stride in self.SETTINGS:
            for index in range(repeats):
                layers.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expansion))
                channels = outputs
        layers.append(nn.Sequential(_conv(320, 1280, 1, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(1280, 1000))
        self.load_state_dict(_dequantized(weights))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return scores


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [nn.Sequential(_conv(inputs, hidden, 1, 1), nn.ReLU6())] if expansion > 1 else []
        depthwise = nn.Sequential(_conv(hidden, hidden, 3, stride, hidden), nn.ReLU6())
        self.conv = nn.Sequential(*expand, depthwise, _conv(hidden, outputs, 1, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


def _conv(inputs: int, outputs: int, size: int, stride: int, groups: int = 1) -> nn.Conv2d:
    if stride == 2:
        return SamePadding(inputs, outputs, size, 2, groups=groups)
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups)


def _dequantized(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    stored = load_file(path)
    found = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_int8"):
            scale = stored[name.replace("weight_int8", "scale")]
            found[name.removesuffix("_int8")] = tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
        elif name.endswith(".bias"):
            found[name] = tensor
    return found
