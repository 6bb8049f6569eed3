"""Small vision networks with the layer names of publicly trained weights.

Each function returns an untrained module; name the weights in the recipe:

    [model]
    module = "models.py:resnet20"
    weights = "resnet20_cifar10.safetensors"
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut (He et al., arXiv:1512.03385, option A)."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pad = 0 if stride == 1 and inputs == planes else planes // 4

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for (N, 3, 32, 32) images: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (BasicBlock(planes, planes, 1) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(inputs, planes, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR-10, 0.27 M parameters."""
    return CifarResNet(3)


def resnet32() -> nn.Module:
    """ResNet-32 for CIFAR-10, 0.46 M parameters."""
    return CifarResNet(5)


class PatchEmbed(nn.Module):
    """(N, 3, H, W) to (N, tokens, width), one token per patch, row by row."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Post-norm vision transformer with a class token (Dosovitskiy et al., arXiv:2010.11929)."""

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, width))
        layer = nn.TransformerEncoderLayer(width, heads, dim_feedforward=2 * width, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.mlp_head(self.transformer(x)[:, 0])


def vit_cifar10() -> nn.Module:
    """Vision transformer for (N, 3, 32, 32) images, 65 tokens of width 128, 0.81 M parameters."""
    return VisionTransformer()


def _activation() -> nn.Module:
    return nn.LeakyReLU(0.1)


def _first(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), _activation())


def _separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        _activation(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        _activation(),
    )


class MobileNetV1Quarter(nn.Module):
    """MobileNetV1 of width 0.25 (Howard et al., arXiv:1704.04861) with LeakyReLU(0.1)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            _first(3, 8),
            _separable(8, 16),
            _separable(16, 32, 2),
            _separable(32, 32),
            _separable(32, 64, 2),
            _separable(64, 64),
        )
        self.stage2 = nn.Sequential(_separable(64, 128, 2), *(_separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(_separable(128, 256, 2), _separable(256, 256))
        self.fc = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def mobilenet_v1_025() -> nn.Module:
    """MobileNetV1-0.25 for (N, 3, 224, 224) images, 0.47 M parameters."""
    return MobileNetV1Quarter()


class ContrastAttention(nn.Module):
    """Scale channels by what a small network makes of their spatial mean plus standard deviation."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        deviation = ((x - mean) ** 2).mean((2, 3), keepdim=True).sqrt()
        return x * self.conv_du(mean + deviation)


class DistillationBlock(nn.Module):
    """Information multi-distillation: each convolution keeps 16 channels and passes 48 on."""

    def __init__(self, channels: int = 64, kept: int = 16) -> None:
        super().__init__()
        self.kept = kept
        rest = channels - kept
        self.c1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.c2 = nn.Conv2d(rest, channels, 3, padding=1)
        self.c3 = nn.Conv2d(rest, channels, 3, padding=1)
        self.c4 = nn.Conv2d(rest, kept, 3, padding=1)
        self.c5 = nn.Conv2d(4 * kept, channels, 1)
        self.cca = ContrastAttention(channels, kept // 4)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        rest = x
        for conv in (self.c1, self.c2, self.c3):
            y = F.leaky_relu(conv(rest), 0.05)
            kept.append(y[:, : self.kept])
            rest = y[:, self.kept :]
        kept.append(self.c4(rest))
        return self.c5(self.cca(torch.cat(kept, dim=1))) + x


class Imdn(nn.Module):
    """IMDN super-resolution (Hui et al., arXiv:1909.11856): (N, 3, H, W) in 0…1 to (N, 3, 2H, 2W)."""

    def __init__(self, channels: int = 64, scale: int = 2) -> None:
        super().__init__()
        self.fea_conv = nn.Conv2d(3, channels, 3, padding=1)
        for index in range(1, 7):
            self.add_module(f"IMDB{index}", DistillationBlock(channels))
        self.c = nn.Sequential(nn.Conv2d(6 * channels, channels, 1), nn.LeakyReLU(0.05))
        self.LR_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.fea_conv(x)
        outputs = []
        for index in range(1, 7):
            y = self.get_submodule(f"IMDB{index}")(y)
            outputs.append(y)
        return self.upsampler(self.LR_conv(self.c(torch.cat(outputs, dim=1))) + first)


def imdn_x2() -> nn.Module:
    """IMDN doubling height and width, any image size, 0.69 M parameters."""
    return Imdn()
