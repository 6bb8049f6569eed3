"""Binary layers that were trained with brevitas: replaced by plain ones that compute the same.

::

    QuantIdentity (1 bit) → QuantConv2d (1 bit)     becomes     ±a → conv of ±1 → scale, bias

brevitas is not imported: a network that holds its layers has done so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgepack.compress._binary import Scale, channelwise
from edgepack.errors import Unsupported

ROOM = "brevitas.nn."
ACTIVATIONS = ("QuantIdentity", "QuantHardTanh")  # whose result has the sign of what they read
LAYERS = ("QuantConv1d", "QuantConv2d", "QuantLinear")
BINARY = ("BinaryQuant", "ClampedBinaryQuant")
OTHERS = ("output_quant", "bias_quant")


class Level(nn.Module):
    """``size`` where the input is 0 or more, else −``size``."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, self.size, -self.size)


class Taken(nn.Module):
    """A layer of ±1 weights, then a factor and a bias per channel."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Linear, size: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.scale = Scale(channelwise(size, layer))
        self.bias = None if bias is None else nn.Parameter(channelwise(bias, layer))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale(self.layer(x))
        return y if self.bias is None else y + self.bias


def take_binary(module: nn.Module, path: str = "") -> list[str]:
    """Replace binary layers of brevitas inside ``module``; returns their paths. Layers of more bits stay as they are.

    Raises:
        Unsupported: a binary layer rounds its result or its bias too.
    """
    found: list[str] = []
    for name, child in list(module.named_children()):
        place = f"{path}.{name}" if path else name
        made = _plain(child, place)
        if made is None:
            found += take_binary(child, place)
            continue
        setattr(module, name, made)
        found += [place] if isinstance(child, (nn.Conv1d, nn.Conv2d, nn.Linear)) else []
    return found


def _plain(layer: nn.Module, path: str) -> nn.Module | None:
    """The plain form of a layer; None for one that is not binary, or not brevitas'."""
    kind: Any = type(layer)
    if not kind.__module__.startswith(ROOM):
        return None
    if kind.__name__ in ACTIVATIONS:
        return _level(layer.act_quant)
    return _taken(layer, path) if kind.__name__ in LAYERS and _is_binary(layer.weight_quant) else None


def _is_binary(quantizer: Any) -> bool:
    inner = getattr(quantizer, "fused_activation_quant_proxy", quantizer)
    return bool(quantizer.is_quant_enabled) and type(getattr(inner, "tensor_quant", None)).__name__ in BINARY


def _level(quantizer: Any) -> Level | None:
    return Level(float(quantizer.scale().detach())) if _is_binary(quantizer) else None


def _taken(layer: Any, path: str) -> nn.Module:
    if rounded := [name for name in OTHERS if getattr(layer, name).is_quant_enabled]:
        raise Unsupported(
            f"binarize: {path} is a binary layer of brevitas with {rounded[0]}", "turn that quantizer off in the layer"
        )
    if layer.input_quant.is_quant_enabled and not _is_binary(layer.input_quant):
        raise Unsupported(f"binarize: {path} has 1-bit weights, but inputs of more bits", "make its input_quant binary")
    with torch.no_grad():
        values = layer.quant_weight().value.detach()
    plain = _like(layer)
    plain.weight.data.copy_(torch.where(values >= 0, 1.0, -1.0))
    size = values.abs().flatten(1).amax(1)
    made = Taken(plain, size, None if layer.bias is None else layer.bias.detach()).eval()
    level = _level(layer.input_quant) if layer.input_quant.is_quant_enabled else None
    return made if level is None else nn.Sequential(level, made)


def _like(layer: Any) -> nn.Conv1d | nn.Conv2d | nn.Linear:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=False)
    kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    return kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, bias=False, padding_mode=layer.padding_mode,
    )  # fmt: skip
