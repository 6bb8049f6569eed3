"""One-stage torchvision detectors as plain networks: image batch in, raw heads out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RawHeads(nn.Module):
    """Backbone and heads of a detector, without image resizing, anchors and non-maximum suppression.

    Parameter names are those of the detector, so its weights load. Takes float images (N, 3, H, W) already
    normalized as the detector's own transform does; gives the head's dictionary, each (N, anchors, values).
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.backbone(images)
        levels = [features] if isinstance(features, torch.Tensor) else list(features.values())
        outputs: dict[str, torch.Tensor] = self.head(levels)
        return outputs
